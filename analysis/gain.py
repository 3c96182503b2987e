"""What an arm is worth in compute: how much more of it the baseline needs for the same loss.

Letters: C FLOPs, b draws, g points of a grid of C.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from analysis.curves import Curves
from analysis.frame import compact
from analysis.refusal import Refusal

_UNDEFINED = 0.5  # share of draws without a value from which there is no median


@dataclass(frozen=True, kw_only=True)
class Gain:
    """The baseline needs `value` times the compute of the arm, which is at C, to be as good: above 1 the arm is better.

    `value` is the median over draws, `low`, `high` their interval at `level`; None where that end is open: the baseline
    reaches the loss nowhere in what was searched, or no asymptote lies below it. `better` is the share of draws above 1.
    `extrapolated` says that C or C times the value lies outside of `measured`, `widest` that an end of the interval does.
    """

    arm: str
    baseline: str
    C: float
    value: float | None
    low: float | None
    high: float | None
    level: float
    better: float
    kind: Literal["compute-equivalent", "pinned asymptote"]
    measured: tuple[float, float] | None
    extrapolated: bool
    widest: bool

    def __str__(self) -> str:
        low, high = ("open" if end is None else f"{end:.3g}" for end in (self.low, self.high))
        value = "beyond what was searched" if self.value is None else f"{self.value:.3g} times the compute"
        flag = " (an extrapolation beyond the measured range)" if self.extrapolated else ""
        if self.widest and not self.extrapolated:
            flag = " (the interval reaches beyond the measured range)"
        return (
            f"at {compact(self.C)} FLOPs of {self.arm}, {self.baseline} needs {value} for the same loss{flag}; "
            f"{self.level:.0%} interval {low} to {high} ({self.kind})"
        )


def compute_equivalent_gain(given: Curves, *, arm: str, baseline: str, C: float, level: float = 0.95) -> Gain:
    """C_B / C with L_B(C_B) = L_A(C), of every draw; the baseline's compute is searched over the whole grid of the
    curves."""
    if not given.C[0] <= C <= given.C[-1]:
        raise ValueError(f"C = {C!r} is beyond the curves, {given.C[0]:.3g} to {given.C[-1]:.3g}; see reach=")
    for name in (arm, baseline):
        if name not in given.loss:
            raise ValueError(f"arm = {name!r}: the curves are of {', '.join(given.loss)}")
    level_b = given.at(C, arm)
    above_bg = given.loss[baseline] - level_b[:, None]  # positive until the baseline is as good
    reached = above_bg <= 0
    first = reached.argmax(axis=1)
    i = np.clip(first - 1, 0, len(given.C) - 2)[:, None]
    before, after = (np.take_along_axis(above_bg, i + k, axis=1)[:, 0] for k in (0, 1))
    share = np.where(before > after, before / np.where(before > after, before - after, 1.0), 0.0)
    log_C = np.log(given.C)
    at = log_C[i[:, 0]] + share * (log_C[i[:, 0] + 1] - log_C[i[:, 0]])
    at = np.where(reached[:, 0], -np.inf, np.where(reached.any(axis=1), at, np.inf))
    return _gain(np.exp(at - np.log(C)), arm, baseline, C, level, "compute-equivalent", given.measured)


def pinned_speedup(
    better: Any,
    worse: Any,
    *,
    asymptote: Any,
    exponent: Any,
    C: float,
    measured: tuple[float, float],
    arm: str = "better",
    baseline: str = "worse",
    level: float = 0.95,
) -> Gain:
    """((L_worse - L_inf) / (L_better - L_inf))^(1 / alpha) of two losses at one compute C, on curves
    L_inf + A C^-alpha that differ in A alone (marin-community/marin issue 8096).

    Every quantity is a number or an array (b,) of draws; with numbers alone there is no interval to speak of. `measured`
    is the range of compute that L_inf and alpha come from: a speed-up that leaves it is flagged. Raises Refusal where
    half of the draws, or the number, have no loss above the asymptote.
    """
    drawn = np.broadcast_arrays(*(np.atleast_1d(np.asarray(v, float)) for v in (better, worse, asymptote, exponent)))
    better_b, worse_b, asymptote_b, exponent_b = drawn
    if not (np.isfinite(np.stack(drawn)).all() and (exponent_b > 0).all()):
        raise ValueError("better, worse, asymptote, exponent: use finite losses and asymptotes, and exponents above 0")
    below = (better_b <= asymptote_b) | (worse_b <= asymptote_b)
    if below.mean() >= _UNDEFINED:
        raise Refusal(
            f"the loss {np.median(better_b):.4g} is not above the asymptote {np.median(asymptote_b):.4g} in "
            f"{below.mean():.0%} of the draws: no compute of {baseline} reaches it; the asymptote is not pinned by these data"
        )
    ratio = np.where(below, 1.0, worse_b - asymptote_b) / np.where(below, 1.0, better_b - asymptote_b)
    # Below the asymptote the better arm is out of the other's reach, unless the other one is lower still.
    endless = np.where(worse_b < better_b, 0.0, np.inf)
    with np.errstate(over="ignore"):
        speedup_b = np.where(below, endless, ratio ** (1 / exponent_b))
    return _gain(speedup_b, arm, baseline, C, level, "pinned asymptote", measured)


def _gain(
    ratio_b: np.ndarray, arm: str, baseline: str, C: float, level: float,
    kind: Literal["compute-equivalent", "pinned asymptote"], measured: tuple[float, float],
) -> Gain:  # fmt: skip
    # Order statistics, since interpolation between infinities is not a number.
    ends = np.quantile(ratio_b, [(1 - level) / 2, 0.5, (1 + level) / 2], method="inverted_cdf")
    low, value, high = (float(end) if 0 < end < np.inf else None for end in ends)
    inside = [measured[0] * (1 - 1e-9) <= C * end <= measured[1] * (1 + 1e-9) for end in ends]
    return Gain(
        arm=arm,
        baseline=baseline,
        C=float(C),
        value=value,
        low=low,
        high=high,
        level=level,
        better=float(np.mean(ratio_b > 1)),
        kind=kind,
        measured=(float(measured[0]), float(measured[1])),
        extrapolated=not (inside[1] and measured[0] * (1 - 1e-9) <= C <= measured[1] * (1 + 1e-9)),
        widest=not (inside[0] and inside[2]),
    )
