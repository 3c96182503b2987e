"""Commands on a study that runs, or has run: status, logs, retry, cancel, gc, export. Each works from any machine that sees the
study's directory."""

import shutil
import time
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from lab import records
from sweeps.changes import outside
from sweeps.files import files_at, is_remote
from sweeps.history import EVENT
from sweeps.store import Status, Store

Name = Annotated[str, tyro.conf.Positional]
Names = Annotated[tuple[str, ...], tyro.conf.Positional]
STATES = ("done", "running", "waiting", "diverged", "failed", "cancelled", "damaged")
SHOWN = 200  # runs in a table, of those that have something to say
POLL_SECONDS = 2.0
WIDTH = 200  # of the table where there is no terminal


def status(study: Name, /, watch: bool = False, all: bool = False) -> None:
    """Show which runs of a study are done, running, waiting, failed, cancelled or damaged; of those that run also the loss, the
    speed, what is left and when they last gave a sign.

    Example: lab status runs/quickstart
    Example: lab status runs/quickstart --watch (until all of it has ended)

    Args:
        study: a study's directory, or the name of a study under runs/
        watch: a live display, with loss, speed and what is left
        all: a line for every run, however many
    """
    store, console = Store(study_directory(study)), Console()
    if watch:
        _watch(store, console)
    statuses = store.status()
    shown = statuses if all else sorted(statuses, key=lambda s: s.state in ("waiting", "done"))[:SHOWN]
    kept = {s.run_id for s in shown}
    running = any(s.state == "running" for s in shown)
    more = ("tokens/s", "left", "last sign") if running else ()
    console = console if console.is_terminal else Console(width=max(console.width, WIDTH))  # nothing is cut in a file
    table = Table("run", "state", "steps", "loss", "spent", *more, "by", box=None, pad_edge=False)
    for s in statuses:
        if s.run_id in kept:
            table.add_row(s.run_id, f"{s.state} ({s.reason})" if s.state == "failed" else s.state,
                          "" if s.step is None else f"{s.step:,}", "" if s.loss is None else f"{s.loss:.4f}",
                          f"{s.share:.0%}", *(_sign(store, s) if running else ()), s.held_by)  # fmt: skip
    console.print(table)
    if len(kept) < len(statuses):
        print(f"... and {len(statuses) - len(kept)} more (--all)")
    for s in statuses:
        if s.state == "damaged":
            console.print(f"[bold red]{s.run_id}[/]: {s.reason}", soft_wrap=True)
    print(count(statuses))
    if strange := outside(store):
        print(
            f"{len(strange)} runs outside the plan, such as {strange[0]}: an earlier plan had them; they are kept and not read"
        )


def _sign(store: Store, s: Status) -> tuple[str, str, str]:
    """Speed, what is left, and the last sign of life, of a run that runs."""
    from sweeps.cli.progress import duration
    from sweeps.signs import sign_of

    if s.state != "running":
        return "", "", ""
    try:
        sign = sign_of(store, s.run_id)
    except (ValueError, FileNotFoundError):  # deleted just now, or damaged, which the next look says
        return "", "", ""
    return (
        "" if sign.speed is None else f"{sign.speed:,.0f}",
        "" if sign.left is None else duration(sign.left),
        "none yet" if sign.ago is None else f"{duration(sign.ago)} ago",
    )


def count(statuses: list[Status]) -> str:
    """Such as '3 done, 1 running, 0 waiting'."""
    number = {state: sum(s.state == state for s in statuses) for state in STATES}
    return ", ".join(f"{n} {state}" for state, n in number.items() if n or state in STATES[:3])


def _watch(store: Store, console: Console) -> None:
    from sweeps import propose
    from sweeps.cli.progress import Display

    with Display(propose.read(store.records()), console) as display:
        while True:
            display(store)
            if not store.left():
                return
            time.sleep(POLL_SECONDS)


