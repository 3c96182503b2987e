"""A study's answer as files that a repository keeps: a page of Markdown, its runs as CSV, its figures as PNG."""

# pandas' own annotations lose the type of a column; its errors are not this file's.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis import compare, noise, plots
from analysis.frame import compact
from analysis.isoflop import minima
from analysis.noise import Noise
from analysis.report import asks_gains, differences_table, facts, steps_table
from lab.plan_file import matched_on

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import pandas as pd

    from analysis.answer import Answer

RUN_COLUMNS = ("arm", "budget", "rung", "D", "L", "parameters_body", "seed_init", "seed_data", "learning_rate", "status", "loss",
               "bits_per_byte", "flops_exact", "residual", "tokens_seen", "epochs", "seconds", "run_id")  # fmt: skip

BUDGET_HEADS = ("budget, FLOPs", "runs", "seeds of a cell", "widths", "tokens")


def publish(study_dir: str | Path, out: str | Path) -> Path:
    """Writes <name>.md, <name>.csv, <name>.png and <name>-isoflops.png into `out`; returns the page's path. Raises ValueError
    for records that can not be read. A study of gains has a page of another kind (analysis.gains_markdown)."""
    from analysis.answer import analyse

    if asks_gains(study_dir):
        from analysis import gains_markdown

        return gains_markdown.publish(study_dir, out)
    answer, directory = analyse(study_dir), Path(out)
    directory.mkdir(parents=True, exist_ok=True)
    name = answer.study["name"]
    answer.frame[list(RUN_COLUMNS)].to_csv(directory / f"{name}.csv", index=False)
    plots.save(plots.headline(answer), directory / f"{name}.png")
    plots.save(plots.isoflops(answer), directory / f"{name}-isoflops.png")
    page = directory / f"{name}.md"
    page.write_text(text(answer), encoding="utf-8")
    return page


def text(answer: Answer) -> str:
    """The page: question, plan, verdicts with intervals, what would change them, what was used."""
    study, name = answer.study, answer.study["name"]
    heads, *rows = differences_table(answer)
    columns = [key for key in heads if key != "basis"]
    seen = f"{answer.noise}" if isinstance(answer.noise, Noise) else answer.noise.reason
    lines = [
        f"# {name}",
        "",
        study["question"],
        "",
        f"    {study['command']}",
        "",
        "## Plan",
        "",
        *table(("arm", "what it is"), study["arms"].items()),
        "",
        f"Baseline: {answer.baseline}. Matched on {matched_on(study['match'])}: no run is "
        f"further than {answer.frame['residual'].abs().max():.2%} from its budget.",
        "",
        *table(BUDGET_HEADS, budget_rows(answer.frame)),
        "",
        f"All runs: [{name}.csv]({name}.csv).",
        "",
        "## Verdicts",
        "",
        *(line for verdict in answer.verdicts for line in _verdict(verdict)),
        "",
        f"![Best loss against compute, and differences to {answer.baseline}]({name}.png)",
        "",
        *table(tuple(heads[key] for key in columns), ([row[key] for key in columns] for row in rows)),
        "",
        *_steps(answer),
        f"Noise: {seen}. A difference that is smaller than `detectable` is missed more often than once in five times.",
        "",
        f"![Loss against size at each budget]({name}-isoflops.png)",
        "",
        "## What would change this",
        "",
        *(f"- {line}" for line in (*_without_the_largest(answer), *_choices(answer), *answer.caveats)),
        "",
        "## What was used",
        "",
        *table(("", ""), facts(answer)),
        "",
    ]
    return "\n".join(lines)


def _steps(answer: Answer) -> Iterable[str]:
    if answer.steps:
        heads, *rows = steps_table(answer)
        yield from ("## One thing at a time", "", "Arms that are alike but for one thing: the second less the first, nats, and "
                    "its 95% interval; p after Holm's correction over this table.", "")  # fmt: skip
        yield from table(heads, rows)
        yield ""


def budget_rows(frame: pd.DataFrame) -> Iterable[Sequence[str]]:
    """What was run at each budget (BUDGET_HEADS)."""
    for budget, rows in frame.groupby("budget"):
        seeds = rows.groupby(["arm", "rung"]).size()
        widths = ", ".join(str(D) for D in sorted(rows["D"].unique()))
        tokens = f"{rows['tokens_seen'].min():.2g} to {rows['tokens_seen'].max():.2g}"
        yield compact(float(str(budget))), str(len(rows)), _span(seeds.min(), seeds.max()), widths, tokens


def _span(low: int, high: int) -> str:
    return str(low) if low == high else f"{low} to {high}"


def _verdict(verdict: compare.Verdict) -> Iterable[str]:
    yield f"- **{_named(verdict.kind, verdict.arm, verdict.baseline)}**: {verdict.sentence}" + (
        f" {verdict.detail}" if verdict.detail else ""
    )


def _named(kind: str, arm: str, baseline: str) -> str:
    return {"A better": f"{arm} better", "B better": f"{baseline} better"}.get(kind, kind)


def _without_the_largest(answer: Answer) -> Iterable[str]:
    """Whether each verdict is the same at all budgets but the largest."""
    frame = answer.frame
    if len(answer.budgets) < 2:
        yield "There is one budget: nothing says how the verdicts move with compute."
        return
    less = frame[frame["budget"] < answer.budgets[-1]]
    less.attrs = frame.attrs
    found = minima(less)
    seeds = noise.seed_noise(less)
    judged = seeds if isinstance(seeds, Noise) else noise.scatter(found)
    compared = compare.differences(less, found, judged)
    before = {arm: compare.verdict(arm, answer.baseline, compared).kind for arm in answer.others}
    moved = [
        (arm, before[arm], v.kind)
        for arm, v in zip(answer.others, answer.verdicts, strict=True)
        if before[arm] != v.kind
    ]
    if not moved:
        yield "Left out the largest budget, every verdict is the same."
    for arm, earlier, now in moved:
        was, became = (_named(kind, arm, answer.baseline) for kind in (earlier, now))
        yield f"Left out the largest budget, the verdict on {arm} is *{was}* instead of *{became}*: it is not stable."


def _choices(answer: Answer) -> Iterable[str]:
    for row in answer.sensitivity:
        if row.changes:
            yield f"Under another choice, {row.choice}: {row.arm} {row.value:+.2g} nats ({row.reads})."


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """A table's lines."""
    lines = [heads, ["---"] * len(heads), *rows]
    return [
        "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines
    ]
