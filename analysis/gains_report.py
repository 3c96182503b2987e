"""The page of a study that asks whether arms train faster, as HTML, JSON, CSV and plain text. What is said is gains.py's."""

# pandas' own annotations lose the type of a column; its errors are not this file's.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import csv
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from analysis import page, plots
from analysis.compare import ALPHA
from analysis.frame import compact
from analysis.gain import Gain
from analysis.gains import Claim, Gains, analyse
from analysis.report import NOT_IN_TABLE, PAGE, SUMMARY, TABLE, VERDICT, how_made, plain, run_rows
from lab import records

CLAIMS = "claims.csv"
COLUMNS = ("arm", "baseline", "budget", "kind", "seeds", "diverged", "difference", "low", "high", "p", "p_holm", "gain",
           "gain_low", "gain_high", "extrapolated", "detectable", "detectable_gain", "seeds_needed")  # fmt: skip

CLAIM_HEADS = ("arm", "budget", "verdict", "gain", "95% interval", "detectable", "p (Holm)")


def report(study_dir: str | Path, out: str | Path | None = None) -> Path:
    """As analysis.report: writes report.html, verdict.json, claims.csv, summary.txt, runs.csv and gains.png, and returns the
    page's path. Raises ValueError for what the guards refuse."""
    answer = analyse(study_dir)
    directory = Path(out) if out is not None else Path(study_dir)
    directory.mkdir(parents=True, exist_ok=True)
    answer.frame.drop(columns=NOT_IN_TABLE).to_csv(directory / TABLE, index=False)
    records.write_json(directory / VERDICT, verdict_json(answer))
    write_claims(answer, directory / CLAIMS)
    (directory / SUMMARY).write_text(text(answer) + "\n", encoding="utf-8")
    drawn = figure(answer)
    plots.save(drawn, directory / "gains.png")
    path = directory / PAGE
    path.write_text(render(answer, drawn), encoding="utf-8")
    return path


