"""The figures of a fit's page, in the look of plots.py. Each function makes one matplotlib Figure, or None where the table
does not carry it; no global state is used.

Letters: b draws, g points of a grid.
"""

# pandas' own annotations lose the type of a column; its errors are not this file's.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from analysis.fit_answer import FitAnswer
from analysis.fit_derived import ARMS
from analysis.fit_evidence import Evidence
from analysis.frame import compact
from analysis.isoflop import budgets
from analysis.optimum import Optimum
from analysis.plots import BASELINE, COLOURS, MARKERS, count, log_ticks, style
from analysis.resample import Draws
from analysis.uncertainty import Profile

BUDGET_TOLERANCE = 0.06  # C of published tables is often read off a figure
_PANELS = 6
_MANY = 2000  # points above which they are drawn as one image, since a page holds every one as a shape
_BEYOND = 10.0  # how far past the largest compute curves go


def headline(found: FitAnswer) -> Figure:
    """Loss against compute with bands, and contours of L(N, D) with the runs; predicted against observed for other laws."""
    columns = set(found.fit.law.columns)
    with style():
        if columns not in ({"N", "D"}, {"C"}):
            figure = Figure(figsize=(6.2, 4.6), layout="constrained")
            _predicted(figure.subplots(), found)
            return figure
        contours = columns == {"N", "D"} and not found.fit.law.by_arm
        figure = Figure(figsize=(9.6, 4.4) if contours else (7.6, 4.4), layout="constrained")
        panels = figure.subplots(1, 2 if contours else 1, squeeze=False)[0]
        _curve(panels[0], found)
        if contours:
            _contours(figure, panels[1], found)
    return figure


def _arms(found: FitAnswer) -> tuple[str, ...]:
    return found.fit.arms[:ARMS] if found.fit.law.by_arm else ("",)


def _look(found: FitAnswer, arm: str) -> tuple[str, str]:
    if not arm:
        return COLOURS[0], "o"
    index = found.fit.arms.index(arm)
    return BASELINE if index == 0 else (COLOURS[(index - 1) % len(COLOURS)], MARKERS[(index - 1) % len(MARKERS)])


def _rows(found: FitAnswer, arm: str) -> np.ndarray:
    if not arm:
        return np.ones(len(found.table), bool)
    return (found.table[found.arm].astype(str) == arm).to_numpy()


def _points(axes: Axes, x: Any, y: Any, **look: Any) -> None:
    look = {"s": 13, "linewidths": 0.3, "edgecolors": "white", **look}
    axes.scatter(x, y, rasterized=len(x) > _MANY, **look)


def _bands(axes: Axes, x_g: np.ndarray, draws: Draws, at: dict[str, Any], colour: str, *, labelled: bool) -> None:
    """95% of new runs and of the mean curve. One residual is drawn for each draw, so that the band is as smooth as the law."""
    mean_bg = draws.predict(**at)
    first = {name: value[:1] for name, value in at.items()}
    scatter_b1 = draws.predict_new_run(**first) / draws.predict(**first)
    for loss_bg, alpha, name in (
        (mean_bg * scatter_b1, 0.10, "95%, a new run"),
        (mean_bg, 0.28, "95%, the mean curve"),
    ):
        low, high = np.nanquantile(loss_bg, [0.025, 0.975], axis=0)
        axes.fill_between(x_g, low, high, color=colour, alpha=alpha, linewidth=0, label=name if labelled else None)


