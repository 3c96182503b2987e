"""What follows from a fitted law and is better known than its parameters: the loss at the centre of the runs, the compute
optimum and its exponents, at the largest compute and beyond it."""

# pandas' own annotations lose the type of a column; its errors are not this file's.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.fit import Fit
from analysis.frame import compact
from analysis.optimum import Optimum, parametric
from analysis.refusal import Refused, attempt
from analysis.resample import Draws, interval

ARMS = 6  # of which a page tells


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """`interval` is None without draws; an end that draws do not bound is 0 or infinite."""

    name: str
    value: float
    interval: tuple[float, float] | None
    unit: str
    meaning: str = ""


def flops_per_token(table: pd.DataFrame) -> float:
    """C / (N D) where the table's C is proportional to it, else 6."""
    if not {"N", "D", "C"} <= set(table):
        return 6.0
    ratio = (table["C"] / (table["N"] * table["D"])).to_numpy(float)
    middle = float(np.median(ratio))
    near = ratio.max() / ratio.min() < 1.2 and abs(middle / 6 - 1) > 0.01
    return middle if near else 6.0


def compute_optima(fit: Fit, draws: Draws | Refused, cost: float) -> dict[str, Optimum | Refused]:
    law = draws if isinstance(draws, Draws) else fit
    if set(fit.law.columns) != {"N", "D"}:
        return {}
    arms = fit.arms[:ARMS] if fit.law.by_arm else ("",)
    return {arm: attempt(lambda a=arm: parametric(law, arm=a or None, flops_per_token=cost)) for arm in arms}


def centre(fit: Fit) -> dict[str, float]:
    """Geometric means of the fitted columns: where a law is known best."""
    kept = fit.data.weights_n > 0
    return {name: float(np.exp(np.log(value[kept]).mean())) for name, value in fit.data.raw.items()}


def derived(
    fit: Fit, draws: Draws | Refused, table: pd.DataFrame, optima: Mapping[str, Optimum | Refused]
) -> tuple[Estimate, ...]:
    rows: list[Estimate] = []

    def loss(name: str, at: Mapping[str, float], meaning: str) -> None:
        for arm in fit.arms[:ARMS] if fit.law.by_arm else ("",):
            where = {**at, **({"arm": arm} if arm else {})}
            bounds = interval(draws.predict(**where)) if isinstance(draws, Draws) else None
            value = float(fit.predict(**where))
            rows.append(Estimate(name=_of(name, arm), value=value, interval=bounds, unit="nats", meaning=meaning))

    middle = centre(fit)
    loss(
        "L(centre)",
        middle,
        "loss at the geometric mean of the runs, " + ", ".join(f"{n} = {v:.4g}" for n, v in middle.items()),
    )
    top = float(table["C"].max()) if "C" in table else np.nan
    if fit.law.columns == ("C",):
        loss("L(C max)", {"C": top}, f"loss at the largest compute, {compact(top)} FLOPs")
        loss("L(10 C max)", {"C": 10 * top}, "loss at ten times the largest compute: extrapolated")
    for arm, optimum in optima.items():
        if isinstance(optimum, Refused):
            continue
        for name, value, bounds, meaning in (
            ("a", optimum.a, optimum.a_interval, "compute-optimal N* ~ C^a"),
            ("b", optimum.b, optimum.b_interval, "compute-optimal D* ~ C^b"),
        ):
            ends = None if bounds is None else (_end(bounds[0], -np.inf), _end(bounds[1], np.inf))
            rows.append(Estimate(name=_of(name, arm), value=value, interval=ends, unit="1", meaning=meaning))
        for C, note in ((top, "at the largest compute"), (10 * top, "at ten times the largest compute: extrapolated")):
            where = f"C = {compact(C)}"
            N, D, L = optimum.N_at(C), optimum.D_at(C), optimum.loss_at(C)
            for symbol, band, unit in (("N*", N, "N"), ("D*", D, "D"), ("L*", L, "nats")):
                ends = None if band.low is None or band.high is None else (float(band.low[0]), float(band.high[0]))
                rows.append(
                    Estimate(
                        name=_of(f"{symbol}({where})", arm),
                        value=float(band.value[0]),
                        interval=ends,
                        unit=unit,
                        meaning=note,
                    )
                )
            if note == "at the largest compute":
                rows.append(
                    Estimate(
                        name=_of(f"D*/N*({where})", arm),
                        value=float(D.value[0] / N.value[0]),
                        interval=_ratio(optimum, C),
                        unit="D per N",
                        meaning=note,
                    )
                )
    return tuple(rows)


def _ratio(optimum: Optimum, C: float) -> tuple[float, float] | None:
    N_mc, D_mc = optimum.sizes_at(np.array([C]))
    ratio = (D_mc / N_mc)[1:, 0]
    return interval(ratio[np.isfinite(ratio)]) if np.isfinite(ratio).sum() > 1 else None


def _end(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else value


def _of(name: str, arm: str) -> str:
    return f"{name}[{arm}]" if arm else name
