"""Runs as the commands on laws read them, from a study's directory or a table, and fits of several arms to them."""

# pandas' own annotations lose the type of a column; its errors are not this file's.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportReturnType=false

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console

from analysis.refusal import Refusal, Refused
from lab.structure import LADDER
from sweeps.cli.control import records_of


@dataclass(frozen=True, kw_only=True)
class Source:
    """Finished runs as laws read them: columns N, D (or C), loss, arm, run. `grid` are
    all runs of a plan or table, those
    without a loss too."""

    runs: pd.DataFrame
    grid: pd.DataFrame
    measured: tuple[float, float] | None
    directory: Path | None


def read(path: str, columns: str, where: str) -> Source:
    directory = records_of(path)
    if directory is not None:
        return _of_study(directory, where)
    from analysis.table import clusters_of, read_table

    frame = read_table(Path(path), columns=pairs_of(columns, "columns"), where=where or None)
    if "run" not in frame:
        cluster = clusters_of(frame)
        frame["run"] = np.arange(len(frame)) if cluster is None else frame[cluster]
    if "arm" not in frame:
        frame["arm"] = "all"
    return Source(runs=frame if "loss" in frame else frame.iloc[:0], grid=frame, measured=None, directory=None)


def _of_study(directory: Path, where: str) -> Source:
    import analysis
    from analysis.crossing import COLUMNS

    frame = analysis.load(directory)
    frame = frame.query(where) if where else frame
    # Order from more to less structure, where the structures are on the ladder; arms off it keep theirs.
    order = {name: place for place, name in enumerate(LADDER)}
    frame = frame.sort_values("structure", key=lambda s: s.map(order).fillna(len(order)), kind="stable")
    rows = pd.DataFrame(
        {
            "arm": frame["arm"],
            "N": frame[COLUMNS["N"]].fillna(frame["planned_6nd"] / 6 / frame["planned_tokens"]),
            "D": frame[COLUMNS["D"]].fillna(frame["planned_tokens"]),
            "C": frame["flops_exact"].fillna(frame["planned_exact"]),
            "budget": frame["budget"],
            "loss": frame["loss"],
            "run": frame["run_id"],
        }
    ).reset_index(drop=True)
    done = rows.dropna(subset=["loss"]).reset_index(drop=True)
    ends = [(b.min(), b.max()) for _, b in done.groupby("arm")["budget"]]
    measured = (max(low for low, _ in ends), min(high for _, high in ends)) if ends else None
    return Source(runs=done, grid=rows.drop(columns="budget"), measured=measured, directory=directory)


def arms_of(rows: pd.DataFrame, asked: Sequence[str], least: int = 2) -> list[str]:
    known = list(dict.fromkeys(rows["arm"].astype(str)))
    unknown = [name for name in asked if name not in known]
    if unknown:
        raise ValueError(
            f"arm = {unknown[0]!r}: the runs are of {', '.join(known)}; columns=arm=... names their column"
        )
    chosen = list(asked) or known
    if len(chosen) < least:
        raise ValueError(
            f"arms = {chosen}: name {least}, from more to less structure; the runs are of {', '.join(known)}"
        )
    return chosen


def drawn(
    source: Source,
    arms: list[str],
    law: str | None,
    shared: Sequence[str],
    method: str | None,
    draws: int,
    seed: int,
    console: Console,
) -> Any:
    """Draws of one fit to the named arms, with parameters of their own but for the shared ones."""
    from analysis.fit import fit_law, named
    from analysis.uncertainty import draw_parameters

    rows = source.runs[source.runs["arm"].isin(arms)]
    model = named(law or ("chinchilla" if {"N", "D"} <= set(rows) else "power_law_with_asymptote"))
    if model.columns == ("C",) and "N" in rows:
        rows = _least_losses(rows)
    names = [p.name for p in model.parameters]
    unknown = [name for name in shared if name not in names]
    if unknown:
        raise ValueError(f"shared = {unknown[0]!r}: {model.name} has {', '.join(names)}")
    own = [name for name in names if name not in shared] if len(arms) > 1 else []
    with console.status(f"{model.name} is fitted to {len(rows)} rows"):
        fit = fit_law(model, rows, per_arm=own, delta="scatter", seed=seed)
        found = draw_parameters(fit, clusters=rows["run"], method=method, draws=draws, seed=seed)
    console.print(
        f"{model.name}, {', '.join(own) or 'nothing'} by arm: {fit.rows} rows, {fit.rms:.2%} rms, {fit.status}; {found.kind}",
        soft_wrap=True,
    )
    return found


def _least_losses(rows: pd.DataFrame) -> pd.DataFrame:
    """The least loss over sizes of each arm at each budget, for a law of C."""
    from analysis.isoflop import isoflop_minima

    compute = "budget" if "budget" in rows else "C"
    table = rows if compute in rows else rows.assign(C=flops(rows))
    found = isoflop_minima(table, columns={"C": compute}, arm="arm")
    refused = [answer.reason for answer in found.values() if isinstance(answer, Refused)]
    least = [{"arm": arm, "C": C, "loss": m.loss, "run": f"{arm} {C:.6g}"} for (arm, C), m in found.items()
             if not isinstance(m, Refused)]  # fmt: skip
    if not least:
        raise Refusal(f"no budget has a least loss over sizes: {refused[0]}")
    return pd.DataFrame(least)


def flops(rows: pd.DataFrame) -> pd.Series:
    return rows["C"].astype(float) if "C" in rows else 6.0 * rows["N"].astype(float) * rows["D"].astype(float)


def cost_of(source: Source, arms: Sequence[str]) -> dict[str, Any]:
    """FLOPs of a token of each arm: as its runs have it, or 6 N where they only have N and D."""
    from analysis.curves import measured_cost
    from analysis.optimum import SIX_N

    rows = source.runs
    if not {"N", "D", "C"} <= set(rows):
        return dict.fromkeys(arms, SIX_N)
    return {arm: measured_cost(*(rows.loc[rows["arm"] == arm, name] for name in ("N", "D", "C"))) for arm in arms}


def pairs_of(text: str, field: str) -> dict[str, str]:
    pairs = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = part.partition("=")
        if not equals or not name or not value:
            raise ValueError(
                f"{field} = {text!r}: write name=value pairs with commas between them, such as N=params,D=tokens"
            )
        pairs[name.strip()] = value.strip()
    return pairs
