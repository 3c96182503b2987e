"""Commands on what has not been run: forecast, design."""

# pandas' own annotations lose the type of a column; its errors are not this file's.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console
from rich.table import Table

from analysis.refusal import Refused

# `lab --help` need not wait for pandas.
if TYPE_CHECKING:
    import pandas as pd

    from sweeps.cli.sources import Source

Name = Annotated[str, tyro.conf.Positional]


def forecast(
    table: Name,
    /,
    arms: tuple[str, ...] = (),
    dollars: float = 1e6,
    law: str | None = None,
    shared: tuple[str, ...] = (),
    columns: str = "",
    where: str = "",
    dollars_per_hour: float = 2.5,
    peak_flops: float = 989e12,
    utilisation: float = 0.4,
    price_year: float = 2026.3,
    tenfold_years: float = 5.0,
    reach: float = 1e4,
    resolved: float = 0.95,
    method: str | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> None:
    """Say in which year an arm with less structure wins at a budget in dollars, or why that can not be said.

    Example: lab forecast runs/quickstart --arms encoder_decoder decoder_only --dollars 1e-4 --shared E
    Example: lab forecast runs.csv --arms dense moe --dollars 1e7 --columns N=params,D=tokens,arm=router

    Args:
        table: a study's directory, or a CSV, parquet or JSON-lines file of runs
        arms: two or more, from more to less structure (default: a study's, in the order of the ladder of structures)
        dollars: what one run may cost
        law: of N and D, or of C (default: chinchilla where there are N and D, else power_law_with_asymptote)
        shared: parameters that all arms have in common (default: none; without E, exponents or both apart nothing crosses)
        columns: what the file calls them, such as N=params,D=tokens,loss=eval_loss,arm=router,run=id
        where: keep the rows where this holds, such as "D > 1e9"
        dollars_per_hour: of one accelerator (default: H100, about its usual price on demand in April 2026)
        peak_flops: of that accelerator, a second (default: H100, dense bf16)
        utilisation: the share of the peak that training reaches
        price_year: when that was its price
        tenfold_years: in which compute gets ten times cheaper (Chung 2024: five)
        reach: how far beyond the largest measured budget to look, as a factor
        resolved: share of the draws in which the arm must win, else the answer is refused
        method: of drawing parameters: jackknife, bootstrap, wild or sandwich (default: the one that covers best)
        draws: of the fitted parameters
        seed: of the draws
    """
    from analysis import forecast as years
    from analysis.curves import curves
    from sweeps.cli.sources import arms_of, cost_of, drawn, read

    console = Console(highlight=False)
    source = read(table, columns, where)
    chosen = arms_of(source.runs, arms)
    found = drawn(source, chosen, law, shared, method, draws, seed, console)
    given = curves(found, arms=chosen, measured=source.measured, reach=reach, flops_per_token=cost_of(source, chosen))
    price = years.Price.of_accelerator(
        dollars_per_hour=dollars_per_hour,
        peak_flops=peak_flops,
        utilisation=utilisation,
        year=price_year,
        tenfold_years=tenfold_years,
    )
    answers = years.forecasts(given, dollars=dollars, price=price, resolved=resolved)
    for (more, less), answer in answers.items():
        said = f"{more} to {less}: refused: {answer.reason}." if isinstance(answer, Refused) else str(answer)
        console.print(said, soft_wrap=True, markup=False)
    located = {pair: answer for pair, answer in answers.items() if not isinstance(answer, Refused)}
    if located:
        shown = Table("has won by", *(f"{less} over {more}" for more, less in located), box=None, pad_edge=False)
        for year in _years(price_year, [end for a in located.values() for end in (a.low, a.year, a.high) if end]):
            shown.add_row(str(year), *(f"{answer.won_by(year):.0%}" for answer in located.values()))
        console.print(shown)


def _years(price_year: float, ends: Sequence[float]) -> list[int]:
    """About a dozen, around when it is decided and the price's own year."""
    first, last = min([price_year, *ends]) - 1, max([price_year + 20, *ends]) + 1
    step = next(step for step in (1, 2, 5, 10, 20, 50, 10**6) if last - first <= 12 * step)
    return list(range(math.floor(first / step) * step, math.ceil(last / step) * step + 1, step))


def design(
    table: Annotated[str | None, tyro.conf.Positional] = None,
    /,
    arms: tuple[str, ...] = (),
    law: str | None = None,
    shared: tuple[str, ...] = (),
    columns: str = "",
    where: str = "",
    target: Literal["crossing", "difference", "loss"] = "crossing",
    at: float | None = None,
    budget_flops: float | None = None,
    runs: int = 12,
    repeats: int = 2,
    write: bool = False,
    study: str | None = None,
    truth: str = "",
    budgets: tuple[float, ...] = (),
    sizes: int = 5,
    within: float = 4.0,
    replicates: int = 1,
    noise: float | None = None,
    gap: float = 0.01,
    out: Path | None = None,
    method: str | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> None:
    """Before a study: what its grid would tell. After it: the next runs that tell most per FLOP.

    With --truth losses are simulated on the grid (--budgets, or the runs of a plan or table) and refitted: standard errors,
    bias, power. Without, runs that are done are fitted, and further ones are chosen; --write adds them to a study's plan.

    Example: lab design --truth E=1.82,A=478,B=2143,alpha=.347,beta=.367 --budgets 1e18 3e18 1e19 3e19 1e20 --noise 0.005
    Example: lab design runs/quickstart --arms encoder_decoder decoder_only --shared E --budget-flops 5e12

    Args:
        table: a study's directory, or a CSV, parquet or JSON-lines file of runs
        arms: from more to less structure; runs are proposed for the first two (default: all of a study's)
        law: as in lab forecast
        shared: parameters that all arms have in common
        columns: what the file calls them, such as N=params,D=tokens,loss=eval_loss,arm=router,run=id
        where: keep the rows where this holds
        target: what to know better: where two arms cross, their difference, or the best loss of one
        at: FLOPs at which a difference or a loss is wanted (default: the largest measured budget)
        budget_flops: what the next runs may cost together (default: as much as the runs so far)
        runs: at most this many
        repeats: at most this many of the same, with different seeds
        write: add the proposed runs to the study's plan
        study: the study's name or file, where the plan does not say it any more
        truth: the law's parameters from which to simulate
        budgets: of a planned iso-FLOP grid, FLOPs
        sizes: of that grid, at each budget
        within: how far they reach to either side of the best size, as a factor
        replicates: of every run of that grid
        noise: standard deviation of one run's loss, nats (default after a study: the fit's scatter)
        gap: the difference of two arms to be found, as a share of the loss
        out: write the table as CSV
        method: of drawing parameters, as in lab forecast
        draws: simulations, or draws of the fitted parameters
        seed: of the draws
    """
    from sweeps.cli.sources import arms_of, read

    console = Console(highlight=False)
    if truth or budgets or table is None:
        found = _before(table, arms, columns, where, law or "chinchilla", truth, budgets, sizes, within, replicates, noise, gap,
                        draws, seed, console)  # fmt: skip
    else:
        source = read(table, columns, where)
        if source.runs.empty:
            raise ValueError(f"{table}: no run has a loss yet; --truth E=...,A=...,... simulates them")
        found = _after(source, arms_of(source.runs, arms, least=1 if target == "loss" else 2), law, shared, target, at,
                       budget_flops, runs, repeats, noise, within, write, study, method, draws, seed, console)  # fmt: skip
    if out is not None:
        found.to_csv(out, index=False)
        console.print(f"table: {out}")


def _before(
    table: str | None, arms: Sequence[str], columns: str, where: str, law: str, truth: str, budgets: Sequence[float],
    sizes: int, within: float, replicates: int, noise: float | None, gap: float, draws: int, seed: int, console: Console,
) -> "pd.DataFrame":  # fmt: skip
    from analysis.design import isoflop_grid, power, recovery
    from sweeps.cli.sources import arms_of, pairs_of, read

    if not truth:
        raise ValueError(
            "truth = '': give the law's parameters to simulate from, such as --truth E=1.8,A=480,B=2100,..."
        )
    if noise is None:
        raise ValueError(
            "noise is not given: it is the standard deviation of one run's loss, in nats, such as --noise 0.005"
        )
    values = {name: _number(name, value) for name, value in pairs_of(truth, "truth").items()}
    if budgets:
        grid = isoflop_grid(law, values, budgets, sizes=sizes, within=within, replicates=replicates)
    elif table is None:
        raise ValueError("there is no grid: give --budgets, or a table or a plan's directory")
    else:
        grid = read(table, columns, where).grid
    both = grid
    if "arm" in grid:
        named = arms_of(grid, arms, least=1)[:2]
        both = grid[grid["arm"].isin(named)] if len(named) == 2 else grid.drop(columns="arm")
        grid = grid[grid["arm"] == named[0]]
    with console.status(f"{draws} simulated studies of {len(grid)} runs"):
        found = recovery(law, values, grid, noise, draws=draws, seed=seed)
        told = power(law, values, both, noise, gap=gap, draws=draws, seed=seed)
    console.print(_plain(found.table, 4))
    console.print(str(found), soft_wrap=True, markup=False)
    console.print(f"Two arms: {told}", soft_wrap=True, markup=False)
    return found.table


def _after(
    source: "Source", arms: list[str], law: str | None, shared: Sequence[str], target: str, at: float | None,
    budget_flops: float | None, runs: int, repeats: int, noise: float | None, within: float, write: bool,
    study: str | None, method: str | None, draws: int, seed: int, console: Console,
) -> "pd.DataFrame":  # fmt: skip
    import numpy as np

    from analysis import proposal
    from analysis.curves import curves, optimum
    from sweeps import propose
    from sweeps.cli.sources import cost_of, drawn, flops

    if write and source.directory is None:
        raise ValueError(
            "write: only a study's directory has a plan to which runs can be added; --out writes the table"
        )
    arms = arms[:1] if target == "loss" else arms[:2]
    found = drawn(source, arms, law, shared, method, draws, seed, console)
    cost = cost_of(source, arms)
    top = at or (source.measured or (0.0, float((flops(source.runs)).max())))[1]
    if target == "loss":
        wanted = proposal.loss_target(found, top, arm=arms[0], flops_per_token=cost[arms[0]])
    else:
        given = curves(found, arms=arms, measured=source.measured, flops_per_token=cost)
        wanted = (
            proposal.crossing_target(given, *arms)
            if target == "crossing" and at is None
            else proposal.difference_target(given, *arms, C=top)
        )
    made, asked = None, []
    if source.directory is not None and {"N", "D"} <= set(found.law.columns):
        made = propose.study_of(source.directory, study)
        cells, left_out = propose.cells(made)
        keep = cells["arm"].isin(arms)
        for arm in arms:
            rows = cells["arm"] == arm
            point = {name: np.asarray(value)[None] for name, value in found.fit.params.items()}
            best = optimum(found.law, point, cells.loc[rows, "flops"], arms=found.fit.arms, arm=arm,
                           flops_per_token=cost[arm])[1][0]  # fmt: skip
            keep[rows] &= np.abs(np.log(cells.loc[rows, "N"].to_numpy() / best)) <= np.log(within)
        candidates = cells[keep]
        console.print(
            f"{len(candidates)} cells within a factor {within:g} of the best size are considered; {len(left_out)} can not be run"
        )
        if candidates.empty:
            raise ValueError(f"within = {within:g}: no cell of the study lies so near to the best size; raise --within")
    else:
        candidates = proposal.candidate_runs(found, within=within, flops_per_token=cost)
    spent = float(flops(source.runs.drop_duplicates("run")).sum())
    chosen = proposal.propose(
        found, candidates, target=wanted, budget_flops=budget_flops or spent, runs=runs, repeats=repeats,
        noise=None if noise is None else noise / float(source.runs["loss"].median()),
    )  # fmt: skip
    table = chosen.table
    if made is not None and source.directory is not None:
        asked = propose.runs(made, table, propose.read(source.directory).runs)
        table = table.assign(run_id=[one.row.run_id for one in asked], replicate=[one.row.replicate for one in asked])
    console.print(
        _plain(
            table.drop(columns=["budget", "residual", "run_id"], errors="ignore").rename(columns={"replicate": "seed"})
        )
    )
    console.print(str(chosen), soft_wrap=True, markup=False)
    if made is not None and source.directory is not None:
        off = max(abs(one.off_budget) for one in asked), max(abs(one.off_N) for one in asked)
        console.print(
            f"their cost is within {off[0]:.2%} of their budgets, their sizes within {off[1]:.2%} of those asked for"
        )
        if write:
            note = f"{len(asked)} runs were added to learn {chosen.target}"
            plan = propose.extended(source.directory, made, [one.row for one in asked], note)
            console.print(
                f"{propose.write(source.directory, plan)}; train them with: lab run {source.directory}", soft_wrap=True
            )
        else:
            console.print("--write adds these runs to the study's plan", soft_wrap=True)
    return table


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"truth: {name} = {text!r} is not a number") from None


def _plain(frame: "pd.DataFrame", digits: int = 3) -> Table:
    shown = Table(*map(str, frame.columns), box=None, pad_edge=False)
    for row in frame.itertuples(index=False):
        shown.add_row(*(f"{value:.{digits}g}" if isinstance(value, float) else str(value) for value in row))
    return shown