def logs(study: Name, run: Annotated[str | None, tyro.conf.Positional] = None, /, lines: int = 40) -> None:
    """Print what was logged: of a run, in all of its attempts, and why it failed; else the last of every worker.

    Example: lab logs runs/quickstart
    Example: lab logs runs/quickstart prefix_lm-d32-l2-1.60e11flops-0123456789

    Args:
        study: a study's directory, or the name of a study under runs/
        run: a run's id, or the beginning of it
        lines: how many of each log
    """
    store, failure = Store(study_directory(study)), None
    if run is None:
        texts = {str(path): path.read_bytes() for path in sorted((store.local / "logs").glob("*"))}
        if not texts:
            print(_where_logs_lie(store))
    else:
        (run_id,) = matching(store, (run,), one=True)
        texts = store.logs(run_id)
        failure = store.failure(run_id)
    for path, text in texts.items():
        print("\n".join([f"== {path}", *text.decode(errors="replace").splitlines()[-lines:]]))
    if failure:
        print(f"== failed ({failure['reason']}) after {failure['attempts']} attempts\n{failure['error']}")


def _where_logs_lie(store: Store) -> str:
    """Said where no worker has logged on this machine."""
    place = "in that directory of each machine that works at it" if store.mirror else "there, once one does"
    slurm = store.local / "slurm"
    of_jobs = f", and what Slurm's jobs print in {slurm}" if slurm.exists() else ""
    return (
        f"no worker has logged in {store.local / 'logs'}: workers' logs lie {place}{of_jobs}. Each run's own lie with its "
        f"attempts: `lab logs {store.root} RUN` prints them from any machine"
    )


def retry(study: Name, runs: Names = (), /) -> None:
    """Let failed runs be tried again: all, or those named. A cancelled run has to be named; a diverged one is a result.

    Example: lab retry runs/mine

    Args:
        study: a study's directory, or the name of a study under runs/
        runs: ids of runs, or beginnings of ids
    """
    store = Store(study_directory(study))
    print(f"{store.retry(matching(store, runs) if runs else None)} runs wait again; `lab run` trains them")


def cancel(study: Name, runs: Names, /) -> None:
    """Do not train these runs: those that wait are not begun, those that run stop within a heartbeat.

    Example: lab cancel runs/mine prefix_lm-d64 (all whose ids begin so)

    Args:
        study: a study's directory, or the name of a study under runs/
        runs: ids of runs, or beginnings of ids
    """
    store = Store(study_directory(study))
    if not runs:
        raise ValueError("runs: name those that are not to be trained; `lab status` lists them")
    print(f"{store.cancel(matching(store, runs))} runs cancelled; `lab retry STUDY RUN` takes one back")


def gc(study: Name, /, last: bool = False, dry: bool = False) -> None:
    """Delete the checkpoints of runs that are done, diverged or cancelled; results, metrics and logs stay. Of a done run the last
    one stays, to sample from, and of a cancelled one the newest, from which it goes on if `lab retry` takes it back. Of failed
    runs all stay.

    Example: lab gc runs/quickstart --dry

    Args:
        study: a study's directory, or the name of a study under runs/
        last: these too, after which `lab sample` has nothing to sample from, and a cancelled run would begin anew
        dry: only say what would go
    """
    store = Store(study_directory(study))
    freed = runs = 0
    for s in store.status():
        if s.state not in ("done", "diverged", "cancelled"):
            continue
        sizes = store.files.sizes(f"runs/{s.run_id}/{records.ATTEMPTS}")
        doomed = {
            place: size for place, size in _checkpoints(sizes, last=last or s.state == "diverged").items() if size
        }
        freed += sum(doomed.values())
        runs += bool(doomed)
        for place in doomed if not dry else ():
            store.files.remove_all(place)
    print(f"{freed / 2**20:,.1f} MiB of {runs} runs {'would be' if dry else 'were'} freed")


def _checkpoints(sizes: dict[str, int], *, last: bool) -> dict[str, int]:
    """Directories of checkpoints of a run that has ended, and their bytes: all but the newest that is whole (has checksums),
    of whichever attempt, or all. `sizes`: of the files of its attempts."""
    from lab.checkpoint import CHECKSUMS, DAMAGED, DIRECTORY

    found: dict[tuple[int, str, str, int], str] = {}
    total: dict[str, int] = {}
    for name, size in sizes.items():
        place, _, rest = name.partition(f"/{records.ATTEMPTS}/")
        attempt, kind, *path = rest.split("/")
        if kind not in (CHECKSUMS, DAMAGED, DIRECTORY):
            continue
        step = path[0].removesuffix(".json")
        doomed = f"{place}/{records.ATTEMPTS}/{attempt}/{kind}" + (f"/{step}" if kind == DIRECTORY else "")
        found[records.attempt_number(attempt), attempt, kind, int(step) if step.isdigit() else -1] = doomed
        total[doomed] = total.get(doomed, 0) + size
    if not last and found:
        whole = [
            (step, number, attempt)
            for number, attempt, kind, step in found
            if kind == DIRECTORY and (number, attempt, CHECKSUMS, step) in found
        ]
        kept = set()
        if whole:
            step, *newest = max(whole)
            kept = {(*newest, DIRECTORY, step)} | {key for key in found if key[:3] == (*newest, CHECKSUMS)}
        total = {doomed: total[doomed] for key, doomed in found.items() if key not in kept}
    return total