def _curve(axes: Axes, found: FitAnswer) -> None:
    """The law at the compute-optimal size (or in C itself): mean-curve and new-run bands, dashed beyond the data."""
    table, fit = found.table, found.fit
    C_n = table["C"].to_numpy(float)
    C_g = np.geomspace(C_n.min(), _BEYOND * C_n.max(), 90)
    inside = C_g <= C_n.max()
    for arm in _arms(found):
        colour, marker = _look(found, arm)
        rows = _rows(found, arm)
        _points(
            axes,
            C_n[rows],
            table["loss"].to_numpy()[rows],
            color=colour,
            marker=marker,
            alpha=0.45,
            label=arm or "runs",
        )
        at: dict[str, Any] = {"C": C_g}
        if fit.law.columns != ("C",):
            optimum = found.optima.get(arm)
            if not isinstance(optimum, Optimum):
                continue
            at = {"N": optimum.N_at(C_g).value, "D": optimum.D_at(C_g).value}
        if arm:
            at["arm"] = np.full(len(C_g), arm)
        mean_g = fit.predict(**at)
        if isinstance(found.draws, Draws):
            _bands(axes, C_g, found.draws, at, colour, labelled=not arm)
        axes.plot(C_g[inside], mean_g[inside], color=colour, label=None if arm else "the law")
        axes.plot(C_g[~inside], mean_g[~inside], color=colour, linestyle="--", label=None if arm else "extrapolated")
    axes.axvline(C_n.max(), color="#777777", linewidth=0.8, linestyle=":")
    _log_axis(axes, "x")
    axes.set_xlabel("training FLOPs")
    axes.set_ylabel("loss (nats)")
    what = "Loss against compute" if fit.law.columns == ("C",) else "Loss at the best size of each budget"
    axes.set_title(what, loc="left")
    axes.legend(fontsize=8, loc="upper right")


def _contours(figure: Figure, axes: Axes, found: FitAnswer) -> None:
    """Lines of equal loss, the runs coloured by what the law leaves of them, and the best size of each budget."""
    table, fit = found.table, found.fit
    N_n, D_n = table["N"].to_numpy(float), table["D"].to_numpy(float)
    N_g, D_g = (np.geomspace(value.min() / 1.5, value.max() * 1.5, 70) for value in (N_n, D_n))
    loss_gg = fit.predict(N=N_g[None, :], D=D_g[:, None])
    # As many levels between as below the middle: most of a log-log plane lies at low losses.
    levels = np.unique(np.round(np.quantile(loss_gg, np.linspace(0.03, 0.97, 9)), 2))
    if len(levels) > 1:
        lines = axes.contour(N_g, D_g, loss_gg, levels=levels, colors="#8a9099", linewidths=0.8)
        axes.clabel(lines, fontsize=7.5, fmt="%.2f")
    residual_n = 100 * fit.residuals()
    # The scale is that of most runs: one outlier would wash out the rest.
    end = float(max(np.quantile(np.abs(residual_n), 0.95), 1e-6))
    drawn = axes.scatter(N_n, D_n, c=residual_n, cmap="RdBu_r", vmin=-end, vmax=end, s=18, linewidths=0.4,
                         edgecolors="#333333", rasterized=len(N_n) > _MANY)  # fmt: skip
    bar = figure.colorbar(drawn, ax=axes, shrink=0.8, pad=0.02, extend="both")
    bar.set_label("observed over fitted (%)", fontsize=8.5)
    bar.outline.set_visible(False)
    optimum = found.optima.get("")
    if isinstance(optimum, Optimum):
        C_g = np.geomspace(table["C"].min(), table["C"].max(), 40)
        axes.plot(
            optimum.N_at(C_g).value, optimum.D_at(C_g).value, color=COLOURS[1], label="best N, D at equal compute"
        )
        axes.legend(fontsize=8, loc="lower right", frameon=True, framealpha=0.9, edgecolor="none")
    axes.set_xlim(N_g[0], N_g[-1])
    axes.set_ylim(D_g[0], D_g[-1])
    for side, name in (("x", "parameters N"), ("y", "tokens D")):
        _log_axis(axes, side, sizes=True)
        getattr(axes, f"set_{side}label")(name)
    axes.grid(False)
    axes.set_title("Lines of equal loss, and the runs", loc="left")


