"""A study's curves beyond its budgets: Chung's picture of more, less and even less structure against compute, and the
years that it would give.

It is an extrapolation by construction, of laws with exponents by arm and one asymptote, and is refused more often than
not: a study of a few budgets seldom determines exponents.
"""

# pandas' own annotations lose the type of a column; its errors are not this file's.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from collections.abc import Mapping
from dataclasses import dataclass, field

import pandas as pd

from analysis.crossing import COLUMNS
from analysis.curves import Curves, curves, measured_cost
from analysis.fit import Fit, fit_law
from analysis.forecast import Forecast, Price, forecasts
from analysis.frame import for_laws
from analysis.refusal import Refusal, Refused
from analysis.resample import cluster_bootstrap
from analysis.robust import SCATTER

BY_ARM = ("A", "B", "alpha", "beta")  # E is shared: a few budgets do not tell two asymptotes apart
_REACH = 1e4
_DRAWS = 400


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """`forecasts` of every pair of arms (more structure, less) in the study's order, at `dollars` a run: what its largest
    runs cost at `price`."""

    fit: Fit = field(repr=False)
    curves: Curves = field(repr=False)
    forecasts: Mapping[tuple[str, str], Forecast | Refused]
    dollars: float
    price: Price


def outlook(frame: pd.DataFrame) -> Outlook:
    """Raises Refusal where the law does not converge, or where fewer than two arms have runs of their own."""
    rows = for_laws(frame)
    arms = [arm for arm in frame.attrs["study"]["arms"] if (rows["arm"] == arm).any()]
    own = {arm: tuple(sorted(rows.loc[rows["arm"] == arm, "run_id"])) for arm in arms}
    # Arms that are the same runs are one curve.
    distinct = {runs: arm for arm, runs in reversed(own.items())}
    arms = [arm for arm in arms if distinct[own[arm]] == arm]
    if len(arms) < 2:
        raise Refusal("fewer than two arms have finished runs of their own")
    rows = rows[rows["arm"].isin(arms)]
    fit = fit_law("chinchilla", rows, columns=COLUMNS, per_arm=BY_ARM, delta=SCATTER)
    cells = rows["arm"] + "|" + rows["budget"].astype(str) + "|" + rows["rung"].astype(str)
    if not fit.converged:
        raise Refusal(f"the law with exponents by arm is not to be trusted: {fit.status}; add budgets or sizes")
    cost = {
        arm: measured_cost(own_rows[COLUMNS["N"]], own_rows[COLUMNS["D"]], own_rows["flops_exact"])
        for arm, own_rows in rows.groupby("arm", sort=False)
    }
    measured = (float(rows["budget"].min()), float(rows["budget"].max()))
    # Refits, since draws of a covariance know no bound of E, which a few budgets hardly determine.
    drawn = cluster_bootstrap(fit, cells, strata=rows["arm"], draws=_DRAWS)
    given = curves(drawn, arms=arms, measured=measured, reach=_REACH, flops_per_token=cost)
    price = Price.of_accelerator()
    dollars = measured[1] * price.dollars_per_flop
    return Outlook(
        fit=fit,
        curves=given,
        forecasts=forecasts(given, dollars=dollars, price=price),
        dollars=dollars,
        price=price,
    )
