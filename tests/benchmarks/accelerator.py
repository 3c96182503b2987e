"""Share of an accelerator's peak that training reaches, and what runs side by side gain on it.

    python tests/benchmarks/accelerator.py             all of it (one GPU or TPU of 80 GB)
    python tests/benchmarks/accelerator.py --tiny      the same code on small shapes, on any device

FLOPs are the exact ones of `lab.cost`: a pair that causal attention does not need is not counted.
"""

import argparse
import statistics
from dataclasses import replace
from typing import Literal

import jax

from bare import Bare, side_by_side
from lab import cost, hardware, memory
from lab.compiled import use_compilation_cache
from lab.spec import Budget, Data, Objective, Optimizer, Run, Shape
from lab.structure import STRUCTURES
from lab.versions import versions
from sweeps.ladder import shape

V = 260
SIZES = {
    "125M": (768, 12, 12),
    "350M": (1024, 24, 16),
}  # width, layers, heads as in GPT-3's table 2.1 (arXiv 2005.14165)
CALLS = 7


def run_of(structure: str, shape: Shape, S: int, T: int, batch: int, precision: Literal["f32", "bf16"]) -> Run:
    decoder_only = structure == "decoder_only"
    return Run(
        structure=STRUCTURES[structure],
        shape=shape,
        objective=Objective(S=S, T=T, loss="all" if decoder_only else "targets"),
        data=Data(corpus="markov", manifest="0" * 64, train_tokens=10**9),
        optimizer=Optimizer(learning_rate=1e-3),
        budget=Budget(unit="steps", amount=1000),
        batch=batch,
        precision=precision,
    )


def share(label: str, run: Run, **settings) -> None:
    """Prints the median over calls of one program."""
    kind, limit = jax.default_backend(), hardware.memory_limit()
    execution = replace(hardware.choose(run, V, kind, limit=limit), **settings)
    bare = Bare(run, execution)
    bare.seconds()
    seconds = statistics.median(bare.seconds() for _ in range(CALLS))
    counted, peak = cost.train_step(run, V), hardware.peak_flops()
    of_peak = f"{counted['exact'] / seconds / peak:.1%} of the peak" if peak else "peak not known"
    predicted = memory.predict(run, V, execution).total / (bare.built.memory_bytes or 1)
    print(
        f"{label:38s} {seconds * 1e3:8.1f} ms a step, {run.batch * run.objective.length / seconds:10,.0f} tokens/s, "
        f"{counted['exact'] / seconds / 1e12:7.2f} TFLOP/s, {of_peak}; compiled in {bare.built.seconds:.0f} s, "
        f"memory predicted / counted {predicted:.2f}; {execution.attention}, {execution.microbatches} microbatches"
        f"{', remat' if execution.remat else ''}",
        flush=True,
    )


def packs(D: int, L: int, sizes: list[int], precision: Literal["f32", "bf16"]) -> None:
    run = run_of("decoder_only", shape(D, L), 128, 128, 16, precision)
    settings = hardware.choose(run, V, jax.default_backend())
    found = side_by_side({str(n): Bare(run, settings, pack=n) for n in sizes}, CALLS, base="1")
    for n, (seconds, ratio) in found.items():
        print(f"D {D}, {L} layers, {n:>3s} runs side by side: {seconds * 1e3:8.2f} ms a step of each, "
              f"{int(n) / ratio:6.2f} x the runs an hour of one after another", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--precision", default="bf16", choices=["bf16", "f32"])
    parser.add_argument("--tokens", type=int, default=64 * 1024, help="in a batch")
    given = parser.parse_args()
    use_compilation_cache()
    print(f"{hardware.device()}, {versions()}")
    sizes, S, tokens = ({"tiny": (32, 2, 2)}, 32, 256) if given.tiny else (SIZES, 1024, given.tokens)
    for name, (D, L, N) in sizes.items():
        wide = replace(shape(D, L), N=N, K=N, H=D // N)
        for structure, lengths in (
            ("decoder_only", (1, 2 * S - 1)),
            ("prefix_lm", (S, S)),
            ("encoder_decoder", (S, S)),
        ):
            run = run_of(structure, wide, *lengths, max(1, tokens // (2 * S)), given.precision)
            share(f"{name} {structure}, {' + '.join(map(str, lengths))}", run)
    for D in (16,) if given.tiny else (64, 128, 256):
        packs(D, 2 if given.tiny else 4, [1, 2] if given.tiny else [1, 8, 32], given.precision)


if __name__ == "__main__":
    main()