def _predicted(axes: Axes, found: FitAnswer) -> None:
    observed_n = np.exp(found.fit.data.log_loss_n)
    fitted_n = np.exp(found.fit.data.log_loss_n - found.fit.residuals())
    ends = [min(observed_n.min(), fitted_n.min()), max(observed_n.max(), fitted_n.max())]
    axes.plot(ends, ends, color="#777777", linewidth=1.0)
    for arm in _arms(found):
        rows, (colour, marker) = _rows(found, arm), _look(found, arm)
        _points(axes, fitted_n[rows], observed_n[rows], color=colour, marker=marker, alpha=0.7, label=arm or "runs")
    axes.set_xlabel("fitted loss (nats)")
    axes.set_ylabel("observed loss (nats)")
    axes.set_title("Observed against fitted", loc="left")
    axes.legend(fontsize=8)


def isoflops(found: FitAnswer) -> Figure | None:
    """One panel for each budget at which several sizes were run: the runs and the law at that compute."""
    table, fit = found.table, found.fit
    if set(fit.law.columns) != {"N", "D"} or len(table) > _MANY * 10:
        return None
    C_n, N_n = table["C"].to_numpy(float), table["N"].to_numpy(float)
    group_n = budgets(C_n, BUDGET_TOLERANCE)
    sizes = {g: len(np.unique(np.round(np.log(N_n[group_n == g]), 3))) for g in range(group_n.max() + 1)}
    chosen = [g for g, many in sizes.items() if many >= 4]
    if len(chosen) < 2:
        return None
    if len(chosen) > _PANELS:  # spread over compute, the first and the last among them
        chosen = [chosen[i] for i in np.unique(np.linspace(0, len(chosen) - 1, _PANELS).round().astype(int))]
    columns = 3 if len(chosen) > 4 or len(chosen) == 3 else 2
    lines = -(-len(chosen) // columns)
    with style():
        figure = Figure(figsize=(3.15 * columns, 2.75 * lines + 0.4), layout="constrained")
        panels = list(figure.subplots(lines, columns, squeeze=False).flat)
        for axes, group in zip(panels, chosen, strict=False):
            here = group_n == group
            C = float(np.exp(np.log(C_n[here]).mean()))
            N_g = np.geomspace(N_n[here].min() / 1.15, N_n[here].max() * 1.15, 60)
            for arm in _arms(found):
                colour, marker = _look(found, arm)
                rows = here & _rows(found, arm)
                at: dict[str, Any] = {"N": N_g, "D": C / (found.cost * N_g)}
                if arm:
                    at["arm"] = np.full(len(N_g), arm)
                if isinstance(found.draws, Draws):
                    _bands(axes, N_g, found.draws, at, colour, labelled=False)
                axes.plot(N_g, fit.predict(**at), color=colour)
                _points(axes, N_n[rows], table["loss"].to_numpy()[rows], color=colour, marker=marker, s=20, label=arm)
            axes.set_xscale("log")
            log_ticks(axes, N_n[here].min(), N_n[here].max())
            axes.set_title(f"{compact(C)} FLOPs", loc="left")
        for axes in panels[len(chosen) :]:
            axes.set_visible(False)
        for axes in panels[::columns]:
            axes.set_ylabel("loss (nats)")
        for axes in panels[max(0, len(chosen) - columns) : len(chosen)]:
            axes.set_xlabel("parameters N")
        if found.fit.law.by_arm:
            handles, labels = panels[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside upper center", ncols=min(5, len(labels)))
    return figure


def residuals(found: FitAnswer) -> Figure:
    """What the law leaves of every run, in the order of the table and by each column: structure is misfit, not noise."""
    fit = found.fit
    residual_n = 100 * fit.residuals()
    x = {"run": np.arange(1, len(residual_n) + 1), **dict(fit.data.raw)}
    if "C" in found.table and "C" not in x:
        x["C"] = found.table["C"].to_numpy(float)
    names = {"run": "run, in the order of the table", "N": "parameters N", "D": "tokens D", "C": "FLOPs C"}
    with style():
        columns = 2 if len(x) > 1 else 1
        lines = -(-len(x) // columns)
        figure = Figure(figsize=(9.6, 2.1 * lines + 0.3), layout="constrained")
        panels = list(figure.subplots(lines, columns, squeeze=False, sharey=True).flat)
        for axes, (name, values) in zip(panels, x.items(), strict=False):
            axes.axhspan(-100 * fit.rms, 100 * fit.rms, color="#000000", alpha=0.06, linewidth=0)
            axes.axhline(0.0, color="#333333", linewidth=0.9)
            for arm in _arms(found):
                rows, (colour, marker) = _rows(found, arm), _look(found, arm)
                _points(axes, values[rows], residual_n[rows], color=colour, marker=marker, alpha=0.75, label=arm)
            if name != "run":
                _log_axis(axes, "x", sizes=name != "C")
            axes.set_xlabel(names.get(name, name))
            axes.margins(x=0.03)
        for axes in panels[len(x) :]:
            axes.set_visible(False)
        for axes in panels[::columns]:
            axes.set_ylabel("observed over fitted (%)")
        if fit.law.by_arm:
            handles, labels = panels[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside upper center", ncols=min(6, len(labels)))
    return figure


def profiles(evidence: Evidence) -> Figure | None:
    """How much worse the best fit becomes with one parameter held: where the curve stays below the line, that side is
    open."""
    curves = [one for one in evidence.profiles.values() if isinstance(one, Profile)]
    if not curves:
        return None
    columns = min(5 if len(curves) == 5 else 4 if len(curves) == 4 else 3, len(curves))
    lines = -(-len(curves) // columns)
    with style():
        figure = Figure(figsize=(9.6, 2.3 * lines), layout="constrained")
        panels = list(figure.subplots(lines, columns, squeeze=False).flat)
        for axes, one in zip(panels, curves, strict=False):
            top = 3 * one.threshold
            shown = one.statistic_m < 4 * top
            low = one.low if one.low is not None else one.value_m[0]
            high = one.high if one.high is not None else one.value_m[-1]
            axes.axvspan(low, high, color=COLOURS[0], alpha=0.12, linewidth=0)
            axes.axhline(one.threshold, color="#777777", linewidth=0.9, linestyle="--")
            axes.plot(one.value_m[shown], one.statistic_m[shown], color=COLOURS[0], marker="o", markersize=2.5)
            axes.axvline(one.estimate, color="#333333", linewidth=0.9)
            axes.set_ylim(0, top)
            opened = [side for side, end in (("below", one.low), ("above", one.high)) if end is None]
            axes.set_title(one.name + (f" (open {' and '.join(opened)})" if opened else ""), loc="left")
            near = one.value_m[one.statistic_m <= top]
            if len(near) > 1:
                axes.set_xlim(near.min(), near.max())
            if len(near) > 1 and near.min() > 0 and near.max() / near.min() > 20:
                axes.set_xscale("log")
                _log_axis(axes, "x", most=3)
            else:
                axes.locator_params(axis="x", nbins=4)
        for axes in panels[len(curves) :]:
            axes.set_visible(False)
        for axes in panels[::columns]:
            axes.set_ylabel("rise of the objective (F)")
    return figure


def _log_axis(axes: Axes, side: str, *, sizes: bool = False, most: int = 6) -> None:
    """Decades, or 1, 2 and 5 where there are few; whole words for sizes (70M, 1.4B)."""
    getattr(axes, f"set_{side}scale")("log")
    axis = axes.xaxis if side == "x" else axes.yaxis
    low, high = axis.get_view_interval()
    decades = np.log10(high / low)
    steps = (1.0,) if decades > 2.2 else (1.0, 3.0) if decades > 1.2 else (1.0, 2.0, 5.0)
    ticks = [10.0**p * s for p in range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1) for s in steps]
    ticks = [tick for tick in ticks if low <= tick <= high]
    ticks = ticks[:: max(1, -(-len(ticks) // most))]
    if len(ticks) > 1:
        axis.set_major_locator(FixedLocator(ticks))
    else:
        axis.set_major_locator(LogLocator(numticks=5))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(lambda value, _: count(value) if sizes and value < 1e12 else compact(value)))
