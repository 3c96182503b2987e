"""The answer of a study of gains as files that a repository keeps: a page of Markdown, claims and runs as CSV, the figure."""

# pandas' own annotations lose the type of a column; its errors are not this file's.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from analysis import plots
from analysis.frame import compact
from analysis.gains import Claim, Gains, analyse
from analysis.gains_report import CLAIM_HEADS, claim_cells, figure, label, percent, trend, write_claims
from analysis.markdown import BUDGET_HEADS, RUN_COLUMNS, budget_rows, table
from analysis.report import how_made
from lab.plan_file import matched_on


def publish(study_dir: str | Path, out: str | Path) -> Path:
    """Writes <name>.md, <name>.csv, <name>-claims.csv and <name>.png into `out`; returns the page's path."""
    answer, directory = analyse(study_dir), Path(out)
    directory.mkdir(parents=True, exist_ok=True)
    name = answer.study["name"]
    answer.frame[list(RUN_COLUMNS)].to_csv(directory / f"{name}.csv", index=False)
    write_claims(answer, directory / f"{name}-claims.csv")
    plots.save(figure(answer), directory / f"{name}.png")
    page = directory / f"{name}.md"
    page.write_text(text(answer), encoding="utf-8")
    return page


def text(answer: Gains) -> str:
    """The page: question, plan, verdicts, every claim, what is known of the instrument, what guards found, what was used."""
    study, name = answer.study, answer.study["name"]
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
        f"Matched on {matched_on(study['match'])}: no run is further than "
        f"{answer.frame['residual'].abs().max():.2%} from its budget. A gain of {answer.margin:.0%} of the budget matters.",
        "",
        *table((_budget(study["match"]), *BUDGET_HEADS[1:]), budget_rows(answer.frame)),
        "",
        f"All runs: [{name}.csv]({name}.csv); all claims: [{name}-claims.csv]({name}-claims.csv).",
        "",
        *(line for baseline in answer.baselines for line in _verdicts(answer, baseline)),
        "## Gain and budget",
        "",
        f"![How much of its budget the baseline needs for the loss of each arm]({name}.png)",
        "",
        *table((*CLAIM_HEADS, "nats", "95% interval", "seeds", "steps", "charged", "seconds"), _claims(answer)),
        "",
        "Gain: how much more of its budget the baseline needs for the same loss. Detectable: what this design finds with 80% "
        f"power after Holm's correction over {sum(c.p_holm is not None for c in answer.claims.values())} comparisons. At the "
        "largest budget gains, and what is detectable, ruled out or needed, are read off the baseline's last segment continued: "
        "its loss flattens, so that true gains are larger than they read. Steps: what the budget bought, of the baseline's. "
        "Charged: what a step costs more in the budget's accounting; seconds: what it took more on the device, beside whatever "
        "else ran there.",
        "",
        *_controls(answer),
        "## What the guards found",
        "",
        *([f"- {found.guard}: {found.reason}" for found in answer.findings] or ["Nothing."]),
        *(f"- {note}" for note in study.get("notes", []) if note not in {found.reason for found in answer.findings}),
        "",
        "## What was used",
        "",
        *table(("", ""), how_made(answer.frame, study["baseline"])),
        "",
    ]
    return "\n".join(lines)


def _budget(match: Mapping[str, Any]) -> str:
    return "budget, reference seconds" if match["quantity"] == "reference_seconds" else BUDGET_HEADS[0]


def _verdicts(answer: Gains, baseline: str) -> Iterator[str]:
    yield from (f"## Against {baseline}, at the largest budget", "")
    for arm in answer.arms:
        claim = answer.headline(arm)
        if claim.baseline == baseline:
            yield f"- **{claim.kind}**: {label(answer, arm)}{claim.sentence} {trend(answer, arm)}"
    yield ""


def _claims(answer: Gains) -> Iterable[Sequence[str]]:
    for key, claim in answer.claims.items():
        over = answer.overheads.get(key)
        spent = ("", "", "") if over is None else (f"{over.steps:.3f}", percent(over.charged), percent(over.seconds))
        yield (*claim_cells(claim), *_nats(claim), *spent)


def _nats(claim: Claim) -> tuple[str, str, str]:
    found = "" if claim.difference is None else f"{claim.difference:+.4f}"
    interval = "" if claim.low is None else f"{claim.low:+.4f} to {claim.high:+.4f}"
    return found, interval, f"{claim.seeds}" + (f", {claim.diverged} diverged" if claim.diverged else "")


def _controls(answer: Gains) -> Iterator[str]:
    if answer.controls:
        yield from ("## What the instrument says of a known truth", "")
        for arm, factor in answer.controls.items():
            said = "; ".join(
                f"{claim.kind} {percent(claim.value)} at {compact(claim.budget)}" for claim in answer.of(arm)
            )
            yield f"- {arm}, planted {percent(factor - 1)}: {said}"
        yield ""
