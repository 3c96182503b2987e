"""Commands on trained models, and on what it costs to use one: sample, evaluate, serve-cost."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lab import records, spec
from lab.checks import nearest
from lab.spec import Options
from lab.structure import ALL_TWO_STREAM, LADDER, STRUCTURES, Structure
from sweeps import ladder
from sweeps.cli.runs import Path_, read

BASE = "decoder_only"
WIDTH = 120  # of a table that is not printed to a terminal


def sample(
    run: Path_,
    /,
    prompt: str = "def ",
    tokens: int = 200,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
) -> None:
    """Text from a finished run. The last S tokens of the text are its inputs and T targets follow, then they are taken anew.

    Example: lab sample runs/quickstart/runs/decoder_only-d64-l2-6.40e11flops-0123456789 --prompt "import "
    Example: lab sample RUN --prompt "def " --tokens 400 --temperature 0.8 --top-k 40 --seed 1

    Args:
        run: a run's directory
        prompt: what to continue
        tokens: how many tokens to add
        temperature: 0 takes the likeliest token each time; at 1 tokens are drawn as likely as the model says
        top_k: draw from so many of the likeliest tokens (default: from all)
        seed: another seed, another text
    """
    from lab.data import tokenizer_of
    from lab.generate import Sampling, go_on
    from lab.train import restore_parameters

    sampling = Sampling(temperature=temperature, top_k=top_k, seed=seed)
    content, directory = read(run)
    model, params = restore_parameters(content, directory)
    (text,) = go_on(
        content, model, params, [prompt], tokens=tokens, tokenizer=tokenizer_of(content.data), sampling=sampling
    )
    Console().print(f"[dim]{escape(prompt)}[/]", end="", highlight=False)
    Console(soft_wrap=True).print(text, markup=False, highlight=False)


def evaluate(
    run: Path_,
    /,
    choices: Path | None = None,
    pairs: Path | None = None,
    held_out: int | None = None,
    max_tokens: int | None = None,
) -> None:
    """Put a trained run to a task: choices ranked by their likelihood, or targets written out for their sources.

    Prints a table, and writes evaluation-<the file's name>.json into the run's directory.

    Example: lab evaluate runs/alone --choices questions.jsonl
    Example: lab evaluate runs/alone --pairs translations.jsonl --max-tokens 128
    Example: lab evaluate runs/alone --held-out 200 (of a run on pairs)

    Args:
        run: a run's directory
        choices: JSON lines {"context": text, "choices": [text, ..], "answer": index}
        pairs: JSON lines {"source": text, "target": text}; needs `pip install 'bitterlab[eval]'`
        held_out: so many held-out pairs of the run's own corpus
        max_tokens: of a target that is written out (default: the T targets of the run's objective)
    """
    from lab import downstream
    from lab.data import tokenizer_of
    from lab.train import restore_parameters

    if choices is None and pairs is None and held_out is None:
        raise ValueError("nothing to evaluate: give --choices FILE, --pairs FILE or --held-out COUNT")
    names = [path.stem for path in (choices, pairs) if path] + ["held_out"] * (held_out is not None)
    if len(set(names)) < len(names):
        raise ValueError(f"{', '.join(names)}: two have one name, and so would their results: rename one")
    for name, number in (("max_tokens", max_tokens), ("held_out", held_out)):
        if number is not None and number < 1:
            raise ValueError(f"{name} = {number}: use at least 1")
    # What can be wrong is found before anything is computed.
    content, directory = read(run)
    if content.structure.encoder_only:
        raise ValueError("structure.cross = 'none': encoder-only has no target stream to evaluate")
    questions = downstream.read_questions(choices) if choices else []
    tasks = {}  # pairs, by the name of their results: how they are shown, what says which they were
    if pairs:
        tasks[pairs.stem] = (pairs.name, downstream.digest(pairs), downstream.read_pairs(pairs))
    if held_out:
        tasks["held_out"] = ("held-out pairs", content.data.manifest, downstream.held_out_pairs(content, held_out))
    if tasks:
        downstream.chrf()
    model, params = restore_parameters(content, directory)
    tokenizer, console = tokenizer_of(content.data), Console()
    table = Table("task", "measure", "value", "standard error", box=None, pad_edge=False)

    def write(name: str, shown: str, digest: str, kind: str, summary: dict) -> None:
        head = {"schema": records.SCHEMA, "run_id": content.run_id, "kind": kind, "file": shown, "sha256": digest}
        records.write_json(directory / f"evaluation-{name}.json", head | summary)

    if choices:
        summary = downstream.summarise_choices(
            questions, downstream.rank(model, params, content.objective, questions, tokenizer)
        )
        write(choices.stem, choices.name, downstream.digest(choices), "choices", summary)
        for ranking, share in summary["accuracy"].items():
            table.add_row(choices.name, f"accuracy, {ranking.replace('_', ' ')}", *_share(share))
        table.add_row(choices.name, "accuracy by guessing", f"{summary['guessing']:.1%}", "")
    most = max_tokens or content.objective.T
    for name, (shown, digest, examples) in tasks.items():
        sources = [pair.source for pair in examples]
        written = downstream.write_out(model, params, content.objective, sources, tokenizer, most=most)
        summary = downstream.summarise_pairs(examples, written)
        write(name, shown, digest, "pairs", summary | {"max_tokens": most})
        table.add_row(shown, "exact match", *_share(summary["exact_match"]))
        table.add_row(shown, "chrF", f"{summary['chrf']:.2f}", "")
        table.add_row(shown, f"not ended after {most} tokens", f"{summary['not_ended']} of {summary['pairs']}", "")
    console.print(table)
    for name in names:
        print(directory / f"evaluation-{name}.json")


def _share(share: dict[str, float | None]) -> tuple[str, str]:
    error = share["standard_error"]
    return f"{share['value']:.1%}", "" if error is None else f"{error:.1%}"


def serve_cost(
    D: int = 256,
    L: int = 6,
    V: int = 260,
    K: int | None = None,
    head_width: int = 64,
    turns: int = 5,
    user: int = 64,
    reply: int = 64,
    batch: int = 1,
    precision: Literal["f32", "bf16"] = "f32",
    structures: str | None = None,
    repeats: int = 3,
    out: Path | None = None,
) -> None:
    """What a conversation costs, counted and measured on this device: FLOPs, cache, time to the first token and of each token.

    Inputs that see ahead are read anew at every turn, causal ones are extended. Models are not trained: time does not
    depend on what is said.

    Example: lab serve-cost --D 256 --L 6 --turns 5 --user 64 --reply 64 --out serve
    Example: lab serve-cost --structures encoder_decoder,prefix_lm,separate-separate-final-causal

    Args:
        D: model width
        L: layers of each stream
        V: vocabulary
        K: key-value heads (default: as many as query heads)
        head_width: width of a head
        turns: of the conversation
        user: tokens that the user writes at each turn
        reply: tokens of each reply
        batch: conversations side by side
        precision: of the computation and the cache
        structures: names or dials, separated by commas (default: the ladder); 'all' for all 24
        repeats: measured conversations, after one that is not measured; medians are shown
        out: a directory for serve-cost.csv and serve-cost.png
    """
    import jax

    from lab.conversation import measure

    shape = ladder.shape(D, L, head_width=head_width)
    shape = shape if K is None else spec.Shape(**{**vars(shape), "K": K})
    chosen = _structures(structures)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    with console.status("compiling") as status:
        rows = measure(
            chosen, shape, Options(), V,
            turns=turns, user=user, reply=reply, batch=batch, precision=precision, repeats=repeats,
            on_round=lambda done: status.update(f"{done} of {repeats} conversations with each of {len(chosen)}"),
        )  # fmt: skip
    base = {row.turn: row for row in rows if row.structure == BASE}
    table = Table(box=None, pad_edge=False)
    for heading in ("structure", "turn", "inputs", "read", "GFLOPs", "cache MiB", "first token ms", "a token ms"):
        table.add_column(heading, justify="left" if heading == "structure" else "right", no_wrap=True)
    for row in rows:
        other = base.get(row.turn)
        cells = [row.structure, row.turn, row.inputs, row.read]
        for unit, value in (
            (1e9, lambda r: r.prefill_flops + r.decode_flops),
            (2**20, lambda r: r.cache_bytes),
            (1e-3, lambda r: r.first_token_seconds),
            (1e-3, lambda r: r.token_seconds),
        ):
            own = value(row)
            factor = f" x{own / value(other):<5.2f}" if own and other else ""
            cells.append("" if own is None else f"{own / unit:.3g}{factor}")
        table.add_row(*map(str, cells))
    console.print(table)
    device = jax.local_devices()[0].device_kind
    print(
        f"{device}, {precision}, {batch} side by side; exact FLOPs of reading and reply of one of them, medians of {repeats}"
        + (f"; x: of {BASE}" if base else "")
    )
    if out:
        import pandas as pd

        from analysis import plots, serving_plots

        out.mkdir(parents=True, exist_ok=True)
        frame = pd.DataFrame([asdict(row) for row in rows])
        frame.to_csv(out / "serve-cost.csv", index=False)
        title = f"D = {D}, L = {L}, {user} + {reply} tokens a turn, batch {batch}, {precision}, {device}"
        plots.save(serving_plots.conversation(frame, title), out / "serve-cost.png")
        print(f"{out / 'serve-cost.csv'}\n{out / 'serve-cost.png'}")


def _structures(names: str | None) -> list[Structure]:
    if names is None:
        return [STRUCTURES[name] for name in LADDER]
    if names == "all":
        return list(ALL_TWO_STREAM)
    known = {structure.name: structure for structure in ALL_TWO_STREAM}
    for name in names.split(","):
        if name not in known:
            raise ValueError(f"structures: {name!r}: {nearest(name, list(known))}")
    return [known[name] for name in names.split(",")]
