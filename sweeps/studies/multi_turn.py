"""What does quality cost when it is served? Structures by their loss and by what a conversation of R turns costs.

command    lab run multi_turn && lab report multi_turn
           python -m sweeps.studies.multi_turn runs/multi_turn --out docs/studies
cost       small: 3.0e13 FLOPs in 144 runs; planned 10 minutes on 2 CPU cores, measured 17 on cores shared with other work
           gpu and full: plans, `lab plan` says what they cost
expected   docs/studies/multi_turn.md, docs/studies/multi_turn-serving.md

A bidirectional input is read again at each turn, a causal one is extended. prefix_lm_turns is between them: inputs see all of
their own turn and earlier ones (options.turn; arXiv 2408.00539), so that earlier turns' keys and values stay.
"""

import argparse
import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from analysis.markdown import table
from analysis.plots import COLOURS, MARKERS, save, style
from analysis.report import VERDICT
from lab import cost, plan_file, serving_cost, spec
from lab.spec import Data, Options, Run
from sweeps.scale import SCALES
from sweeps.study import Study, arm

NAME, SERVING = "multi_turn", "multi_turn-serving"
TURN = 16
PRESETS = SCALES
TURNS, USER, REPLY = 8, 32, 16  # of the conversation that is priced, in tokens


def study(preset: str = "small", data: Data | None = None) -> Study:
    scale = PRESETS[preset]
    data = data or scale.corpus()
    settings: dict[str, Any] = scale.halves | {
        "S": 3 * scale.text // 4,
        "T": scale.text // 4,
    }  # what is said, and what is answered
    return Study(
        name=NAME,
        question="Which structure gives the best quality for what a conversation costs?",
        arms={
            "encoder_decoder": arm("encoder_decoder", data, **settings),
            "prefix_lm": arm("prefix_lm", data, **settings),
            "prefix_lm_turns": arm("prefix_lm", data, options=Options(turn=TURN), **settings),
            "decoder_only": arm("decoder_only", data, **settings),
        },
        baseline="decoder_only",
        sizes=scale.sizes(),
        rules={"prefix_lm_turns": "prefix_lm"} if scale.tuned else {},
        **scale.study,
    )


def served(directory: Path) -> list[dict[str, Any]]:
    """Of each arm at each budget its iso-FLOP minimum: loss, body parameters N, and what 1 .. TURNS turns cost there, between
    the sizes that were run a power of N."""
    runs: dict[tuple[str, float], list[Run]] = {}
    for row in plan_file.read(directory)["runs"]:
        runs.setdefault((row["arm"], row["budget"]), []).append(spec.from_json(row["run"]))
    rows = []
    for found in json.loads((directory / VERDICT).read_text(encoding="utf-8"))["minima"]:
        if "N" not in found:
            continue  # refused, which the report says
        shapes = {run.shape: run for run in runs[found["arm"], found["budget"]]}
        priced = {_body(run): priced_turns(run) for run in sorted(shapes.values(), key=_body)}
        at = [np.interp(np.log(found["N"]), np.log(list(priced)), np.log(of_sizes))
              for of_sizes in np.transpose(list(priced.values()), (1, 2, 0)).reshape(2 * TURNS, -1)]  # fmt: skip
        for number, (flops, cache_bytes) in enumerate(np.exp(at).reshape(TURNS, 2), 1):
            rows.append({"arm": found["arm"], "budget": found["budget"], "N": found["N"], "loss": found["loss"],
                         "turns": number, "flops": float(flops), "cache_bytes": float(cache_bytes)})  # fmt: skip
    if not rows:
        raise ValueError(
            f"{directory}: no arm has an iso-FLOP minimum, so that no size can be priced: its report says why"
        )
    return rows


def priced_turns(run: Run) -> list[tuple[float, float]]:
    """Of the first 1 .. TURNS turns: exact FLOPs of all of them, and bytes that the caches have grown to."""
    turns = serving_cost.conversation(
        run.structure, run.shape, run.options, run.V, turns=TURNS, user=USER, reply=REPLY, convention="exact"
    )
    flops = np.cumsum([turn.prefill + turn.decode for turn in turns])
    return [(float(spent), float(turn.cache_bytes)) for spent, turn in zip(flops, turns, strict=True)]


def _body(run: Run) -> int:
    return cost.parameters(run.structure, run.shape, run.options, run.objective, run.V).body


def figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Loss against the FLOPs of a conversation, for one turn and for all of them; an arm's points are its budgets."""
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    with style():
        made = Figure(figsize=(9.6, 3.8), layout="constrained")
        for axis, turns in zip(made.subplots(1, 2, sharey=True), (1, TURNS), strict=True):
            for index, name in enumerate(arms):
                points = [row for row in rows if (row["arm"], row["turns"]) == (name, turns)]
                axis.plot([p["flops"] for p in points], [p["loss"] for p in points], color=COLOURS[index],
                          marker=MARKERS[index], label=name)  # fmt: skip
            axis.set_xscale("log")
            axis.set(title=f"{turns} turn{'s' if turns > 1 else ''}", xlabel="exact FLOPs of the conversation",
                     ylabel="loss, nats a target")  # fmt: skip
        made.axes[0].legend()
    return made


def page(rows: Sequence[Mapping[str, Any]]) -> str:
    of = {(row["arm"], row["budget"], row["turns"]): row for row in rows}
    heads = (
        "arm",
        "training FLOPs",
        "N",
        "loss",
        "FLOPs of 1 turn",
        f"of {TURNS} turns",
        f"bytes of caches after {TURNS}",
    )
    lines = [
        (arm, f"{budget:.3g}", f"{row['N']:,.0f}", f"{row['loss']:.4f}", f"{of[arm, budget, 1]['flops']:.3g}",
         f"{row['flops']:.3g}", f"{row['cache_bytes']:,.0f}")
        for (arm, budget, turns), row in of.items() if turns == TURNS
    ]  # fmt: skip
    return "\n".join([
        f"# {NAME}: what a conversation costs",
        "",
        f"Each arm's iso-FLOP minimum at each budget ([{NAME}.md]({NAME}.md) has its uncertainty), and what it costs to serve "
        f"there: conversations of {USER} tokens of user and {REPLY} of reply a turn, greedy decoding from caches, one row, exact "
        "FLOPs. A bidirectional input is read again whenever it grows, a causal one is extended.",
        "",
        *table(heads, lines),
        "",
        f"Every turn: [{SERVING}.csv]({SERVING}.csv).",
        "",
        f"![Loss against the FLOPs of a conversation]({SERVING}.png)",
        "",
    ])  # fmt: skip


def main(directory: Path, out: Path) -> None:
    """Writes multi_turn-serving.md, .csv and .png."""
    rows = served(directory)
    out.mkdir(parents=True, exist_ok=True)
    with (out / f"{SERVING}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    save(figure(rows), out / f"{SERVING}.png")
    (out / f"{SERVING}.md").write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/multi_turn"))
    given = parser.parse_args()
    main(given.directory, given.out)
