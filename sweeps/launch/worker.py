"""One worker: claims runs of a study and trains them, one after another or side by side, in one process with its compiled
programs."""

import argparse
import contextlib
import errno
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from functools import cache, partial
from typing import Any, Protocol

from lab import secrets, spec, tracking
from lab.preemption import Preempted, Superseded, stop_flag
from lab.spec import Run
from sweeps.claim import Claim
from sweeps.launch.settings import Settings
from sweeps.queue import Queue
from sweeps.store import LOG, Reason, Store

log = logging.getLogger(__name__)
POLL_SECONDS = 0.5
# What a full, read-only, broken or forbidden disk says, a server of files that is away, and a process with too many open files.
TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.EACCES, errno.EPERM, errno.EMFILE,
           errno.ECONNREFUSED, errno.ECONNRESET, errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH)  # fmt: skip


class Trainer(Protocol):
    """Trains runs side by side (or one), each in its claim's run_dir, where it leaves its result.json."""

    def __call__(self, runs: list[Run], claims: list[Claim], superseded: Callable[[], bool]) -> Any: ...


class MachineTrouble(Exception):
    """This machine or its disk, not a run, is at fault: the worker leaves, and what it held waits for another."""


def work(
    store: Store,
    train: Trainer,
    program_key: Callable[[Run], str],
    *,
    pack_size: Callable[[Run], int] = lambda run: 1,
    workers: int = 1,
    poll_seconds: float = POLL_SECONDS,
    most_flops: float | None = None,
    until: float | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> None:
    """Until every run of the study has ended: claim one, and others of its program up to `pack_size(run)` (but no more
    than this one's share, where several `workers` are at the study: sweeps.queue); train them, publish them.

    Runs whose program this process has come first, runs whose program another worker is compiling come last. A run
    that raises is recorded as failed and the next one is taken; where several trained side by side each is then tried by
    itself. Runs that another worker holds are waited for, since that worker may die. lab.preemption.Preempted (a signal)
    passes through, with the runs saved. Raises MachineTrouble where files can not be written.

    most_flops: no run is begun once the study has spent so many exact FLOPs (Store.spent). until: nor after this time of
    `time.time()`. stopping: whether to leave, between runs.
    """
    mine: set[str] = set()
    keys: dict[str, str] = {}  # of each program that the queue tells apart: its key on this device
    queue = Queue(store)

    def key_of(row: dict[str, Any]) -> str:
        name = queue.program[row["run_id"]]
        if name not in keys:
            keys[name] = program_key(spec.from_json(row["run"]))
        return keys[name]

    while queue:
        if stopping():
            raise Preempted()
        if most_flops is not None and store.spent() >= most_flops:
            log.warning("the study has spent its %.3g FLOPs: nothing more is begun", most_flops)
            return
        if until is not None and time.time() >= until:
            log.warning("the study's time is over: nothing more is begun")
            return
        compiling = cache(store.compiling.held)  # asked once a key and round: many runs share a program

        def preference(row: dict[str, Any], compiling: Callable[[str], bool] = compiling) -> int:
            try:
                key = key_of(row)
            except Exception:  # it will say so when it is begun
                return 1
            return 0 if key in mine else 2 if compiling(key) else 1

        claim = queue.next(preference)
        if claim is None:
            time.sleep(poll_seconds)
            continue
        with contextlib.ExitStack() as held:
            taken: list[Claim] = []
            begun: list[tuple[Claim, Run]] = []

            def take(
                claim: Claim,
                held: contextlib.ExitStack = held,
                taken: list[Claim] = taken,
                begun: list[tuple[Claim, Run]] = begun,
            ) -> None:
                taken.append(held.enter_context(claim))
                with _failing(store, claim):
                    begun.append((claim, store.begin(claim)))

            take(claim)
            if begun:
                mine.add(key_of(claim.row))
                if (most := pack_size(begun[0][1])) > 1:
                    for other in queue.like(claim.row, min(most, queue.share(claim.row, workers)) - 1):
                        take(other)
            if len(begun) > 1 and _train_together(store, train, begun):
                begun = []
            for one in begun:
                _train_alone(store, train, *one)
            held.close()
            for one in taken:
                if not store.ended(one.run_id):
                    queue.back(one)
    if store.mirror:
        store.mirror.tidy()


def _train_together(store: Store, train: Trainer, begun: list[tuple[Claim, Run]]) -> bool:
    """Whether that worked; where not, each is to be tried by itself."""
    claims = [claim for claim, _ in begun]
    try:
        with contextlib.ExitStack() as watched:
            for claim in claims:
                watched.enter_context(claim.watched(alone=False))
            train([run for _, run in begun], claims, lambda: any(claim.lost.is_set() for claim in claims))
    except Superseded:
        return True
    except Exception as error:
        _raise_trouble(error)
        log.exception("%d runs side by side failed; each is tried by itself", len(begun))
        return False
    for claim in claims:
        store.publish(claim)
    return True


def _train_alone(store: Store, train: Trainer, claim: Claim, run: Run) -> None:
    with _logged(claim), _failing(store, claim), contextlib.suppress(Superseded):
        with claim.watched(alone=True):
            train([run], [claim], claim.lost.is_set)
        store.publish(claim)


@contextlib.contextmanager
def compiling(store: Store, claims: Sequence[Claim], name: str | None, compiled: set[str], key: str) -> Iterator[None]:
    """While the program `key` is compiled for these claims: others who need a program of this name wait, or prefer other runs
    (`work` asks by it; a pack, a mesh and each stage of a run have programs of their own). compiled: those that this process
    has, for which it waits for nobody. None: nobody waits."""
    with contextlib.ExitStack() as held:
        for claim in claims:
            held.enter_context(claim.compiling())
        if name is not None and key not in compiled:
            held.enter_context(store.compiling.hold(name))
        yield
    compiled.add(key)


@contextlib.contextmanager
def _logged(claim: Claim) -> Iterator[None]:
    """Warnings and errors of this attempt, in its own log.txt too."""
    try:
        claim.run_dir.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(claim.run_dir / LOG, encoding="utf-8", delay=True)
    except OSError as error:
        _raise_trouble(error)
        raise
    handler.setFormatter(secrets.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        with contextlib.suppress(OSError):  # a full disk
            handler.close()


@contextlib.contextmanager
def _failing(store: Store, claim: Claim) -> Iterator[None]:
    """Records why the run failed. Preempted and KeyboardInterrupt are no Exception: they pass, and the claim is released."""
    try:
        yield
    except MachineTrouble:
        raise
    except Exception as error:
        _raise_trouble(error)
        try:
            if claim.lost.is_set() or not claim.renew():
                return  # deleted or taken over under its feet, and so no fault of the run's
            log.exception("%s failed", claim.run_id)
            store.fail(claim, secrets.redacted(traceback.format_exc()), reason=_reason(error))
        except OSError as second:
            _raise_trouble(second)
            raise


def _reason(error: Exception) -> Reason:
    from lab.attempt import OutOfMemory

    return "out_of_memory" if isinstance(error, (MemoryError, OutOfMemory)) else "error"


def _work_on_this_machine(*given: Any, **options: Any) -> None:
    """`work`, where what the file system says outside of a run is this machine's trouble too."""
    try:
        work(*given, **options)
    except OSError as error:
        _raise_trouble(error)
        raise


def _raise_trouble(error: BaseException) -> None:
    """Raises MachineTrouble where the error, or what it came from, is the file system's."""
    cause: BaseException | None = error
    seen: set[int] = set()  # a chain may end in a circle
    while cause is not None and not (isinstance(cause, OSError) and cause.errno in TROUBLE):
        seen.add(id(cause))
        cause = cause.__cause__ or cause.__context__
        cause = None if id(cause) in seen else cause
    if cause is None:
        return
    where = f" ({cause.filename})" if cause.filename else ""
    raise MachineTrouble(
        f"{cause.strerror}{where}: this worker can not go on here. What it held waits, with its checkpoints, for another "
        "worker, or for `lab run` once this is mended"
    ) from error


def main() -> None:
    parser = argparse.ArgumentParser(description="Works on a study until all of it has ended; started by `lab run`.")
    parser.add_argument("study")
    parser.add_argument("--cores", help="processor numbers to stay on, such as 0,1")
    parser.add_argument("--workers", type=int, default=1, help="how many are at this study")
    for field in fields(Settings):
        kind = str if field.name in ("mesh", "hosts", "track") else int if field.name == "pack" else float
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default)
    arguments = parser.parse_args()
    settings = Settings(**{field.name: getattr(arguments, field.name) for field in fields(Settings)})
    if arguments.cores and hasattr(os, "sched_setaffinity"):
        # Before JAX starts: it makes as many threads as it sees cores.
        os.sched_setaffinity(0, {int(core) for core in arguments.cores.split(",")})
    with secrets.masked_threads(), stop_flag() as stop:
        _main(arguments.study, settings, arguments.workers, stop)


def _main(study: str, settings: Settings, workers: int, stop: threading.Event) -> None:
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    logging.getLogger().handlers[0].setFormatter(secrets.Formatter(logging.BASIC_FORMAT))
    logging.raiseExceptions = False  # a log that can not be written stops nothing
    import jax

    from lab import hardware
    from lab.mesh import Mesh, join_hosts
    from lab.program import program_key
    from lab.train import train_together
    from sweeps.launch import group

    if settings.hosts:
        join_hosts(settings.hosts)
    on = Mesh.read(settings.mesh) if settings.mesh else None
    if on:
        on.check_devices()  # else each run would be claimed, and fail of it
    kind, limit = jax.default_backend(), hardware.memory_limit()
    store = Store(study, lease=settings.lease, hang_seconds=settings.hang)
    orders = None
    if jax.process_count() > 1:
        if store.mirror:
            raise ValueError(f"{store.root}: hosts that train a run together need a directory that all of them see")
        orders = group.Orders(store.files)
        if jax.process_index() > 0:

            def obey(order: dict[str, Any]) -> None:
                runs = [spec.from_json(run) for run in order["runs"]]
                train_together(
                    runs, order["run_dirs"], earlier=order["earlier"], on=on, checkpoint_seconds=settings.checkpoint
                )

            group.follow(orders, obey, stop.is_set)
            return
    store.check_alone()

    name, compiled = store.plan["study"]["name"], set[str]()

    def train(runs: list[Run], claims: Sequence[Claim], superseded: Callable[[], bool]) -> None:
        def progress(*_: Any) -> None:
            for claim in claims:
                claim.progress()

        run_dirs, earlier = [claim.run_dir for claim in claims], [claim.earlier for claim in claims]
        order = {
            "runs": [spec.to_json(run) for run in runs],
            "run_dirs": [str(path) for path in run_dirs],
            "earlier": [[str(path) for path in paths] for paths in earlier],
        }
        with group.led(orders, **order):
            train_together(
                runs,
                run_dirs,
                earlier=earlier,
                on=on,
                compile_lock=partial(compiling, store, claims, None if orders else program_key(runs[0]), compiled),
                superseded=superseded,
                alive=progress,
                checkpoint_seconds=settings.checkpoint,
                track=tracking.read(settings.track),
                labels=[{"study": name, "arm": claim.row["arm"]} for claim in claims],
            )

    try:
        _work_on_this_machine(
            store,
            train,
            program_key,
            pack_size=lambda run: settings.pack or hardware.pack_size(run, run.V, kind, limit=limit),
            workers=workers,
            most_flops=settings.most_flops,
            until=settings.until,
            stopping=stop.is_set,
        )
        if orders:
            orders.give()
    except MachineTrouble as trouble:
        log.error("%s: %s", store.root, trouble)
        sys.exit(os.EX_IOERR)


if __name__ == "__main__":
    sys.excepthook = secrets.excepthook
    main()