def write_claims(answer: Gains, path: Path) -> None:
    """One row a claim, as CSV."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(row(claim) for claim in answer.claims.values())


def text(answer: Gains) -> str:
    """Headlines first: every arm at the largest budget; then each claim in a line, controls, and what guards found."""
    lines = [f"{answer.study['name']}: {answer.study['question']}", ""]
    for baseline in answer.baselines:
        lines += [f"against {baseline}"]
        for arm in (arm for arm in answer.arms if answer.headline(arm).baseline == baseline):
            claim = answer.headline(arm)
            lines += [f"  [{claim.kind}] {label(answer, arm)}{claim.sentence}", f"      {trend(answer, arm)}"]
        lines += [""]
    table = [CLAIM_HEADS, *(claim_cells(claim) for claim in answer.claims.values())]
    widths = [max(len(line[i]) for line in table) for i in range(len(CLAIM_HEADS))]
    lines += ["  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)) for line in table]
    lines += ["", *(f"- {finding.guard}: {finding.reason}" for finding in answer.findings)]
    lines += [f"- {note}" for note in answer.study.get("notes", []) if note not in {f.reason for f in answer.findings}]
    return "\n".join(lines)


def label(answer: Gains, arm: str) -> str:
    """What is special about an arm, before its sentence."""
    if arm in answer.controls:
        factor = answer.controls[arm]
        planted = "the baseline once more" if factor == 1 else f"the baseline at {factor:g} times the budget"
        return f"(control: {planted}) "
    return "(ablation: not all of its cost is charged) " if arm in answer.free else ""


def trend(answer: Gains, arm: str) -> str:
    found = answer.trends[arm]
    return getattr(found, "reason", None) or str(found)


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:+.1f}%"


def _least(claim: Claim) -> str:
    if claim.detectable is None:
        return ""
    return f"{claim.detectable:.2g} nats" if claim.detectable_gain is None else f"{100 * claim.detectable_gain:.1f}%"


def claim_cells(claim: Claim) -> tuple[str, ...]:
    gain = claim.gain
    interval = ""
    if isinstance(gain, Gain):
        interval = " to ".join("open" if end is None else percent(end - 1) for end in (gain.low, gain.high))
    return (
        claim.arm,
        compact(claim.budget),
        claim.kind,
        percent(claim.value),
        interval,
        _least(claim),
        "" if claim.p_holm is None else f"{claim.p_holm:.2g}",
    )


def row(claim: Claim) -> dict[str, Any]:
    """Of claims.csv: gains are shares of the budget."""
    gain = claim.gain if isinstance(claim.gain, Gain) else None
    ends = {f"gain_{end}": getattr(gain, end, None) for end in ("low", "high")}
    ends = {name: None if value is None else value - 1 for name, value in ends.items()}
    kept = {name: getattr(claim, name) for name in COLUMNS if hasattr(claim, name)}
    return {**kept, "gain": claim.value, **ends, "extrapolated": gain.extrapolated if gain else None}


def verdict_json(answer: Gains) -> dict[str, Any]:
    """The answer for machines; numbers that do not exist are null."""
    return {
        "schema": records.SCHEMA,
        "study": answer.study["name"],
        "margin": answer.margin,
        "claims": [{**plain(claim), "value": claim.value} for claim in answer.claims.values()],
        "trends": {arm: plain(found) for arm, found in answer.trends.items()},
        "overheads": [plain(one) for one in answer.overheads.values()],
        "controls": dict(answer.controls),
        "free": list(answer.free),
        "findings": [plain(finding) for finding in answer.findings],
        "runs": answer.frame.drop_duplicates("run_id")["status"].value_counts().to_dict(),
    }


def figure(answer: Gains) -> Figure:
    """A panel for each baseline: the gain of each arm with its interval at each budget, on a log scale of budgets needed. Arms
    named family/arm, as their baselines are, look alike in all panels."""
    panels = answer.baselines
    names = list(dict.fromkeys(_short(arm, answer.headline(arm).baseline) for arm in answer.arms))
    handles = {}
    with plots.style():
        made = Figure(figsize=(1.8 + 4.2 * max(1, len(panels)), 4.2), layout="constrained")
        for axis, baseline in zip(made.subplots(1, max(1, len(panels)), squeeze=False).flat, panels, strict=True):
            arms = [arm for arm in answer.arms if answer.headline(arm).baseline == baseline]
            for index, arm in enumerate(arms):
                points = [c for c in answer.of(arm) if c.value is not None and c.value > -1]
                if not points:
                    continue
                shift, place = 1.03 ** (index - len(arms) / 2), names.index(_short(arm, baseline))
                x, y = [c.budget * shift for c in points], np.array([1 + (c.value or 0.0) for c in points])
                ends = np.array([[_end(c, "low", v), _end(c, "high", v)] for c, v in zip(points, y, strict=True)])
                handles[names[place]] = axis.errorbar(
                    x, y, np.abs(ends.T - y), capsize=2, lw=1, ms=4.5,
                    color=plots.COLOURS[place % len(plots.COLOURS)],
                    marker=plots.MARKERS[place // len(plots.COLOURS) % len(plots.MARKERS)],
                )  # fmt: skip
            axis.axhline(1, color="black", lw=0.8)
            axis.axhline(1 + answer.margin, color="black", lw=0.6, ls=":")
            axis.set(xscale="log", yscale="log", title=f"against {baseline}", xlabel="budget")
            axis.set_xticks(budgets := sorted({c.budget for c in answer.claims.values()}), list(map(compact, budgets)))
            axis.xaxis.set_minor_locator(NullLocator())
            low, high = axis.get_ylim()
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5) if high / low > 10 else tuple(range(1, 10))))
            axis.yaxis.set_minor_locator(NullLocator())
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        made.axes[0].set_ylabel("budget the baseline needs, as a share")
        if handles:
            shown = [name for name in names if name in handles]
            made.legend([handles[name] for name in shown], shown, loc="outside right center")
    return made


def _short(arm: str, baseline: str) -> str:
    """An arm's name within its baseline's family."""
    family, slash, _ = baseline.rpartition("/")
    return arm.removeprefix(family + slash)


def _end(claim: Claim, which: str, value: float) -> float:
    """Of the interval; an open one is drawn to twice or half of its value."""
    end = getattr(claim.gain, which) if isinstance(claim.gain, Gain) else value
    return end if end is not None else value * (2 if which == "high" else 0.5)


def render(answer: Gains, drawn: Figure) -> str:
    """The page: one file without references to anything outside of it."""
    largest = {arm: answer.headline(arm) for arm in answer.arms}
    return page.render(
        "gains.html",
        {"gains": drawn},
        words={"percent": percent, "label": lambda arm: label(answer, arm), "trend": lambda arm: trend(answer, arm),
               "cells": claim_cells, "compact": compact},
        title=answer.study["name"],
        answer=answer,
        study=answer.study,
        largest=largest,
        alpha=ALPHA,
        notes=[n for n in answer.study.get("notes", []) if n not in {f.reason for f in answer.findings}],
        runs=run_rows(answer.frame),
        facts=how_made(answer.frame, answer.study["baseline"]),
    )  # fmt: skip
