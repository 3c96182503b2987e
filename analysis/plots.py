"""The figures of a report. Each function makes one matplotlib Figure from an Answer; no global state is used.

Colours are Okabe and Ito's, told apart with any colour vision; every arm also has its own marker. An arm has the same
colour and marker in every figure.
"""

# pandas' own annotations lose the type of a column; its errors are not this file's.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, MultipleLocator, NullLocator
from scipy import stats

from analysis.answer import Answer
from analysis.compare import Difference
from analysis.fit import Fit
from analysis.frame import compact, finished
from analysis.isoflop import SIZE, Minimum
from analysis.noise import Noise
from analysis.outlook import Outlook

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F3C8D", "#8C6D31")
MARKERS = ("s", "^", "D", "v", "P", "X", "<", ">")
BASELINE = ("#333333", "o")
STYLE = {
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.labelsize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "svg.hashsalt": "bitterlab",
    "svg.fonttype": "path",
}


def svg(figure: Figure) -> str:
    """One <svg> element for an HTML page, the same for the same figure."""
    buffer = io.StringIO()
    with style():
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Type": None, "Format": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    return re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)


def save(figure: Figure, path: str | Path) -> None:
    """Writes .png, .svg or .pdf, by the name's ending."""
    with style():
        figure.savefig(Path(path), dpi=160)


@contextmanager
def style() -> Iterator[None]:
    with matplotlib.rc_context(STYLE):
        yield


def _look(answer: Answer, arm: str) -> dict[str, Any]:
    if arm == answer.baseline:
        colour, marker = BASELINE
    else:
        index = answer.others.index(arm)
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
    return {"color": colour, "marker": marker, "markersize": 5.5}


def _line(answer: Answer, arm: str) -> dict[str, Any]:
    return {"color": _look(answer, arm)["color"]}


def headline(answer: Answer) -> Figure:
    """Best loss against compute, and its difference to the baseline with 95% intervals."""
    with style():
        figure = Figure(figsize=(9.4, 4.1), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
        t = _t(answer)
        for arm in answer.arms:
            points = [m for (name, _), m in answer.minima.items() if name == arm and isinstance(m, Minimum)]
            if points:
                C, loss = [m.budget for m in points], [m.loss for m in points]
                error = [t * answer.noise.sd * m.per_noise if isinstance(answer.noise, Noise) else 0.0 for m in points]
                left.errorbar(C, loss, yerr=error, label=arm, capsize=2, **_look(answer, arm))
            else:
                left.plot([], [], label=f"{arm} (no minimum)", linestyle="none", **_look(answer, arm))
        _compute_axis(left, answer)
        left.set_ylabel("best loss (nats per target token)")
        left.set_title("Best loss at each budget", loc="left")
        _differences(right, answer)
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=min(4, len(labels)))
    return figure


def _differences(axes: Axes, answer: Answer) -> None:
    budgets = np.array(answer.budgets)
    axes.axhline(0.0, **_line(answer, answer.baseline))
    logs = np.log(np.sort(budgets))
    # Beside each other about their budget, and never as far as the next one's.
    steps = max(len(answer.others) - 1, 1)
    step = min(0.035 * np.ptp(logs), 0.7 * np.diff(logs).min() / steps) if len(budgets) > 1 else 0.035
    in_range = (answer.compute >= budgets.min()) & (answer.compute <= budgets.max())
    for index, arm in enumerate(answer.others):
        if arm in answer.gaps and in_range.sum() > 1:
            low, middle, high = answer.gaps[arm][:, in_range]
            colour = _line(answer, arm)["color"]
            axes.fill_between(answer.compute[in_range], low, high, color=colour, alpha=0.14, linewidth=0)
            axes.plot(answer.compute[in_range], middle, color=colour, linewidth=1.0, linestyle="--")
        points = [v for (name, _), v in answer.differences.items() if name == arm and isinstance(v, Difference)]
        shift = np.exp(step * (index - (len(answer.others) - 1) / 2))
        for point in points:
            look = _look(answer, arm)
            # An empty marker is not a comparison of minima.
            face = look["color"] if point.basis.startswith("iso") else "white"
            axes.errorbar(
                [point.budget * shift],
                [point.value],
                yerr=[[point.value - point.low], [point.high - point.value]],
                capsize=2.5,
                markerfacecolor=face,
                **look,
            )
    _compute_axis(axes, answer, around=step * steps / 2)
    axes.set_ylabel(f"loss minus {answer.baseline} (nats; below 0 is better)")
    axes.set_title("Difference at equal FLOPs, 95% intervals", loc="left")
    axes.margins(y=0.16)


