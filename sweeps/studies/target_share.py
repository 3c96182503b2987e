"""Who gains where inputs are long and targets short, and who in the reverse? One total, several shares of targets.

command    for what in 1-16 1-4 1-2 3-4 15-16 docstring body
           do lab run target_share --preset small-$what && lab report target_share-$what; done
           python -m sweeps.studies.target_share runs/target_share-* --out docs/studies
           shares that are run another time are added to those that the table has
           numbers: of 128 bytes of text, so much are targets; names: pairs cut from Python source, code ->
           first sentence of its docstring (long -> short), signature and docstring -> body (short -> long)
cost       small-1-2: 2.3e13 FLOPs in 108 runs; planned 8 minutes on 2 CPU cores, measured 16 on slower ones; the others are
           alike and not run yet
expected   docs/studies/target_share.md

Losses of different shares are of different things and are never compared: each share is a comparison of its own, and what
is set beside each other is the difference between structures.
"""

import argparse
import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from analysis.markdown import table
from analysis.plots import COLOURS, MARKERS, save, style
from analysis.report import VERDICT
from lab import plan_file
from lab.data.pairs import pairs_objective
from lab.spec import Data, Evaluation, Objective
from sweeps.grid import target_share
from sweeps.scale import SCALES
from sweeps.study import Study, arm, corpus

CSV = "target_share.csv"
COLUMNS = ("arm", "budget", "value", "low", "high", "p_holm", "detectable")
ARMS = ("decoder_only", "prefix_lm", "encoder_decoder")
SHARES = ("1-16", "1-4", "1-2", "3-4", "15-16")
# Of pairs: their corpus, and the lengths of their buckets.
PAIRS = {
    "docstring": dict(corpus="python_docstrings", inputs=(128, 256), targets=(32, 64)),
    "body": dict(corpus="python_bodies", inputs=(64, 128), targets=(128, 256)),
}
PRESETS = {
    **{size: (size, "1-2") for size in SCALES},
    **{f"{size}-{share}": (size, share) for size in SCALES for share in SHARES},
    **{f"{size}-{pairs}": (size, pairs) for size in ("small", "gpu") for pairs in PAIRS},
}


