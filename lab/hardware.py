"""What the device is, and which settings suit a run there. Nothing here changes what is trained, only how fast.

The planner uses `estimate_seconds` and touches no device; the trainer asks the device.
"""

import contextlib
import os
import platform
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from lab import cost, memory
from lab.checks import nearest
from lab.execution import Execution
from lab.forms import forms
from lab.spec import Run

# Floating-point rates that this trainer reaches in `dense` FLOPs, by kind, for one CPU core or one accelerator, as
# (FLOP/s at small widths, FLOP/s at large ones, width of half the rate, seconds a step costs besides). CPU: measured on
# a shared 2-core x86-64 virtual machine with AVX-512, widths 8 to 48 (`tests/benchmarks/rates.py runs/quickstart`: within
# 10% of the median step at every width); gpu and tpu: not measured, a guess.
RATES = {
    "cpu": (4e9, 110e9, 48, 0.3e-3),
    "gpu": (1e11, 1e14, 512, 1e-3),
    "tpu": (1e11, 8e13, 512, 1e-3),
}
STARTUP_SECONDS = {"cpu": 1.0, "gpu": 2.0, "tpu": 2.0}
COMPILE_SECONDS = {"cpu": 6.0, "gpu": 15.0, "tpu": 15.0}
# Of training in one call of the compiled program: long against the call, and on CPU against the first touch of its
# temporary memory, which XLA takes and gives back with each call; short against a save.
DISPATCH_SECONDS = {"cpu": 2.0, "gpu": 0.25, "tpu": 0.25}
# On CPU products by Eigen and not by YNNPACK, which was measured 1.1 times slower (docs/performance.md).
COMPILER_OPTIONS: dict[str, dict[str, str | bool]] = {"cpu": {"xla_cpu_experimental_ynn_fusion_type": ""}}
MAX_STEPS_PER_DISPATCH = 64
SHARE_OF_MEMORY = 0.8  # that settings are chosen for: predictions are right within a fifth
FULL_TOKENS = 8192  # in a microbatch: fewer leave an accelerator idle; a guess
MAX_PACK = 64


# Dense bf16 FLOP/s of one chip, from the makers' data sheets; the name that JAX gives the chip holds the key.
PEAKS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}
# Of its peak that a large model reaches on an accelerator of this table. A guess: no GPU and no TPU was measured.
UTILISATION = 0.35


@dataclass(frozen=True, kw_only=True)
class Device:
    """What a plan is made for, before it is there. peak: FLOP/s of one (None: a processor's core, which was measured, or an
    accelerator of no known model). memory: bytes of one, where known."""

    name: str
    kind: str
    peak: float | None = None
    memory: int | None = None

    @property
    def assumed(self) -> str:
        """Where its rate comes from, in words."""
        if self.kind == "cpu":
            return "rates measured on one core of a shared x86-64 virtual machine"
        if self.peak is None:
            return f"a guess of at most {RATES[self.kind][1]:.3g} FLOP/s, not measured"
        return (
            f"a guess: at most {UTILISATION:.0%} of {self.peak / 1e12:g} TFLOP/s, less for small models; not measured"
        )


def _device(name: str, kind: str, key: str, gigabytes: float) -> Device:
    return Device(name=name, kind=kind, peak=PEAKS[key], memory=int(gigabytes * 1e9))


# Memory from the makers' data sheets; of the A100's two sizes the larger.
DEVICES = {
    device.name: device
    for device in (
        Device(name="cpu", kind="cpu"),
        Device(name="gpu", kind="gpu"),
        Device(name="tpu", kind="tpu"),
        _device("h200", "gpu", "H200", 141),
        _device("h100", "gpu", "H100", 80),
        _device("a100", "gpu", "A100", 80),
        _device("l40s", "gpu", "L40S", 48),
        _device("v4", "tpu", "TPU v4", 32),
        _device("v5e", "tpu", "TPU v5 lite", 16),
        _device("v5p", "tpu", "TPU v5", 95),
        _device("v6e", "tpu", "TPU v6 lite", 32),
    )
}


def named(name: str) -> Device:
    """The device of that name; raises ValueError for one that is not in the table."""
    if (found := DEVICES.get(name.lower())) is None:
        raise ValueError(f"device = {name!r}: {nearest(name.lower(), list(DEVICES))}")
    return found


def peak_flops() -> float | None:
    """Of all devices together; None where the device is not in the table, as processors are not."""
    import jax

    name = jax.local_devices()[0].device_kind
    peak = next((peak for key, peak in PEAKS.items() if key in name), None)
    return peak * jax.device_count() if peak else None


