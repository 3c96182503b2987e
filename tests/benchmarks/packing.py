"""16 runs of one shape, other seeds and learning rates: runs an hour of the lab's workers against one process a run.

    python tests/benchmarks/packing.py [--D 64] [--steps 200] [--runs 16]

Ways, each from nothing: `lab run` (a pinned worker a core); one persistent worker on one core; one worker that trains all
side by side by vmap; a process a run, one after another on all cores, as a loop in a shell would, which compiles each time;
and the same with compiled programs cached. The corpus is prepared before.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import sweeps
from lab import records
from lab.spec import Optimizer
from sweeps.launch import local
from sweeps.launch.settings import Settings
from sweeps.store import Store

STUDY = """
from sweeps import Study, arm, corpus
from sweeps.ladder import ladder

def study(preset="small"):
    data = corpus("markov")
    return Study(name="packing", question="Runs an hour?", baseline="decoder_only", budgets=({flops},), batch=8, window=1,
                 learning_rate={rates}, arms={{"decoder_only": arm("decoder_only", data, S=64, T=64)}}, seeds={seeds},
                 sizes=ladder({D}, depth=2, head_width=16))
"""


def directory_of(name: str, root: Path, plan: sweeps.Plan) -> Store:
    store = Store(root / name)
    store.write_plan(plan.to_json())
    return store


def by_workers(cores: list[int], pack: int | None):
    def train(store: Store, cache: Path) -> None:
        environment = {**local.CPU_ENVIRONMENT, "BITTERLAB_CACHE": str(cache)}
        places = [local.Slot(cores=(core,), environment=environment) for core in cores]
        local.start(store.root, places, settings=Settings(pack=pack), poll_seconds=0.05)

    return train


def by_processes(cached: bool):
    def train(store: Store, cache: Path) -> None:
        for run_id in store.runs:
            claim = store.claim(run_id)
            assert claim
            store.begin(claim)
            own = cache if cached else Path(tempfile.mkdtemp(dir=cache))
            if not cached:
                (own / "corpora").symlink_to(cache / "corpora")
            environment = {**os.environ, **local.CPU_ENVIRONMENT, "BITTERLAB_CACHE": str(own)}
            command = [
                sys.executable,
                "-m",
                "sweeps.cli.main",
                "train",
                str(claim.directory),
                "--out",
                str(claim.directory),
            ]
            subprocess.run(command, env=environment, check=True, capture_output=True)
            claim.release()

    return train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--D", type=int, default=64)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--runs", type=int, default=16)
    given = parser.parse_args()
    rates = tuple(Optimizer(learning_rate=1e-3 * (1 + i)).learning_rate for i in range(4))
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        (root / "study.py").write_text(STUDY.format(flops=1e12, rates=rates, seeds=given.runs // 4, D=given.D))
        step = sweeps.plan(sweeps.load(str(root / "study.py"))).runs[0].planned
        flops = step["exact"] / step["steps"] * given.steps
        (root / "study.py").write_text(STUDY.format(flops=flops, rates=rates, seeds=given.runs // 4, D=given.D))
        plan = sweeps.plan(sweeps.load(str(root / "study.py")))
        assert len(plan.unique) == given.runs and plan.programs() == 1
        ways = {
            f"lab run, {len(cores)} pinned workers": by_workers(cores, None),
            "one persistent worker, one core": by_workers(cores[:1], None),
            f"one worker, one core, {given.runs} side by side (vmap)": by_workers(cores[:1], given.runs),
            "a process a run, programs cached": by_processes(True),
            "a process a run": by_processes(False),
        }
        print(f"{given.runs} runs of D = {given.D}, {plan.runs[0].planned['steps']} steps of batch 8 x 128 tokens")
        seconds: dict[str, float] = {}
        for number, (name, train) in enumerate(ways.items()):
            cache = root / f"cache-{number}"
            os.environ["BITTERLAB_CACHE"] = str(cache)
            sweeps.plan(sweeps.load(str(root / "study.py")))  # prepares the corpus in this cache
            store = directory_of(f"way-{number}", root, plan)
            began = time.perf_counter()
            train(store, cache)
            seconds[name] = time.perf_counter() - began
            results = [records.read_result(store.directory(run_id)) for run_id in store.runs]
            losses = sum(result["outcome"]["loss"] for result in results if result) / len(results)
            print(f"  {name:48s} {seconds[name]:7.1f} s, {3600 * given.runs / seconds[name]:7.0f} runs an hour, mean loss "
                  f"{losses:.5f}", flush=True)  # fmt: skip
        ours = next(iter(seconds.values()))
        for name, other in list(seconds.items())[1:]:
            print(f"  lab run against {name}: {other / ours:.2f} x")


if __name__ == "__main__":
    main()