def study(preset: str = "small", data: Data | None = None) -> Study:
    size, what = PRESETS[preset]
    scale = SCALES[size]
    if what in PAIRS:
        pairs, scale = PAIRS[what], replace(scale, batch=scale.batch // 2)  # pairs are up to three times as long
        data = data or corpus(pairs["corpus"], allow_repeat=True)  # Python's own library has few: 4 to 17 epochs
        objective = pairs_objective(data, inputs=pairs["inputs"], targets=pairs["targets"])
        question = f"Which structure suits {what}s, written from Python source?"
    else:
        data = data or scale.corpus()
        S, T = target_share(scale.text, Fraction(*map(int, what.split("-"))))
        objective = Objective(S=S, T=T)
        question = f"Which structure pays where {T} of {S + T} tokens are targets?"
    scored = Evaluation(examples=128 if what in PAIRS else 512)
    return Study(
        name=f"target_share-{what}",
        question=question,
        arms={
            name: arm(name, data, objective=objective, evaluation=scored, precision=scale.precision) for name in ARMS
        },
        baseline="decoder_only",
        sizes=scale.sizes(),
        rules={name: name for name in ARMS} if scale.tuned else {},  # tuned on halves of a text
        **scale.study,
    )


def main(directories: list[Path], out: Path) -> None:
    """Differences of all shares to decoder_only, by budget, into target_share.md, .csv and .png. Shares that `out` has from
    earlier, and that are not given, stay."""
    rows: list[dict[str, Any]] = []
    for directory in directories:
        what = plan_file.read(directory)["study"]["name"].removeprefix("target_share-")
        for found in json.loads((directory / VERDICT).read_text(encoding="utf-8"))["differences"]:
            rows.append({"panel": what, **{key: found.get(key) for key in COLUMNS}})
    out.mkdir(parents=True, exist_ok=True)
    given = {row["panel"] for row in rows}
    rows += [row for row in earlier(out / CSV) if row["panel"] not in given]
    if missing := [row["panel"] for row in rows if row["value"] is None]:
        print(f"no difference could be made in {', '.join(dict.fromkeys(missing))}: see the reports there")
    order = [*SHARES, *PAIRS]  # of text of one's own "1-2-novels"
    rows.sort(key=lambda row: (next(i for i, what in enumerate(order) if row["panel"].startswith(what)), row["panel"],
                               row["arm"], row["budget"]))  # fmt: skip
    with (out / CSV).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["panel", *COLUMNS], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    save(figure(rows), out / "target_share.png")
    (out / "target_share.md").write_text(page(rows), encoding="utf-8")


def earlier(path: Path) -> list[dict[str, Any]]:
    """The rows of a table that `main` wrote."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    texts = ("panel", "arm")
    return [{key: text if key in texts else float(text) if text else None for key, text in row.items()} for row in rows]


def page(rows: Sequence[Mapping[str, Any]]) -> str:
    def said(row: Mapping[str, Any] | None) -> str:
        if row is None or row["value"] is None:
            return "not known"
        return f"{row['value']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f}), p {row['p_holm']:.2g}"

    of = {(row["panel"], row["arm"], row["budget"]): row for row in rows}
    panels, arms, budgets = (sorted({key[i] for key in of}, key=[key[i] for key in of].index) for i in range(3))
    budgets.sort()
    lines = [
        (f"[{panel}](target_share-{panel}.md)", arm, *(said(of.get((panel, arm, budget))) for budget in budgets))
        for panel in panels for arm in arms
    ]  # fmt: skip
    return "\n".join([
        "# target_share: long inputs and short targets against the reverse",
        "",
        f"Each structure's loss less {ARMS[0]}'s, nats a target, with its 95% interval, and p after Holm's correction within its "
        "page. Shares are of a text's tokens that are targets; losses of different shares are of different things, and are not "
        "compared. docstring and body are pairs cut from Python source.",
        "",
        *table(("share of targets, or pairs", "arm", *(f"{budget:.3g} FLOPs" for budget in budgets)), lines),
        "",
        f"As a table: [{CSV}]({CSV}).",
        "",
        "![Differences by share](target_share.png)",
        "",
    ])  # fmt: skip


def figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """A panel for each arm: its difference to the baseline at each share of targets, a line for each budget."""
    known = [row for row in rows if row["value"] is not None]
    arms, panels = (list(dict.fromkeys(row[key] for row in known)) for key in ("arm", "panel"))
    budgets = sorted({row["budget"] for row in known})
    with style():
        made = Figure(figsize=(4.8 * max(1, len(arms)), 3.8), layout="constrained")
        for axis, arm_ in zip(made.subplots(1, max(1, len(arms)), sharey=True, squeeze=False).flat, arms, strict=False):
            for index, budget in enumerate(budgets):
                points = [row for row in known if (row["arm"], row["budget"]) == (arm_, budget)]
                places = [panels.index(row["panel"]) + 0.12 * (index - len(budgets) / 2) for row in points]
                errors = [[row["value"] - row["low"] for row in points], [row["high"] - row["value"] for row in points]]
                look = dict(color=COLOURS[index % len(COLOURS)], marker=MARKERS[index % len(MARKERS)], ls="", capsize=2)
                axis.errorbar(places, [row["value"] for row in points], errors, label=f"{budget:.2g} FLOPs", **look)
            axis.axhline(0, color="black", lw=0.8)
            axis.set_xticks(range(len(panels)), [panel.replace("-", "/") for panel in panels])
            axis.set(
                title=arm_, xlabel="share of the tokens that are targets; pairs", ylabel=f"loss less {ARMS[0]}'s, nats"
            )
        made.axes[0].legend()
    return made


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("directories", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/target_share"))
    given = parser.parse_args()
    main(given.directories, given.out)
