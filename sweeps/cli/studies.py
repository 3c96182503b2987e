"""Commands that make and run a study: quickstart, plan, run, report."""

import math
import os
import shlex
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from lab import hardware, records
from sweeps.changes import changes
from sweeps.cli.control import count, records_here, study_directory
from sweeps.cli.data import check_source, of_source
from sweeps.cli.tables import show
from sweeps.files import files_at
from sweeps.launch import local
from sweeps.launch.ray_node import Cluster
from sweeps.launch.settings import Settings, check_workers
from sweeps.launch.slurm import Job, submit
from sweeps.plan import Plan
from sweeps.plan import plan as make_plan
from sweeps.store import Store
from sweeps.study import load, name_of

Name = Annotated[str, tyro.conf.Positional]
CLUSTER, JOB, SETTINGS = Cluster(), Job(), Settings()


def quickstart(
    out: Path | None = None,
    workers: int | None = None,
    preset: str = "small",
    data: str | None = None,
    tokenizer: str | None = None,
) -> None:
    """Plan, train, fit and report the quickstart study: four arms on installed Python source, about 5 minutes on 2 cores.

    Example: lab quickstart
    Example: lab quickstart --data ./novels
    Example: lab quickstart --data HuggingFaceFW/fineweb-edu:config=sample-10BT --tokenizer tokenizer.json

    Args:
        out: the study's directory (default: runs/quickstart, and with --data runs/quickstart-<the text's name>)
        workers: processes that share the cores (default: one a core; one a GPU where there are GPUs)
        preset: small, or smoke for a minute's check that all parts work
        data: other text: a directory of `lab data prepare`, files, or a Hugging Face data set, as `lab data prepare` takes it
        tokenizer: of text that is not prepared: bytes (the default), a tokenizer.json, a sentencepiece .model, or a name on
            the hub
    """
    Console(stderr=True).print("planning quickstart; the first time, the corpus is read and tokenized")
    check_workers(workers)
    text = of_source(data, tokenizer)
    directory = out or Path("runs") / ("quickstart" if text is None else f"quickstart-{name_of(text)}")
    train(make_plan(load("quickstart", preset, text, tokenizer=tokenizer)), str(directory), workers=workers)
    report(str(directory))


def plan(
    study: Name,
    /,
    preset: str = "small",
    out: str | None = None,
    data: str | None = None,
    tokenizer: str | None = None,
    replace_plan: bool = False,
    device: str = "cpu",
    workers: int | None = None,
) -> None:
    """Solve a study and show every run before anything is spent; refuse what can not be matched.

    Hours and MiB are of one run on one device. Rates of accelerators are a guess, which the line below the table states.

    Example: lab plan chung_ladder
    Example: lab plan chung_ladder --device h100 --workers 8
    Example: lab plan ./mine.py --out runs/mine

    Args:
        study: a shipped study, or a path to a file that defines study(preset)
        preset: which size of the study
        out: write plan.json and go no further
        data: other text than the study's own, as `lab data prepare` takes it, or a directory that it wrote
        tokenizer: of text that is not prepared (default: bytes)
        replace_plan: accept a plan that drops runs which were begun (their directories are kept)
        device: what hours and memory are estimated for: cpu (one core), h100, h200, a100, l40s, v4, v5e, v5p, v6e, or gpu or
            tpu for one of no known model
        workers: cores or accelerators that share the runs (default: this machine's cores, or one accelerator)
    """
    on = hardware.named(device)
    check_workers(workers)
    at_once = workers if workers is not None else os.cpu_count() or 1 if on.kind == "cpu" else 1
    solved = make_plan(load(study, preset, of_source(data, tokenizer), tokenizer=tokenizer))
    show(solved, Console(), device=on, workers=at_once)
    if out is not None:
        store = Store(out)
        for line in changes(store, solved):
            print(line)
        print(f"{out.rstrip('/')}/{records.PLAN}: {store.write_plan(solved.to_json(), replace=replace_plan)}")