def matrix(answer: Answer) -> Figure | None:
    """Every pair of arms at the largest budget: row minus column, coloured where it is resolved."""
    arms = answer.arms
    if len(arms) < 3:
        return None
    with style():
        figure = Figure(figsize=(1.6 + 1.15 * len(arms), 1.0 + 0.62 * len(arms)), layout="constrained")
        axes = figure.subplots()
        for (row, column), value in answer.pairs.items():
            for place, sign in (
                ((arms.index(row), arms.index(column)), 1),
                ((arms.index(column), arms.index(row)), -1),
            ):
                face, said = "#f4f4f4", "refused"
                if isinstance(value, Difference):
                    said = "same runs" if value.same_runs else f"{sign * value.value:+.3f}\np = {_p(value.p_holm)}"
                    if value.resolved and not value.same_runs:
                        face = "#9ecae1" if sign * value.value < 0 else "#fdbe85"
                axes.add_patch(Rectangle((place[1] - 0.5, place[0] - 0.5), 1, 1, facecolor=face, edgecolor="white"))
                axes.text(place[1], place[0], said, ha="center", va="center", fontsize=8)
        axes.set_xlim(-0.5, len(arms) - 0.5)
        axes.set_ylim(len(arms) - 0.5, -0.5)
        axes.set_xticks(range(len(arms)), arms)
        axes.set_yticks(range(len(arms)), arms)
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        axes.grid(visible=False)
        for side in axes.spines.values():
            side.set_visible(False)
    return figure


def _p(value: float) -> str:
    return "< .001" if value < 1e-3 else f"{value:.2g}"


def outlook(answer: Answer) -> Figure | None:
    """Best loss against compute, drawn on beyond the budgets; the upper axis says when the study's largest runs' dollars
    will buy that compute."""
    found = answer.outlook
    if not isinstance(found, Outlook):
        return None
    given = found.curves
    with style():
        figure = Figure(figsize=(9.4, 3.9), layout="constrained")
        axes = figure.subplots()
        for arm in given.arms:
            low, middle, high = np.quantile(given.loss[arm], [0.025, 0.5, 0.975], axis=0)
            colour = _line(answer, arm)["color"]
            axes.fill_between(given.C, low, high, color=colour, alpha=0.13, linewidth=0)
            axes.plot(given.C, middle, color=colour, label=arm)
        axes.axvspan(*given.measured, color="#888888", alpha=0.12, linewidth=0)
        axes.set_xscale("log")
        axes.set_xlabel("training FLOPs (grey: measured)")
        axes.set_ylabel("best loss (nats per target token)")
        inside = (given.measured[0] <= given.C) & (given.measured[1] >= given.C)
        top = max(float(np.median(given.loss[arm][:, inside], axis=0).max()) for arm in given.arms)
        axes.set_ylim(0, 1.15 * top)
        years = axes.secondary_xaxis(
            "top",
            functions=(
                lambda C: found.price.year_of(np.maximum(C, 1e-300), found.dollars),
                lambda year: found.price.flops(found.dollars, year),
            ),
        )
        years.xaxis.set_major_locator(MultipleLocator(5))
        years.xaxis.set_minor_locator(NullLocator())
        years.xaxis.set_major_formatter(FuncFormatter(lambda year, _: f"{year:.0f}"))
        years.set_xlabel("year in which the dollars of today's largest run buy it")
        axes.legend()
    return figure


def isoflops(answer: Answer) -> Figure:
    """One panel for each budget: loss against body parameters, the parabolas and their minima."""
    columns = min(3, len(answer.budgets))
    rows = -(-len(answer.budgets) // columns)
    with style():
        figure = Figure(figsize=(3.15 * max(columns, 2), 3.1 * rows + 0.5), layout="constrained")
        panels = list(figure.subplots(rows, columns, squeeze=False).flat)
        done = finished(answer.frame)
        for axes, budget in zip(panels, answer.budgets, strict=False):
            here = done[done["budget"] == budget]
            for arm in answer.arms:
                cells = here[here["arm"] == arm].groupby(SIZE)["loss"].agg(["mean", "size"])
                if not cells.empty:
                    sd = answer.noise.sd if isinstance(answer.noise, Noise) else 0.0
                    N = np.asarray(cells.index, float)
                    error = sd / np.sqrt(cells["size"].to_numpy(float))
                    look = _look(answer, arm)
                    axes.errorbar(N, cells["mean"], yerr=error, linestyle="none", capsize=2, **look)
                m = answer.minima[arm, budget]
                if isinstance(m, Minimum):
                    N = np.geomspace(*m.N_range, 100)
                    axes.plot(N, m.curve(N), **_line(answer, arm))
                    axes.plot(
                        [m.N], [m.loss], "*", color=_line(answer, arm)["color"], markersize=12, markeredgecolor="white"
                    )
            axes.set_title(f"{compact(budget)} FLOPs", loc="left")
            axes.set_xscale("log")
            if not here.empty:
                log_ticks(axes, here[SIZE].min(), here[SIZE].max())
            axes.set_xlabel("body parameters")
        for axes in panels[len(answer.budgets) :]:
            axes.set_visible(False)
        panels[0].set_ylabel("loss (nats per target token)")
        for arm in answer.arms:
            panels[0].plot([], [], label=arm, **_look(answer, arm))
        panels[0].plot([], [], "*", color="#777777", markersize=10, linestyle="none", label="minimum")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=min(5, len(labels)))
    return figure


