"""This lab's trainer beside others on the same model, tokens and start: speed, time to the first step, memory.

    python tests/benchmarks/trainers.py                       the 4-layer, d=256 model, f32
    python tests/benchmarks/trainers.py --precision bf16
    python tests/benchmarks/trainers.py --case d64 --pinned   one process a core, each pinned to it
    python tests/benchmarks/trainers.py --case encdec --peers ours,t5
    python tests/benchmarks/trainers.py --peers ours@/another/checkout,ours      before and after

Each trainer is a process of its own that lives throughout, in the environment that `lab run` gives its workers; rounds go
through all of them in a random order, and ratios are medians over rounds, since the machine's own speed drifts.
PyTorch peers need `pip install torch transformers` (not in [dev]).
"""

import argparse
import importlib
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from sweeps.launch import local

CASES = {
    "d256": dict(D=256, N=4, L=4, S=128, T=128, B=16),
    "d64": dict(D=64, N=4, L=2, S=64, T=64, B=8),
    "d32": dict(D=32, N=2, L=2, S=32, T=32, B=4),
    "encdec": dict(D=256, N=4, L=2, S=256, T=64, B=16, structure="encoder_decoder", loss="targets"),
}
SECONDS = 4.0  # of one trainer in one round


def serve(peer: str, case: dict, start: float) -> None:
    """The child: makes the trainer, then answers each number of steps on stdin with the seconds that they took."""
    from peers.case import Case

    trainer = importlib.import_module(f"peers.{peer}").Trainer(Case(**case))
    losses = [float(trainer.steps(1))]
    print(json.dumps({"first_step": time.time() - start}), flush=True)
    losses += [float(trainer.steps(1)) for _ in range(3)]
    print(json.dumps({"losses": losses}), flush=True)
    for line in sys.stdin:
        count, began = int(line), time.perf_counter()
        trainer.steps(count)
        seconds = time.perf_counter() - began
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"seconds": seconds, "memory": memory}), flush=True)


class Child:
    def __init__(self, peer: str, case: dict, core: int | None):
        peer, _, checkout = peer.partition("@")
        benchmarks = Path(checkout or Path(__file__).parents[2]).absolute() / "tests" / "benchmarks"
        paths = [str(benchmarks), str(benchmarks.parents[1]), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, **local.CPU_ENVIRONMENT, "PYTHONPATH": os.pathsep.join(paths)}
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        command = [sys.executable, str(benchmarks / "trainers.py"), "--serve", peer, json.dumps(case), str(time.time())]
        if core is not None:
            command = ["taskset", "-c", str(core), *command]
            environment["OMP_NUM_THREADS"] = "1"
        self.process = subprocess.Popen(command, env=environment, text=True, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)  # fmt: skip

    def ask(self, count: int) -> None:
        assert self.process.stdin
        self.process.stdin.write(f"{count}\n")
        self.process.stdin.flush()

    def answer(self) -> dict:
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"a trainer ended with {self.process.wait()}: run it with --serve to see why")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--case", default="d256", choices=CASES)
    parser.add_argument("--precision", default="f32", choices=["f32", "bf16"])
    parser.add_argument("--peers", default="ours,plain_jax,linen,torch_gpt,torch_eager")
    parser.add_argument("--pinned", action="store_true", help="a process a core, all at once")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    case = {**CASES[arguments.case], "precision": arguments.precision}
    names = arguments.peers.split(",")
    cores = sorted(os.sched_getaffinity(0)) if arguments.pinned else [None]
    print(f"{case}, {len(os.sched_getaffinity(0))} cores{', a pinned process each' if arguments.pinned else ''}")

    groups, first, losses, count = {}, {}, {}, {}
    for name in names:
        groups[name] = [Child(name, case, core) for core in cores]
        first[name] = max(child.answer()["first_step"] for child in groups[name])
        losses[name] = groups[name][0].answer()["losses"]
        for child in groups[name][1:]:
            child.answer()
        _, seconds, _ = _round(groups[name], 4)
        count[name] = max(4, int(4 * SECONDS / seconds))
    speeds, memory = {name: [] for name in names}, {}
    order = random.Random(0)
    for _ in range(arguments.rounds):
        for name in order.sample(names, len(names)):
            rate, _, memory[name] = _round(groups[name], count[name])
            speeds[name].append(rate)
    for group in groups.values():
        for child in group:
            child.process.kill()

    tokens = case["B"] * (case["S"] + case["T"])
    width = max(map(len, names))
    print(
        f"{'':{width}}  ms a step    tokens/s  of {names[0]}'s     first step   peak memory   losses of the first steps"
    )
    for name in names:
        ratio = statistics.median(a / b for a, b in zip(speeds[name], speeds[names[0]], strict=True))
        rate = statistics.median(speeds[name])
        said = " ".join(f"{loss:.4f}" for loss in losses[name])
        print(f"{name:{width}}  {len(cores) / rate * 1e3:9.2f}  {rate * tokens:10,.0f}  {ratio:9.3f}   {first[name]:9.1f} s"
              f"  {memory[name] / 2**30:9.2f} GB   {said}")  # fmt: skip


def _round(group: list[Child], count: int) -> tuple[float, float, int]:
    """Steps a second of the whole group, seconds of its slowest, largest memory."""
    time.sleep(1.0)  # OpenMP's threads spin on after their last work, and would take from who comes next
    # The first steps of a turn are not timed: a virtual machine may have given the memory of an idle process back.
    for steps in (max(2, count // 3), count):
        for child in group:
            child.ask(steps)
        answers = [child.answer() for child in group]
    rate = sum(count / answer["seconds"] for answer in answers)
    return rate, max(answer["seconds"] for answer in answers), max(answer["memory"] for answer in answers)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], json.loads(sys.argv[3]), float(sys.argv[4]))
    else:
        main()
