"""What does quality cost when it is served? Structures by their loss and by what a conversation of R turns costs.

command    lab run multi_turn && lab report multi_turn
           python -m sweeps.studies.multi_turn runs/multi_turn --out docs/studies
cost       `lab plan` says it; not run yet
expected   docs/studies/README.md says what was found, once it was run

A bidirectional input is read again at each turn, a causal one is extended. prefix_lm_turns is between them: inputs see all of
their own turn and earlier ones (options.turn; arXiv 2408.00539), so that earlier turns' keys and values stay.
"""

import argparse
import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from analysis.plots import COLOURS, MARKERS, save, style
from analysis.report import VERDICT
from lab import cost, plan_file, serving_cost, spec
from lab.spec import Data, Options, Run
from sweeps.scale import SCALES
from sweeps.study import Study, arm

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
        name="multi_turn",
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
    """Of each arm at each budget, the size nearest to its iso-FLOP minimum: its loss and what R turns cost, R = 1 .. TURNS."""
    runs: dict[tuple[str, float], list[Run]] = {}
    for row in plan_file.read(directory)["runs"]:
        runs.setdefault((row["arm"], row["budget"]), []).append(spec.from_json(row["run"]))
    rows = []
    for found in json.loads((directory / VERDICT).read_text(encoding="utf-8"))["minima"]:
        if "N" not in found:
            continue  # refused, which the report says
        of = runs[found["arm"], found["budget"]]
        run = min(of, key=lambda r: abs(_body(r) / found["N"] - 1))
        turns = serving_cost.conversation(
            run.structure, run.shape, run.options, run.V, turns=TURNS, user=USER, reply=REPLY, convention="exact"
        )
        flops = 0
        for number, turn in enumerate(turns, 1):
            flops += turn.prefill + turn.decode
            rows.append({"arm": found["arm"], "budget": found["budget"], "D": run.shape.D, "loss": found["loss"],
                         "turns": number, "flops": flops, "cache_bytes": turn.cache_bytes})  # fmt: skip
    if not rows:
        raise ValueError(
            f"{directory}: no arm has an iso-FLOP minimum, so that no size can be priced: its report says why"
        )
    return rows


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


def main(directory: Path, out: Path) -> None:
    rows = served(directory)
    out.mkdir(parents=True, exist_ok=True)
    with (out / "multi_turn.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    save(figure(rows), out / "multi_turn.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/multi_turn"))
    given = parser.parse_args()
    main(given.directory, given.out)
