"""A plan as a table, to be read before anything is spent."""

from dataclasses import dataclass

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from lab import hardware
from lab.execution import Execution
from lab.hardware import Device
from lab.memory import Memory, predict
from lab.plan_file import matched_on
from sweeps.plan import Plan, PlannedRun

HEADS = ("arm", "budget", "rung", "D x L", "body", "steps", "tokens", "epochs", "rate", "FLOPs", "residual", "hours",
         "MiB", "seeds")  # fmt: skip
WORDS = {"cpu": "CPU core", "gpu": "GPU", "tpu": "TPU chip"}


@dataclass(frozen=True, kw_only=True)
class Sized:
    """What a run takes of one device: bytes, and the settings that it takes them with."""

    row: PlannedRun
    needed: Memory
    settings: Execution


def show(plan: Plan, console: Console, *, device: Device = hardware.DEVICES["cpu"], workers: int = 1) -> None:
    """What each cell costs, how nearly it matches, what it is trained with, and how long a run of it takes on one `device`;
    then the whole study on so many. Where there is no terminal the table is as wide as it has to be."""
    table = Table(*HEADS, box=None, pad_edge=False, title=plan.study.question, title_justify="left")
    sized = {ids[0]: _size(plan.unique[ids[0]], device) for ids in plan.groups}
    first = {run_id: ids[0] for ids in plan.groups for run_id in ids}
    cells: dict[tuple[object, ...], list[PlannedRun]] = {}
    for row in plan.runs:
        cells.setdefault((row.arm, row.budget, row.rung, row.run.optimizer), []).append(row)
    for row, *others in cells.values():
        shape, planned = row.run.shape, row.planned
        depth = f"{shape.L_input}+{shape.L}" if row.run.structure.stacks == "separate" else str(shape.L)
        seconds = hardware.estimate_seconds(row.run, row.run.V, device.kind, peak=device.peak)
        table.add_row(
            row.arm, f"{row.budget:.3g}", str(row.rung), f"{shape.D} x {depth}", f"{planned['6nd'] / 6 / planned['tokens']:,.0f}",
            f"{planned['steps']:,}", f"{planned['tokens']:.3g}", f"{row.epochs:.3f}", f"{row.run.optimizer.learning_rate:.3g}",
            f"{planned['exact']:.3g}", f"{row.residual:+.2%}", f"{seconds / 3600:.2g}",
            f"{sized[first[row.run_id]].needed.total / 2**20:,.0f}", str(1 + len(others)),
        )  # fmt: skip
    if not console.is_terminal:
        natural = Measurement.get(console, console.options.update(max_width=10_000), table).maximum
        console = Console(file=console.file, width=max(console.width, natural), highlight=False)
    console.print(table)
    for said in (*_whole(plan, device, workers), *_memory(plan, device, list(sized.values()))):
        console.print(said, soft_wrap=True)
    for said in plan.warnings:
        console.print(f"note: {said}", soft_wrap=True)


def _whole(plan: Plan, device: Device, workers: int) -> list[str]:
    unique, match = plan.unique.values(), plan.study.match
    worst = max(abs(row.residual) for row in plan.runs)
    seconds = plan.seconds(workers, device.kind, peak=device.peak)
    name = WORDS[device.kind] if device.name == device.kind else device.name
    return [
        f"{len(unique)} runs, {plan.programs()} shapes, {sum(r.planned['exact'] for r in unique):.4g} exact FLOPs; matched on "
        f"{matched_on(vars(match))} within {worst:.2%} of {match.tolerance:.0%}",
        f"about {_duration(seconds)} on {workers} {name}{'s' if workers > 1 and name in WORDS.values() else ''}, compilation "
        f"included ({device.assumed})",
    ]


def _memory(plan: Plan, device: Device, sized: list[Sized]) -> list[str]:
    most = max(sized, key=lambda one: one.needed.total)
    said = [
        f"up to {max(map(len, plan.groups))} runs of one shape, which an accelerator trains side by side; the largest program, "
        f"{most.row.arm} D={most.row.run.shape.D}, takes about {most.needed.total / 2**20:,.0f} MiB"
        + (f" in {most.settings.microbatches} microbatches" if most.settings.microbatches > 1 else "")
        + (" with remat" if most.settings.remat else "")
    ]
    if device.memory is not None and (large := [one for one in sized if one.needed.total > device.memory]):
        said.append(
            f"note: {len(large)} of {len(sized)} programs take more than the {device.memory / 2**20:,.0f} MiB of one "
            f"{device.name}, such as {large[0].row.arm} D={large[0].row.run.shape.D}: cut each run over several "
            "(lab run --mesh fsdp=8), or plan smaller ones"
        )
    return said


def _size(row: PlannedRun, device: Device) -> Sized:
    settings = hardware.choose(row.run, row.run.V, device.kind, limit=device.memory)
    return Sized(row=row, needed=predict(row.run, row.run.V, settings), settings=settings)


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:,.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"
