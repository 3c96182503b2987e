"""What the loop costs beside its compiled steps: wall time of `train`, less set-up and evaluation, over the steps alone.

    python tests/benchmarks/loop_overhead.py

Runs on one core, as a worker does. The bare loop calls the same compiled program on batches that are ready; both are timed
in turn, and the medians of their ratio are printed. At D = 96 a step takes near 50 ms.
"""

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import numpy as np

from lab import hardware, train
from lab.compiled import compiled
from lab.data import Examples, describe, load
from lab.data.tokenizers import TOKENIZERS
from lab.forms import forms
from lab.objectives import build
from lab.optimizers import hyperparameters
from lab.program import program
from lab.spec import Budget, Evaluation, Objective
from runs import make_run
from sweeps.ladder import shape

ROUNDS = 5


def main() -> None:
    for D, L, steps in ((16, 2, 600), (32, 2, 300), (96, 3, 60)):
        run = make_run("decoder_only", shape=shape(D, L), objective=Objective(S=64, T=64), batch=8,
                       data=describe("markov").data, budget=Budget(unit="steps", amount=steps),
                       evaluation=Evaluation(examples=64))  # fmt: skip
        execution = hardware.choose(run, 260)
        built = compiled(program(run, execution))
        examples = Examples(load(run.data), run.objective.length, 0)
        k, tokenizer = execution.steps_per_dispatch, TOKENIZERS["bytes"]
        made = [build(forms(run.objective)[0], examples.batch(i, 8), tokenizer, seed=0, first=8 * i) for i in range(k)]
        ready = jax.tree.map(lambda *arrays: np.stack(arrays), *made)
        rates, hyper = np.full(k, 1e-3, np.float32), hyperparameters(run.optimizer, steps=k, seed=0)
        ratios, bare_times = [], []
        for _ in range(ROUNDS):
            state = built.init(0)
            start = time.perf_counter()
            for first in range(0, steps, k):
                state, losses, _ = built.advance(state, ready, hyper, rates, np.int32(min(k, steps - first)))
            jax.block_until_ready((state, losses))
            bare = time.perf_counter() - start
            with tempfile.TemporaryDirectory() as directory:
                result = train.train(run, Path(directory), checkpoint_seconds=1e9)
            in_loop = result["outcome"]["tokens_seen"] / result["measured"]["tokens_per_second"]
            ratios.append(in_loop / bare)
            bare_times.append(bare / steps * 1e3)
        print(f"D {D:3d}: {statistics.median(bare_times):6.2f} ms a step, {k} a dispatch; loop / steps = "
              f"{statistics.median(ratios):.3f} (of {ROUNDS}: {min(ratios):.3f} to {max(ratios):.3f})")  # fmt: skip


if __name__ == "__main__":
    main()