def run(
    study: Name,
    /,
    preset: str | None = None,
    out: str | None = None,
    data: str | None = None,
    tokenizer: str | None = None,
    workers: int | None = None,
    on: Literal["local", "ray", "slurm"] = "local",
    ray: Cluster = CLUSTER,
    slurm: Job = JOB,
    pack: int | None = None,
    mesh: str | None = None,
    hosts: str | None = None,
    flops: float | None = None,
    hours: float | None = None,
    until: str | None = None,
    checkpoint: float = 60.0,
    lease: float = 60.0,
    hang: float = 1800.0,
    track: str | None = None,
    retry: bool = False,
    replace_plan: bool = False,
) -> None:
    """Train every run of a study that has not ended; started again, it goes on where it was.

    Example: lab run chung_ladder --workers 2
    Example: lab run ./mine.py --out runs/mine --retry
    Example: lab run quickstart --data ./novels
    Example: lab run runs/mine (the plan in that directory, such as one that `lab design --write` has added runs to)

    Args:
        study: a shipped study, a path to a file that defines study(preset), or a directory with a plan
        preset: which size of the study (default: small)
        out: the study's directory (default: runs/<study's name>), or a place in an object store, such as gs://bucket/mine
        data: other text than the study's own, as `lab data prepare` takes it, or a directory that it wrote
        tokenizer: of text that is not prepared: bytes (the default), a tokenizer.json, a sentencepiece .model, or a name on
            the hub
        workers: processes that share the cores (default: one a core; one a GPU where there are GPUs; on Ray as many as fit)
        on: local for this machine, ray for a Ray cluster, slurm for jobs of a Slurm cluster, as many as --workers says
        ray: which Ray cluster, and what each worker takes of it
        slurm: what each job asks Slurm for
        pack: runs of one program that train side by side in each worker (default: as many as an accelerator has memory
            for; 1 on a processor, where more were measured to gain nothing)
        mesh: devices along data, fsdp and tensor that each run is cut over, such as data=4,fsdp=2 (default: one device a run,
            and all of them for runs that one can not hold)
        hosts: for runs larger than a machine, with this command on each host: the first one's address and port, how many, and
            which this is (from 0), such as 10.0.0.1:9876,2,0; 'auto' on Slurm, TPU pods and others that JAX knows
        flops: begin no further run once the study has spent so many exact FLOPs: those of results, and what all other attempts
            have trained, as far as their metrics say
        hours: stop after so many, with all that runs saved; on Slurm counted from now, whatever waits in the queue
        until: stop at this moment instead: such as 2026-12-01T08:00 (here; or with +00:00 or Z), or seconds since 1970
        checkpoint: seconds between two checkpoints of a run
        lease: seconds of silence after which another worker takes a run over
        hang: seconds without a step after which a run has failed; its compilation gets four times as long
        track: trackers that show the runs, of tensorboard and wandb, such as tensorboard,wandb
        retry: try the failed runs again
        replace_plan: accept a plan that drops runs which were begun (their directories are kept)
    """
    from sweeps import propose

    settings = Settings(
        pack=pack,
        mesh=mesh,
        hosts=hosts,
        lease=lease,
        hang=hang,
        checkpoint=checkpoint,
        most_flops=flops,
        until=end_of(hours, until),
        track=track,
    )
    check_options(out or study, on=on, ray=ray, slurm=slurm, settings=settings, workers=workers)
    written = study if files_at(study).exists(records.PLAN) else None
    if written is None:
        Console(stderr=True).print(f"planning {study}; the first time, the corpus is read and tokenized")
        solved = make_plan(load(study, preset or "small", of_source(data, tokenizer), tokenizer=tokenizer))
    elif preset is not None:
        raise ValueError(
            f"preset = {preset!r}: {written} holds a plan, which is run as it is: leave it out, or run the study by its name "
            "with another --out"
        )
    else:
        solved = propose.read(Store(written).records())
        check_source((row.run.data for row in solved.runs), data, tokenizer)
    train(
        solved,
        out or written or str(Path("runs") / solved.study.name),
        workers=workers,
        on=on,
        ray=ray,
        slurm=slurm,
        settings=settings,
        retry=retry,
        replace_plan=replace_plan,
    )


def check_options(
    out: str,
    *,
    on: Literal["local", "ray", "slurm"],
    ray: Cluster,
    slurm: Job,
    settings: Settings,
    workers: int | None,
) -> None:
    """Raises ValueError for options that would do nothing where the runs train, or can not be together."""
    from lab.mesh import Mesh, read_hosts

    for place, given, default in (("ray", ray, CLUSTER), ("slurm", slurm, JOB)):
        for name, value in vars(given).items():
            if on != place and value != getattr(default, name):
                raise ValueError(
                    f"{place}.{name} = {value!r}: it says nothing with --on {on}; add --on {place}, or leave it out"
                )
    mesh, hosts = settings.mesh, settings.hosts
    if mesh is not None:
        Mesh.read(mesh)
    if hosts is not None:
        read_hosts(hosts)
    check_workers(workers)
    if on == "ray":
        ray.check(mesh=mesh, hosts=hosts)
    elif on == "slurm":
        slurm.check(out, hosts=hosts)
    else:
        local.one_has_all(workers, mesh=mesh, hosts=hosts)


