"""Commands on one run: describe, flops, train."""

from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from lab import cost, hardware, memory, records, serving_cost, spec, tracking
from lab.spec import Objective, Options, Run
from lab.structure import LADDER, STRUCTURES
from sweeps import ladder

Path_ = Annotated[Path, tyro.conf.Positional]


def read(path: Path) -> tuple[Run, Path]:
    """A run.json, or the directory that holds one; and that directory."""
    file = path / records.RUN if path.is_dir() else path
    return spec.read_run(file), file.parent


def describe(run: Path_, /) -> None:
    """Print every resolved number of a run, its cost, and where the cost comes from.

    Example: lab describe runs/quickstart/runs/prefix_lm-d32-l2-1.60e11flops-0123456789

    Args:
        run: a run.json, or a run's directory
    """
    console, (content, _) = Console(), read(run)
    V = content.V
    console.print(f"[bold]{content.run_id}[/]")
    table = Table("field", "value", box=None, pad_edge=False)
    for part, value in spec.to_json(content).items():
        if isinstance(value, dict):
            for name, item in value.items():
                table.add_row(f"{part}.{name}", str(item))
        else:
            table.add_row(part, str(value))
    console.print(table)
    parts = (content.structure, content.shape, content.options, content.objective)
    counted = cost.parameters(*parts, V)
    console.print(
        f"\n[bold]parameters[/] {counted.total:,}: body {counted.body:,} + token tables {counted.embedding:,}"
        + (f" ({counted.unused:,} of the body are read by no scored prediction)" if counted.unused else "")
    )
    pair = cost.pair_flops(content.shape, content.options)
    bill = Table("forward, one example", "FLOPs", "share", box=None, pad_edge=False, title_justify="left")
    total = cost.forward(*parts, V)["exact"]
    for item in cost.bill(*parts, V):
        flops = item.linear + pair * item.attended
        note = f" ({item.attended:,} of {item.dense:,} pairs x {pair})" if item.dense else ""
        bill.add_row(item.name + note, f"{flops:,}", f"{flops / total:.1%}")
    console.print(bill)
    spent = Table("unit", "a step", "whole run", box=None, pad_edge=False)
    step, planned = cost.train_step(content, V), cost.planned(content, V)
    for unit in step:
        mark = "  <- budget" if unit == cost.budget_unit(content) else ""
        spent.add_row(unit, f"{step[unit]:,}", f"{planned[unit]:,} ({planned[unit]:.3e}){mark}")
    console.print(spent)
    execution = hardware.choose(content, V)
    console.print(
        f"on one CPU core: about {hardware.estimate_seconds(content, V):.0f} s, {execution.steps_per_dispatch} steps per "
        f"dispatch, layers {'scanned' if execution.scan else 'unrolled'}, {memory.predict(content, V, execution)}"
    )


def flops(
    D: int = 512,
    L: int = 8,
    S: int = 512,
    T: int = 512,
    V: int = 260,
    K: int | None = None,
    head_width: int = 64,
    turns: int = 5,
) -> None:
    """Parameters and forward FLOPs of each structure at one shape, and what a conversation costs.

    Example: lab flops --D 1024 --L 24 --S 896 --T 128 --V 32000

    Args:
        D: model width
        L: layers of each stream
        S: input length
        T: target length
        V: vocabulary
        K: key-value heads (default: as many as query heads)
        head_width: width of a head
        turns: of a conversation, each of T/2 user tokens and T reply tokens
    """
    shape = ladder.shape(D, L, head_width=head_width)
    shape = shape if K is None else spec.Shape(**{**vars(shape), "K": K})
    objective, options = Objective(S=S, T=T), Options()
    costs = Table(
        "structure", "body parameters", "exact", "dense", "textbook", "6nd", "relative", box=None, pad_edge=False
    )
    talks = Table("structure", f"FLOPs of {turns} turns", "relative", "cache MiB (16 bit)", box=None, pad_edge=False)
    base, user = "decoder_only", max(1, T // 2)
    counted = {name: cost.forward(STRUCTURES[name], shape, options, objective, V) for name in LADDER}
    spent = {
        name: serving_cost.conversation(STRUCTURES[name], shape, options, V, turns=turns, user=user, reply=T)
        for name in LADDER
    }
    talk = {name: sum(turn.prefill + turn.decode for turn in spent[name]) for name in LADDER}
    for name in LADDER:
        costs.add_row(
            name,
            f"{cost.parameters(STRUCTURES[name], shape, options, objective, V).body:,}",
            *(f"{counted[name][c]:.4g}" for c in ("exact", "dense", "textbook", "6nd")),
            f"{counted[name]['exact'] / counted[base]['exact']:.3f}",
        )
        cache = spent[name][-1].cache_bytes / 2**20
        talks.add_row(name, f"{talk[name]:.4g}", f"{talk[name] / talk[base]:.2f}", f"{cache:.1f}")
    Console().print(costs, "\n", talks, sep="")
    print(
        "FLOPs of one example's forward pass (training is 3 times that) and of a conversation; relative to decoder-only"
    )


def train(
    run: Path_,
    /,
    out: Path | None = None,
    mesh: str | None = None,
    hosts: str | None = None,
    profile: bool = False,
    track: str | None = None,
) -> None:
    """Train one run in the foreground; started again, it goes on where it was.

    Example: lab train runs/quickstart/runs/prefix_lm-d32-l2-1.60e11flops-0123456789/run.json --out runs/alone
    Example: lab train run.json --mesh data=4,fsdp=2
    Example: lab train run.json --out /shared/alone --hosts 10.0.0.1:9876,2,0 (and ...,2,1 on the second of two)

    Args:
        run: a run.json, or a run's directory
        out: the directory to train in (default: runs/<run id>); of several hosts, one that all see
        mesh: devices along data, fsdp and tensor (default: all there are, by the batch)
        hosts: one process a host: the first one's address and port, how many, and which this is (from 0); 'auto' on Slurm,
            TPU pods and other places where JAX finds them itself
        profile: trace a few steps into the directory's profile/, for XProf
        track: trackers that show the run, of tensorboard and wandb, such as tensorboard,wandb
    """
    from lab.mesh import Mesh, join_hosts
    from lab.train import train as train_run

    content, _ = read(run)
    on = Mesh.read(mesh) if mesh else None
    if hosts:
        join_hosts(hosts)
    directory = out or Path("runs") / content.run_id
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total} steps"),
               TextColumn("{task.fields[note]}"), TimeElapsedColumn(), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(content.run_id, total=None, note="starting")

        def show(step: int, steps: int, loss: float | None, speed: float) -> None:
            progress.update(task, completed=step, total=steps, note=f"loss {loss:.3f}, {speed:,.0f} tokens/s")

        result = train_run(content, directory, on=on, on_progress=show, profile=profile, track=tracking.read(track))
    outcome, measured = result["outcome"], result["measured"]
    if "seconds_by_part" in measured:  # a result of before this was recorded has none
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in measured["seconds_by_part"].items())
        speed = f"{measured['tokens_per_second']:,.0f} tokens/s, {measured['exact_flops_per_second']:.3g} exact FLOP/s"
        mfu = f", {measured['mfu']:.0%} of the device's peak" if measured["mfu"] else ""
        print(f"{speed}{mfu}; seconds: {parts}")
    if result["status"] == "done":
        print(
            f"done: {outcome['loss']:.4f} nats per target token, {outcome['bits_per_byte']:.4f} bits per byte; {directory}"
        )
    else:
        print(f"diverged at step {outcome['diverged_at']}; {directory}")