def step_seconds(run: Run, V: int, kind: str = "cpu", *, peak: float | None = None) -> float:
    """Estimated seconds of one training step on one core or accelerator of this kind, of so many FLOP/s at its peak where
    that is known."""
    low, high, half, overhead = RATES[kind]
    high = UTILISATION * peak if peak else high
    rate = low + (high - low) * run.shape.D / (run.shape.D + half)
    return cost.train_step(run, V)["dense"] / rate + overhead


def choose(run: Run, V: int, kind: str = "cpu", *, limit: int | None = None, rows: int = 1) -> Execution:
    """Settings by device, the fastest that `limit` bytes of a device's memory are predicted to hold, where a batch is cut over
    `rows` devices.

    On CPU layers are unrolled up to 8, where a scan was measured up to 1.1 times slower and compiles as fast; beyond that,
    and on accelerators beyond 2, they are scanned. On GPU the fused attention kernel, where it takes the shapes.
    """
    depth = max(run.shape.L, run.shape.L_input)
    fitting = max(1, int(DISPATCH_SECONDS[kind] / step_seconds(run, V, kind)))
    power = 1 << (min(fitting, MAX_STEPS_PER_DISPATCH).bit_length() - 1)
    fastest = Execution(
        steps_per_dispatch=power,
        scan=depth > (8 if kind == "cpu" else 2),
        attention="fused" if kind == "gpu" else "blocked",
    )
    if limit is None:
        return fastest
    chosen = fastest
    for chosen in _ever_smaller(fastest, run, rows):
        if memory.predict(run, V, chosen, by_batch=rows).total <= SHARE_OF_MEMORY * limit:
            break
    return chosen


def _ever_smaller(fastest: Execution, run: Run, rows: int) -> Iterator[Execution]:
    """Layers scanned; then microbatches that still fill a device; then remat, and microbatches down to one example."""
    yield fastest
    scanned = replace(fastest, scan=True)
    yield scanned
    parts = [n for n in (2**i for i in range(1, run.batch.bit_length())) if run.batch % (n * rows) == 0]
    ample = [n for n in parts if run.batch // (n * rows) * run.objective.length >= FULL_TOKENS]
    for n in ample:
        yield replace(scanned, microbatches=n)
    kept = max(ample, default=1)
    yield replace(scanned, microbatches=kept, remat=True)
    for n in parts:
        if n > kept:
            yield replace(scanned, microbatches=n, remat=True)


def pack_size(run: Run, V: int, kind: str = "cpu", *, limit: int | None = None) -> int:
    """Runs of this program that train side by side on one device: a power of two. On CPU one: more were measured to gain
    nothing there (docs/performance.md)."""
    alone = len(forms(run.objective)) > 1 or run.optimizer.curvature or run.technique is not None
    if kind == "cpu" or limit is None or alone:
        return 1
    settings = choose(run, V, kind, limit=limit)
    sizes = [1 << i for i in range(MAX_PACK.bit_length())]
    fitting = [n for n in sizes if memory.predict(run, V, settings, pack=n).total <= SHARE_OF_MEMORY * limit]
    return max(fitting, default=1)


def estimate_seconds(run: Run, V: int, kind: str = "cpu", *, peak: float | None = None) -> float:
    """Estimated seconds of the whole run on one core or accelerator (as step_seconds), without compilation."""
    held_out = run.evaluation.examples * run.evaluation.times / (3 * run.batch)
    return (cost.steps(run, V) + held_out) * step_seconds(run, V, kind, peak=peak) + STARTUP_SECONDS[kind]


def device() -> str:
    """The devices that JAX found, as recorded with a result; on CPU the processor and the cores this process may use."""
    import jax

    first = jax.local_devices()[0]
    if first.platform != "cpu":
        return f"{jax.local_device_count()} x {first.device_kind}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{_processor()}, {cores} core{'s' if cores != 1 else ''}"


def _processor() -> str:
    """The processor's model as Linux names it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def memory_limit() -> int | None:
    """Bytes that this process may fill: of one device where it tells, of a processor the share of this process' cores."""
    import jax

    statistics = jax.local_devices()[0].memory_stats()
    if statistics and "bytes_limit" in statistics:
        return int(statistics["bytes_limit"])
    if jax.default_backend() != "cpu" or not hasattr(os, "sched_getaffinity"):
        return None
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # a container's limit; "max" where it has none
        whole = min(whole, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    return whole * len(os.sched_getaffinity(0)) // (os.cpu_count() or 1)


def peak_memory_bytes() -> int:
    """The device's own count where it keeps one, else the largest resident size of this process so far."""
    import jax

    statistics = jax.local_devices()[0].memory_stats()
    if statistics and "peak_bytes_in_use" in statistics:
        return int(statistics["peak_bytes_in_use"])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