def train(
    solved: Plan,
    directory: str,
    *,
    workers: int | None,
    on: Literal["local", "ray", "slurm"] = "local",
    ray: Cluster = CLUSTER,
    slurm: Job = JOB,
    settings: Settings = SETTINGS,
    retry: bool = False,
    replace_plan: bool = False,
    again: str | None = None,
) -> None:
    """Trains every run of a plan that has not ended, and says so. again: the command that tries the failed ones once more
    (default: `lab run` on the directory)."""
    from sweeps.cli.progress import Display
    from sweeps.execute import prepared
    from sweeps.execute import run as execute

    console = Console(stderr=True)
    if on == "ray":
        kind, at_once = ray.kind, workers or 1
    elif on == "slurm":
        kind, at_once = ("gpu", slurm.gpus * (workers or 1)) if slurm.gpus else ("cpu", slurm.cpus * (workers or 1))
    else:
        kind, places = local.slots(workers, mesh=settings.mesh, hosts=settings.hosts, needs=solved.needs)
        at_once = len(places)
    if retry and files_at(directory).exists(records.PLAN):
        console.print(f"{Store(directory).retry()} failed runs will be tried again")
    console.print(
        f"[bold]{solved.study.name}[/]: {len(solved.unique)} runs, {solved.programs()} shapes to compile, "
        f"{sum(r.planned['exact'] for r in solved.unique.values()):.3g} FLOPs; about "
        f"{solved.seconds(at_once, kind) / 60:.1f} min on {at_once} {kind} worker{'s' if at_once > 1 else ''}; "
        f"in {directory}",
        soft_wrap=True,
    )
    for said in solved.warnings:
        console.print(f"[yellow]note:[/] {said}", soft_wrap=True)

    def changed(lines: list[str]) -> None:
        console.print("\n".join(["[yellow]note:[/] " + lines[0], *lines[1:]]), soft_wrap=True)

    if on == "slurm":
        ids = submit(
            prepared(solved, directory, replace_plan=replace_plan, on_change=changed).root,
            workers or 1,
            job=slurm,
            settings=settings,
        )
        console.print(f"jobs {', '.join(ids)}; `lab status {directory} --watch` follows them", soft_wrap=True)
        return
    began = time.monotonic()
    with Display(solved, console) as display:
        execute(
            solved,
            directory,
            workers=workers,
            on=ray if on == "ray" else None,
            settings=settings,
            replace_plan=replace_plan,
            on_poll=display,
            on_change=changed,
        )
    statuses = Store(directory).status()
    console.print(f"{count(statuses)} in {time.monotonic() - began:.0f} s; {directory}")
    for s in statuses:
        if s.state == "damaged":
            console.print(f"[bold red]{s.run_id}[/]: {s.reason}", soft_wrap=True)
    failed = [s.run_id for s in statuses if s.state == "failed"]
    if failed:
        console.print(
            f"[bold red]{len(failed)} runs failed[/]; `lab logs {directory} {failed[0]}` says why the first did; once the cause "
            f"is gone: {again or shlex.join(['lab', 'run', directory, '--retry'])}",
            soft_wrap=True,
        )
    if failed or any(s.state == "damaged" for s in statuses):
        sys.exit(1)
    if left := sum(s.state in ("waiting", "running") for s in statuses):
        spent = settings.most_flops is not None or settings.until is not None
        console.print(
            "the study's budget is spent; the same command with a larger one goes on"
            if spent
            else f"{left} runs are left; the same command goes on with them"
        )


def end_of(hours: float | None, until: str | None) -> float | None:
    """The moment at which all stops, in seconds since 1970; None where neither says one."""
    if hours is not None and until is not None:
        raise ValueError(f"hours = {hours} and until = {until!r}: give one of them")
    if hours is not None and not hours > 0:
        raise ValueError(f"hours = {hours}: use a number above 0")
    if until is None:
        return None if hours is None else time.time() + 3600 * hours
    try:
        moment = float(until)
    except ValueError:
        try:
            moment = datetime.fromisoformat(until).timestamp()
        except ValueError:
            moment = math.nan
    if not 0 < moment < math.inf:
        raise ValueError(f"until = {until!r}: use a moment such as 2026-12-01T08:00, or seconds since 1970")
    return moment


def report(study: Name, /, out: Path | None = None, publish: Path | None = None) -> None:
    """Fit a study's runs, print the verdict and write the report as one web page.

    Example: lab report runs/quickstart

    Args:
        study: a study's directory, or the name of a study under runs/
        out: where the page goes (default: report.html in the study's directory; of one in an object store, in this machine's
            copy)
        publish: a directory for the answer as files that a repository keeps: <name>.md, its runs as CSV, figures as PNG
    """
    import analysis
    from analysis.markdown import publish as publish_in

    store = Store(study_directory(study))
    store.status()  # copies what a publisher that died left to copy
    page = analysis.report(records_here(store), out)
    Console(highlight=False).print((page.parent / "summary.txt").read_text(), markup=False, soft_wrap=True)
    print(f"report: {page}")
    if publish is not None:
        print(f"published: {publish_in(records_here(store), publish)}")