def export(study: Name, /, out: Path | None = None) -> None:
    """Write one row for every run to one parquet (or .csv) file: what was planned, what was spent, how it ended.

    Columns state, reason and attempts are as `lab status` has them; a result that is damaged has no numbers, and the reason.

    Example: lab export runs/quickstart --out quickstart.parquet

    Args:
        study: a study's directory, or the name of a study under runs/
        out: where to (default: runs.parquet in the study's directory; of one in an object store, in this machine's copy)
    """
    from analysis import frame

    store = Store(study_directory(study))
    statuses = {s.run_id: s for s in store.status()}  # which also copies what a publisher that died left to copy
    place = records_here(store)
    table = frame.load(place, damaged="keep")
    of_row = [statuses[run_id] for run_id in table["run_id"]]
    broken = table["status"] == "damaged"
    table["state"] = ["damaged" if bad else s.state for s, bad in zip(of_row, broken, strict=True)]
    table["reason"] = [said or s.reason for s, said in zip(of_row, table["reason"], strict=True)]
    table["attempts"] = [s.attempts for s in of_row]
    path = out or place / "runs.parquet"
    if path.suffix not in (".parquet", ".csv"):
        raise ValueError(f"out = {path}: end it in .parquet or .csv")
    if path.suffix == ".csv":
        table.to_csv(path, index=False)
    else:
        table.to_parquet(path, index=False)
    for run_id, reason in table.loc[broken, ["run_id", "reason"]].drop_duplicates().itertuples(index=False):
        print(f"damaged, and exported without numbers: {run_id}: {reason}")
    print(f"{len(table)} rows: {path}")


def matching(store: Store, beginnings: tuple[str, ...], *, one: bool = False) -> list[str]:
    """Ids of the plan that begin so; raises ValueError for a beginning of none, or of several where `one` is wanted."""
    found: dict[str, None] = {}
    for beginning in beginnings:
        ids = [beginning] if beginning in store.runs else [i for i in store.runs if i.startswith(beginning)]
        if not ids or (one and len(ids) > 1):
            what = (
                "none of its runs begins so" if not ids else f"{len(ids)} runs begin so, such as {ids[0]} and {ids[1]}"
            )
            raise ValueError(f"run = {beginning!r}: {what}; `lab status {store.root}` lists them")
        found.update(dict.fromkeys(ids))
    return list(found)


def study_directory(study: str) -> Path | str:
    """Of a study's directory (which may be in an object store), or of the name of a study under runs/."""
    if (found := _study(study)) is None:
        raise ValueError(
            f"{study}: no {records.PLAN} there nor under runs/{study}; give the directory that `lab run` wrote"
        )
    return found


def records_of(study: str) -> Path | None:
    """A directory of this machine with that study's plan and results; None where no study is there."""
    found = _study(study)
    return None if found is None else records_here(Store(found))


def records_here(store: Store) -> Path:
    """Store.records, with what of each run's history says which result counts where the study is in an object store."""
    place = store.records()
    if store.mirror is None:
        return place
    for run_id in store.files.names("runs"):
        there, here = f"runs/{run_id}/{records.HISTORY}", records.run_directory(place, run_id) / records.HISTORY
        shutil.rmtree(here, ignore_errors=True)  # a run may have been deleted there, and begun anew
        for name in store.files.names(there):
            if EVENT.fullmatch(name):
                records.write_bytes(here / name, store.files.read(f"{there}/{name}"))
    return place


def _study(study: str) -> Path | str | None:
    places = (study,) if is_remote(study) else (Path(study), Path("runs") / study)
    return next((place for place in places if files_at(place).exists(records.PLAN)), None)