def residuals(answer: Answer, law: Fit) -> Figure:
    """What the shared law leaves of every run, by arm and budget: structure here is misfit, not noise."""
    rows = finished(answer.frame).assign(residual=100 * law.residuals()).sort_values(["budget", SIZE, "replicate"])
    with style():
        figure = Figure(figsize=(9.4, 3.0), layout="constrained")
        axes = figure.subplots()
        if isinstance(answer.noise, Noise):
            width = 100 * answer.noise.sd / float(rows["loss"].mean())
            axes.axhspan(-2 * width, 2 * width, color="#000000", alpha=0.06, linewidth=0)
            axes.text(
                0.995, 2 * width, "± 2 sd of seeds ", transform=axes.get_yaxis_transform(), ha="right", va="bottom",
                fontsize=8.5, color="#555555",
            )  # fmt: skip
        at, ticks, names = 0, [], []
        for arm in answer.arms:
            mine = rows[rows["arm"] == arm]
            if mine.empty:
                continue
            x = at + np.arange(len(mine))
            axes.vlines(x, 0, mine["residual"], color=_line(answer, arm)["color"], linewidth=1, alpha=0.5)
            axes.plot(x, mine["residual"], linestyle="none", **_look(answer, arm))
            ticks.append(x.mean())
            names.append(arm)
            at += len(mine) + 2
        axes.axhline(0, color="#333333", linewidth=0.8)
        axes.set_xticks(ticks, names)
        axes.grid(visible=False, axis="x")
        axes.tick_params(axis="x", length=0)
        axes.set_ylabel("observed over fitted (%)")
        axes.set_title("Residuals of the shared law; within an arm by budget, then size", loc="left")
        axes.margins(y=0.2)
    return figure


def positions(answer: Answer) -> Figure | None:
    """Loss at each target position, of each arm's best run at the largest budget; None where no run has finished
    there."""
    done = finished(answer.frame)
    done = done[done["budget"] == max(answer.budgets)]
    if done.empty:
        return None
    with style():
        figure = Figure(figsize=(9.4, 3.3), layout="constrained")
        axes = figure.subplots()
        for arm in answer.arms:
            mine = done[done["arm"] == arm]
            if mine.empty:
                continue
            size = mine.groupby(SIZE)["loss"].mean().idxmin()
            curves = np.array(mine.loc[mine[SIZE] == size, "loss_per_position"].tolist(), float)
            mean = curves.mean(axis=0)
            look = {**_look(answer, arm), "markersize": 3.5}
            label = f"{arm} ({count(float(size))} body parameters)"
            axes.plot(np.arange(1, len(mean) + 1), mean, label=label, markevery=max(1, len(mean) // 16), **look)
        axes.set_xlabel("target position")
        axes.set_ylabel("loss (nats)")
        axes.set_title(
            f"Loss by target position at {compact(max(answer.budgets))} FLOPs, best size of each arm", loc="left"
        )
        axes.legend(loc="upper right", ncols=2, fontsize=8.5)
        axes.margins(x=0.02)
    return figure


def _t(answer: Answer) -> float:
    return float(stats.t.ppf(0.975, answer.noise.dof)) if isinstance(answer.noise, Noise) else 0.0


def _compute_axis(axes: Axes, answer: Answer, *, around: float = 0.0) -> None:
    """around: how far from its budget, in log, something is drawn."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(list(answer.budgets)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
    axes.set_xlabel("training FLOPs")
    first, last = min(answer.budgets), max(answer.budgets)
    pad = (last / first) ** 0.09 if last > first else 1.5
    pad = max(pad, (last / first) ** 0.03 * np.exp(around))
    axes.set_xlim(first / pad, last * pad)


def log_ticks(axes: Axes, low: float, high: float) -> None:
    """Three to five round numbers, few enough never to touch."""
    decades = [10.0**power for power in range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)]
    steps = (1, 2, 5) if high / low < 20 else (1, 3) if high / low < 200 else (1,)
    ticks = [decade * step for decade in decades for step in steps if low * 0.8 <= decade * step <= high * 1.25]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))


def count(value: float) -> str:
    for scale, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:.3g}{unit}"
    return f"{value:.3g}"
