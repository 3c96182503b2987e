"""In which year does the arm with less structure win, at a budget in dollars?

The picture is Hyung Won Chung's ("Shaping the future of AI from the history of Transformer", Stanford CS25, 2024): loss
against compute for more structure, less structure and even less; structure helps early and is overtaken, and compute gets
about ten times cheaper every five years. So a crossing in FLOPs is a year: C(year) = dollars / price(year).

A crossing needs arms whose exponents or asymptotes differ: fit_law(..., per_arm=("E", "A", "gamma")), or a fit for each
arm. What comes out is an extrapolation of two things, the curves and the price; the result carries the factor of the first
and the source of the second.

Letters: C FLOPs, b draws, g points of the grid of C.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from analysis.curves import BELOW, Curves
from analysis.refusal import Refused

RESOLVED = 0.95


@dataclass(frozen=True, kw_only=True)
class Price:
    """Dollars for one FLOP that a training run counts: `dollars_per_flop` at `year`, and ten times less every
    `tenfold_years` (five: Chung 2024, who reads it off a century of calculations per dollar)."""

    dollars_per_flop: float
    year: float
    source: str
    tenfold_years: float = 5.0

    def __post_init__(self):
        for name in ("dollars_per_flop", "tenfold_years"):
            value = getattr(self, name)
            if not (np.isfinite(value) and value > 0):
                raise ValueError(f"{name} = {value!r}: use a positive number")

    @classmethod
    def of_accelerator(
        cls,
        *,
        dollars_per_hour: float = 2.5,
        peak_flops: float = 989e12,
        utilisation: float = 0.4,
        year: float = 2026.3,
        tenfold_years: float = 5.0,
        source: str = "",
    ) -> "Price":
        """The price of a rented accelerator at a share of its peak.

        By default an H100 SXM: 989e12 dense bf16 FLOPs a second (NVIDIA's datasheet) at about 2.50 dollars an hour (the
        usual on-demand price of April 2026 on codesota.com/hardware/h100; list prices then ran from 1.65 to 6.88), of which
        a training run uses 40%, a typical share of large runs. All three are to be set where they are known.
        """
        if not 0 < utilisation <= 1:
            raise ValueError(
                f"utilisation = {utilisation!r}: use the share of the peak that training reaches, in (0, 1]"
            )
        per_flop = dollars_per_hour / (3600 * peak_flops * utilisation)
        said = (
            source or f"{dollars_per_hour:g} dollars an hour for {peak_flops:.3g} FLOPs a second at {utilisation:.0%}"
        )
        return cls(dollars_per_flop=per_flop, year=year, tenfold_years=tenfold_years, source=said)

    def flops(self, dollars: float, year: Any) -> Any:
        """What `dollars` buy in `year`."""
        return dollars / self.dollars_per_flop * 10.0 ** ((np.asarray(year, float) - self.year) / self.tenfold_years)

    def year_of(self, C: Any, dollars: float) -> Any:
        """When `dollars` buy C FLOPs; infinite where C is 0 or infinite."""
        with np.errstate(divide="ignore"):
            return self.year + self.tenfold_years * np.log10(np.asarray(C, float) * self.dollars_per_flop / dollars)

    def __str__(self) -> str:
        return (
            f"{self.dollars_per_flop:.3g} dollars per FLOP in {self.year:.0f} ({self.source}), falling tenfold every "
            f"{self.tenfold_years:g} years"
        )


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """When `less` overtakes `more` for good, within reach, at `dollars` a run.

    `year` is the median over draws, `low`, `high` their interval at `level`; None where that end is open: at the lower
    end `less` is better at every C of the grid, at the upper end it does not win before its end. `C`, `C_low`, `C_high`
    are the same in FLOPs. `wins` is the share of draws in which `less` wins within reach, `already` that in which it is
    better everywhere. `extrapolation` is the factor by which C lies beyond what was measured, 1 inside.
    """

    more: str
    less: str
    dollars: float
    price: Price
    year: float | None
    low: float | None
    high: float | None
    C: float | None
    C_low: float | None
    C_high: float | None
    level: float
    wins: float
    already: float
    measured: tuple[float, float]
    reach: float
    extrapolation: float
    C_b: np.ndarray = field(repr=False)

    @property
    def extrapolated(self) -> bool:
        return self.extrapolation > 1

    def won_by(self, year: Any) -> Any:
        """Share of draws in which `less` has overtaken by `year`: a probability where draws are of the parameters."""
        C = self.price.flops(self.dollars, year)
        shares = (self.C_b[:, None] <= np.atleast_1d(C).ravel()).mean(axis=0)
        return float(shares[0]) if np.ndim(year) == 0 else shares.reshape(np.shape(year))

    @property
    def probability(self) -> dict[int, float]:
        """By years, from that of the price in steps of five over half a century."""
        first = round(self.price.year)
        return {year: self.won_by(year) for year in range(first, first + 51, 5)}

    def __str__(self) -> str:
        first = round(self.price.year)
        by = ", ".join(f"{self.won_by(year):.0%} by {year}" for year in (first, first + 10, first + 20))
        if self.year is None or self.C is None:
            return (
                f"{self.less} is better than {self.more} already, in {self.already:.0%} of the draws at every budget from "
                f"{self.measured[0] / BELOW:.2g} FLOPs on; probability that it has won at ${self.dollars:,.4g}: {by}."
            )
        low = "open" if self.low is None else f"{self.low:.1f}"
        high = "open" if self.high is None else f"{self.high:.1f}"
        where = (
            f"an extrapolation by a factor {self.extrapolation:.2g} beyond the measured "
            if self.extrapolated
            else "inside the measured "
        ) + f"{self.measured[0]:.2g} to {self.measured[1]:.2g}"
        return (
            f"At ${self.dollars:,.4g} a run {self.less} overtakes {self.more} in {self.year:.1f} ({self.level:.0%} interval "
            f"{low} to {high}), at {self.C:.2g} FLOPs, {where}. Probability that it has won: {by}, at {self.price}."
        )


def forecast(
    given: Curves,
    *,
    more: str,
    less: str,
    dollars: float,
    price: Price | None = None,
    level: float = 0.95,
    resolved: float = RESOLVED,
) -> Forecast | Refused:
    """The year in which `less` overtakes `more` at `dollars` a run; refused where fewer than `resolved` of the draws have
    it win within reach, or the arms' curves are the same. In a comparison of an arm with itself half of the draws win, so
    that `resolved` is what keeps noise from getting a year."""
    if not (np.isfinite(dollars) and dollars > 0):
        raise ValueError(f"dollars = {dollars!r}: use the positive price of one run")
    if not 0.5 <= resolved <= 1:
        raise ValueError(f"resolved = {resolved!r}: use a share of the draws from 0.5 to 1")
    price = price or Price.of_accelerator()
    difference = given.difference(more, less)
    first, last = given.C[0], given.C[-1]
    if np.abs(difference).max() <= 1e-9 * np.abs(given.loss[more]).max():
        return Refused(reason=f"{more} and {less} have the same curves, so that neither overtakes the other")
    C_b = last_overtaking(given.C, difference)
    wins, already = float(np.mean(C_b < np.inf)), float(np.mean(C_b == 0))
    if wins < resolved:
        inside = float(np.mean(difference[:, _nearest(given.C, given.measured[1])] < 0))
        return Refused(
            reason=f"not resolved: {less} overtakes {more} up to {last:.2g} FLOPs in {wins:.0%} of the draws, and "
            f"{resolved:.0%} are asked for; it is better at the largest measured budget, {given.measured[1]:.2g} FLOPs, in "
            f"{inside:.0%}; add runs at larger budgets (`lab design` proposes them)"
        )
    # Order statistics, since interpolation between infinities is not a number.
    ends = np.quantile(C_b, [(1 - level) / 2, 0.5, (1 + level) / 2], method="inverted_cdf")
    C_low, C, C_high = (float(end) if 0 < end < np.inf else None for end in ends)
    low, year, high = (None if end is None else float(price.year_of(end, dollars)) for end in (C_low, C, C_high))
    beyond = 1.0 if C is None else max(C / given.measured[1], given.measured[0] / C, 1.0)
    return Forecast(
        more=more,
        less=less,
        dollars=dollars,
        price=price,
        year=year,
        low=low,
        high=high,
        C=C,
        C_low=C_low,
        C_high=C_high,
        level=level,
        wins=wins,
        already=already,
        measured=given.measured,
        reach=float(last),
        extrapolation=float(beyond),
        C_b=np.where(C_b == 0, first, C_b),
    )


def forecasts(given: Curves, **settings: Any) -> dict[tuple[str, str], Forecast | Refused]:
    """`forecast` of every pair (more, less) in the order of the curves."""
    arms = given.arms
    pairs = [(more, less) for index, more in enumerate(arms) for less in arms[index + 1 :]]
    return {(more, less): forecast(given, more=more, less=less, **settings) for more, less in pairs}


def last_overtaking(C: np.ndarray, difference_bg: np.ndarray) -> np.ndarray:
    """C from which on the difference stays negative to the end of the grid, log-linear between its points: 0 where it is
    negative everywhere, infinite where it is not at the end."""
    behind = difference_bg >= 0
    g = len(C)
    last = g - 1 - behind[:, ::-1].argmax(axis=1)
    at = np.minimum(last, g - 2)[:, None]
    before, after = (np.take_along_axis(difference_bg, at + k, axis=1)[:, 0] for k in (0, 1))
    crosses = behind.any(axis=1) & ~behind[:, -1]
    share = np.where(crosses, before / np.where(crosses, before - after, 1.0), 0.0)
    log_C, step = np.log(C), np.diff(np.log(C))
    located = np.exp(log_C[at[:, 0]] + share * step[at[:, 0]])
    return np.where(crosses, located, np.where(behind[:, -1], np.inf, 0.0))


def _nearest(C: np.ndarray, value: float) -> int:
    return int(np.abs(np.log(C / value)).argmin())
