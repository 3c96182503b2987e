"""A study's answer as one HTML page, as JSON and as plain text. What is said is decided in answer.py; this writes
it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab import records

if TYPE_CHECKING:  # imported where they are used, so that `import analysis` loads neither jax nor matplotlib
    import pandas as pd

    from analysis.answer import Answer
    from analysis.outlook import Outlook
    from analysis.refusal import Refused

PAGE, VERDICT, TABLE, SUMMARY = "report.html", "verdict.json", "runs.csv", "summary.txt"
NOT_IN_TABLE = ["loss_per_position", "versions", "seconds_by_part", "masks", "model"]


def report(study_dir: str | Path, out: str | Path | None = None) -> Path:
    """Writes report.html, and verdict.json, summary.txt, runs.csv and two figures as PNG beside it, into `out` (default:
    the study's directory).

    Returns the page's path. Runs that are missing, failed or diverged are named on the page, and what can not be said
    without them is refused there. Raises ValueError for records that can not be read.
    """
    if asks_gains(study_dir):
        from analysis import gains_report

        return gains_report.report(study_dir, out)
    from analysis import plots
    from analysis.answer import analyse

    answer = analyse(study_dir)
    directory = Path(out) if out is not None else Path(study_dir)
    directory.mkdir(parents=True, exist_ok=True)
    answer.frame.drop(columns=NOT_IN_TABLE).to_csv(directory / TABLE, index=False)
    records.write_json(directory / VERDICT, verdict_json(answer))
    (directory / SUMMARY).write_text(text(answer) + "\n", encoding="utf-8")
    plots.save(plots.headline(answer), directory / "headline.png")
    plots.save(plots.isoflops(answer), directory / "isoflops.png")
    page = directory / PAGE
    page.write_text(render(answer), encoding="utf-8")
    return page


def summary(study_dir: str | Path) -> str:
    """The verdicts, the table of differences and the caveats as plain text."""
    if asks_gains(study_dir):
        from analysis import gains, gains_report

        return gains_report.text(gains.analyse(study_dir))
    from analysis.answer import analyse

    return text(analyse(study_dir))


def asks_gains(study_dir: str | Path) -> bool:
    """Whether the study asks if arms train faster, which has a page of its own."""
    from lab import plan_file

    return plan_file.read(Path(study_dir))["study"].get("gains") is not None


def text(answer: Answer) -> str:
    from analysis.noise import Noise

    lines = [f"{answer.study['name']}: {answer.study['question']}", ""]
    for verdict in answer.verdicts:
        lines.append(f"[{verdict.kind}] {verdict.sentence}")
        if verdict.detail:
            lines.append(f"    {verdict.detail}")
    lines.append("")
    for row in differences_table(answer):
        lines.append("  ".join(f"{row[key]:>{width}}" for key, width in _TEXT_COLUMNS))
    if answer.steps:
        heads, *rows = steps_table(answer)
        lines += ["", "one thing at a time (nats, 95% interval, p after Holm over these):"]
        lines += [f"{a} -> {b} ({what}) at {heads[-1]}: {last}" for a, b, what, *_, last in rows]
    lines += ["", f"noise: {answer.noise if isinstance(answer.noise, Noise) else answer.noise.reason}"]
    changed = [s for s in answer.sensitivity if s.changes]
    lines += [f"changes under: {s.choice}: {s.arm} {s.value:+.2g} nats ({s.reads})" for s in changed]
    lines += [f"- {caveat}" for caveat in answer.caveats]
    return "\n".join(lines)


_TEXT_COLUMNS = (("arm", 18), ("budget", 9), ("loss", 8), ("difference", 11), ("interval", 20), ("p", 8))


def differences_table(answer: Answer) -> list[dict[str, str]]:
    """Header first: one row for each arm and budget."""
    from analysis.compare import Difference
    from analysis.frame import compact
    from analysis.isoflop import Minimum
    from analysis.noise import Noise

    heads = dict(arm="arm", budget="FLOPs", loss="best loss", error="se", N="best size", difference="difference",
                 interval="95% interval", p="p (Holm)", basis="compared at", detectable="detectable")  # fmt: skip
    rows = [heads]
    for arm in answer.arms:
        for budget in answer.budgets:
            m, d = answer.minima[arm, budget], answer.differences.get((arm, budget))
            row = dict.fromkeys(heads, "")
            row |= {"arm": arm, "budget": compact(budget), "loss": "refused", "basis": getattr(m, "reason", "")}
            if isinstance(m, Minimum):
                row |= {"loss": f"{m.loss:.4f}", "N": f"{m.N:,.0f}", "basis": "iso-FLOP minimum"}
                if isinstance(answer.noise, Noise):
                    row["error"] = f"{answer.noise.sd * m.per_noise:.4f}"
                    row["N"] += f" (± {100 * math.expm1(answer.noise.sd * m.log_N_per_noise):.0f}%)"
            if isinstance(d, Difference):
                row |= {
                    "difference": f"{d.value:+.4f}",
                    "interval": f"{d.low:+.4f} to {d.high:+.4f}",
                    "p": "same runs" if d.same_runs else _p(d.p_holm),
                    "basis": "the same runs" if d.same_runs else d.basis,
                    "detectable": "" if d.same_runs else f"{d.detectable:.4f}",
                }
            elif d is not None:
                row |= {"difference": "refused", "basis": d.reason}
            else:
                row["difference"] = "baseline"
            rows.append(row)
    return rows


def steps_table(answer: Answer) -> list[list[str]]:
    """Header first: one row for each pair of arms that are alike but for one thing, a column for each budget."""
    from analysis.compare import Difference
    from analysis.frame import compact

    def cell(value: Any) -> str:
        if not isinstance(value, Difference):
            return "refused"
        if value.same_runs:
            return "same runs"
        return f"{value.value:+.3f} ({value.low:+.3f} to {value.high:+.3f}), p {_p(value.p_holm)}"

    rows = [["from", "to", "what changes", *map(compact, answer.budgets)]]
    return rows + [[s.before, s.arm, s.what, *map(cell, s.differences)] for s in answer.steps]


def _p(value: float) -> str:
    return "< 0.0001" if value < 1e-4 else f"{value:.4f}"


def verdict_json(answer: Answer) -> dict[str, Any]:
    """The answer for machines; numbers that do not exist are null."""
    from analysis.fit import Fit

    law = answer.law
    return {
        "schema": records.SCHEMA,
        "study": answer.study["name"],
        "baseline": answer.baseline,
        "verdicts": [plain(verdict) for verdict in answer.verdicts],
        "differences": [
            {"arm": arm, "budget": budget, **plain(value)} for (arm, budget), value in answer.differences.items()
        ],
        "pairs": [{"arm": row, "baseline": column, **plain(value)} for (row, column), value in answer.pairs.items()],
        "steps": [plain(step) for step in answer.steps],
        "outlook": _outlook_json(answer.outlook),
        "minima": [{"arm": arm, "budget": budget, **plain(m)} for (arm, budget), m in answer.minima.items()],
        "noise": plain(answer.noise),
        "lack_of_fit": plain(answer.lack_of_fit),
        "law": {"name": law.law.name, "status": law.status, "params": plain(law.flat), "objective": law.objective}
        if isinstance(law, Fit)
        else plain(law),
        "crossings": {arm: plain(value) for arm, value in answer.crossings.items()},
        "readings": [plain(reading) for reading in answer.readings],
        "sensitivity": [plain(row) for row in answer.sensitivity],
        "caveats": list(answer.caveats),
        "runs": answer.frame.drop_duplicates("run_id")["status"].value_counts().to_dict(),
    }


def _outlook_json(outlook: Outlook | Refused) -> Any:
    from analysis.outlook import Outlook

    if not isinstance(outlook, Outlook):
        return plain(outlook)
    said_of = {pair: getattr(said, "reason", None) or str(said) for pair, said in outlook.forecasts.items()}
    return {
        "price": plain(outlook.price),
        "dollars": outlook.dollars,
        "params": plain(outlook.fit.flat),
        "forecasts": [
            {**_without_draws(plain(said)), "more": pair[0], "less": pair[1], "sentence": said_of[pair]}
            for pair, said in outlook.forecasts.items()
        ],
    }


def _without_draws(said: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in said.items() if name != "C_b"}


def plain(value: Any) -> Any:
    import numpy as np

    if dataclasses.is_dataclass(value):
        return {item.name: plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.generic | np.ndarray):
        return plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def render(answer: Answer) -> str:
    """The page: one file without references to anything outside of it."""
    from analysis import page, plots
    from analysis.answer import parameter_intervals
    from analysis.fit import Fit
    from analysis.noise import Noise
    from analysis.resample import Draws

    rows = differences_table(answer)
    fitted = answer.law if isinstance(answer.law, Fit) else None
    figures = {
        "headline": plots.headline(answer),
        "isoflops": plots.isoflops(answer),
        "residuals": plots.residuals(answer, fitted) if fitted else None,
        "positions": plots.positions(answer),
        "matrix": plots.matrix(answer),
        "outlook": plots.outlook(answer),
    }
    return page.render(
        "report.html",
        figures,
        title=answer.study["name"],
        answer=answer,
        study=answer.study,
        head=rows[0],
        rows=rows[1:],
        steps=steps_table(answer),
        noise=answer.noise if isinstance(answer.noise, Noise) else None,
        law=fitted,
        draws=answer.draws if isinstance(answer.draws, Draws) else None,
        parameters=parameter_intervals(answer),
        curves={arm: (fit, isinstance(fit, Fit)) for arm, fit in answer.curves.items()},
        crossings={arm: getattr(value, "reason", None) or str(value) for arm, value in answer.crossings.items()},
        runs=run_rows(answer.frame),
        facts=facts(answer),
    )


def run_rows(frame: pd.DataFrame) -> list[dict[str, str]]:
    def number(value: Any, form: str) -> str:
        return "" if value is None or value != value else format(value, form)

    return [
        {
            "id": row["run_id"],
            "arm": row["arm"],
            "status": row["status"]
            + (f" at step {int(row['diverged_at'])}" if row["status"] == "diverged" and row["diverged_at"] else ""),
            "seed": f"{row['seed_init']}/{row['seed_data']}",
            "shape": f"D{row['D']} L{row['L']}",
            "N": number(row["parameters_body"], ",.0f"),
            "loss": number(row["loss"], ".4f"),
            "bits": number(row["bits_per_byte"], ".4f"),
            "planned": number(row["planned_exact"], ".4g"),
            "spent": number(row["flops_exact"], ".4g"),
            "residual": number(100 * row["residual"], "+.2f") + "%",
            "rate": number(row["learning_rate"], ".3g"),
            "epochs": number(row["epochs"], ".2f"),
            "seconds": number(row["seconds"], ",.1f"),
        }
        for row in frame.to_dict("records")
    ]


def facts(answer: Answer) -> list[tuple[str, str]]:
    return how_made(answer.frame, answer.baseline)


def how_made(frame: pd.DataFrame, baseline: str) -> list[tuple[str, str]]:
    """What was used to make the runs: data, versions, devices, totals, speed."""
    runs = frame.drop_duplicates("run_id")
    data = frame.attrs["study"]["data"]
    versions = {f"{name} {version}" for row in runs["versions"].dropna() for name, version in row.items()}

    def several(values: Any) -> str:
        return ", ".join(sorted({str(value) for value in values})) or "unknown"

    return [
        ("Corpus", f"{data['corpus']}: {data['summary']}"),
        ("Manifest", f"{data['manifest']} ({data['train_tokens']:,} training tokens)"),
        ("Runs", ", ".join(f"{count} {status}" for status, count in runs["status"].value_counts().items())),
        (
            "Total spent",
            f"{runs['flops_exact'].sum():.4g} FLOPs (exact), {runs['seconds'].sum():,.0f} seconds of training",
        ),
        *_speed(frame, baseline),
        ("Device", several(runs["device"].dropna())),
        ("Versions", several(versions)),
    ]


def _speed(frame: pd.DataFrame, baseline: str) -> list[tuple[str, str]]:
    """Exact FLOP/s by arm, what equal FLOPs take in time beside the baseline, and what the time was spent on."""
    done: pd.DataFrame = frame.loc[frame["exact_flops_per_second"].notna(), :]
    if done.empty:
        return []  # runs of before this was recorded
    cells = done.pivot_table(index=["budget", "rung"], columns="arm", values="exact_flops_per_second", aggfunc="median")
    said = []
    for arm in cells:
        text = f"{arm} {cells[arm].median():.3g} FLOP/s"
        share = done.loc[done["arm"] == arm, "mfu"].median()
        text += f" ({share:.0%} of the device's peak)" if share == share else ""
        if arm != baseline and baseline in cells:
            times = (cells[baseline] / cells[arm]).dropna()
            text += f", {times.median():.2f} times {baseline}'s time for equal FLOPs" if len(times) else ""
        said.append(text)
    rows = [("Speed", "; ".join(said))]
    parts: dict[str, float] = {}
    for one in done.drop_duplicates("run_id")["seconds_by_part"].dropna():
        for name, seconds in one.items():
            parts[name] = parts.get(name, 0.0) + seconds
    if whole := sum(parts.values()):
        shares = sorted(parts.items(), key=lambda item: -item[1])
        rows.append(("Time", ", ".join(f"{name} {seconds / whole:.0%}" for name, seconds in shares)))
    return rows
