"""What happened to one run: history/0001.json, 0002.json, ..., one event a file, none of them ever changed.

    attempt    a worker holds the run (its owner); what it writes lies in attempts/<this event's number>-<owner's token>
    released   that worker let go, with its work saved
    ended      done, diverged or failed, by which attempt
    retry      somebody wants a failed run to be tried again
    cancelled  somebody wants it not to be trained

Who has seen event n as the last one and wants to say what comes next creates n+1 exclusively: one of many wins, and all the
others know. So an attempt publishes its result by creating the event after its own: it can not where another has taken the
run over, and nobody can take it over once it has. No lock is held that could be left behind, and an attempt's number is its
fencing number: what a superseded one writes lies in a directory of its own, and nothing refers to it.
"""

import json
import os
import re
import socket
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from lab import records
from sweeps.files import Files

Kind = Literal["attempt", "released", "ended", "retry", "cancelled"]
EVENT = re.compile(r"([0-9]{4,})\.json")
ENDS = ("done", "diverged", "failed")


@dataclass(frozen=True, kw_only=True)
class Owner:
    """Who holds a run. `machine` is where `pid` means one process; `token` is this one attempt's own."""

    host: str
    machine: str
    pid: int
    started: int | None  # clock ticks after boot; tells a process from a later one of the same pid
    token: str

    @staticmethod
    def here() -> "Owner":
        pid, host, token = os.getpid(), socket.gethostname(), uuid.uuid4().hex
        process = process_of(pid)
        return Owner(host=host, machine=_machine(), pid=pid, started=process[1] if process else None, token=token)

    def alive(self) -> bool | None:
        """Whether the process lives; None if it is another machine's, where this one can not look."""
        if self.machine != _machine():
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass  # another user's, and alive
        state, started = process_of(self.pid) or ("", None)
        # A zombie has ended; its parent has not looked yet.
        return state not in ("Z", "X") and (None in (started, self.started) or started == self.started)


@cache
def _machine() -> str:
    """One boot of one kernel and one namespace of process ids; host names are shared by containers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return socket.gethostname()


def process_of(pid: int) -> tuple[str, int] | None:
    """State letter and start time of a process, where the kernel shows them (proc(5): fields 3 and 22 of stat)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], int(fields[19])


@dataclass(frozen=True, kw_only=True)
class Event:
    number: int
    kind: Kind
    content: Mapping[str, Any]

    @property
    def owner(self) -> Owner:
        return Owner(**self.content["owner"])

    @property
    def directory(self) -> str:
        """Of an attempt: its own, also where a deleted run begins again at 1."""
        return f"{records.ATTEMPTS}/{self.number:04d}-{self.owner.token[:8]}"


class History:
    """The events of one run, under `<directory>/history`."""

    def __init__(self, files: Files, directory: str):
        self.files, self.directory = files, f"{directory}/history"

    def name(self, number: int) -> str:
        return f"{self.directory}/{number:04d}.json"

    def numbers(self) -> list[int]:
        """1 to n; raises ValueError where one between them is missing: what came after it can not be trusted."""
        numbers = sorted(int(found[1]) for name in self.files.names(self.directory) if (found := EVENT.fullmatch(name)))
        if numbers and numbers[-1] != len(numbers):
            missing = next(wanted for wanted, number in enumerate(numbers, 1) if wanted != number)
            raise self._damage(missing, "is missing, while a later one is there")
        return numbers

    def last(self) -> Event | None:
        numbers = self.numbers()
        return self.read(numbers[-1]) if numbers else None

    def read(self, number: int) -> Event:
        """Raises ValueError naming a file that is no event: nobody goes on from what can not be read."""
        path = f"{self.files}/{self.name(number)}"
        try:
            content = records.parse_json(self.files.read(self.name(number)), path)
        except ValueError as error:
            if error.__cause__ is None:  # whole, and of another version
                raise
            raise self._damage(number, f"not a whole JSON file ({error.__cause__})") from error
        kind = content.get("kind")
        if isinstance(kind, str) and kind not in get_args(Kind):
            raise ValueError(f"{path}: kind {kind!r} is not this version's; read it with the version that wrote it")
        if wrong := _wrong(content):
            raise self._damage(number, f"not an event ({wrong})")
        event = Event(number=number, kind=content["kind"], content=content)
        named = event.directory if kind == "attempt" else content["attempt"] if kind == "ended" else None
        # It may name files of this run's directory and no others.
        if named is not None and not records.PLACE.fullmatch(named):
            raise self._damage(number, f"not an event (attempt {named!r})")
        return event

    def _damage(self, number: int, what: str) -> ValueError:
        run = f"{self.files}/{self.directory.rpartition('/')[0]}"
        return ValueError(
            f"{self.files}/{self.name(number)}: {what}; restore it, or, once nobody works on it, delete {run} to train it again"
        )

    def deaths(self, last: Event | None) -> tuple[int, int]:
        """How many attempts up to `last`, one after another, came to nothing and began at the same step; and that step."""
        count, step = 0, last.content.get("from_step", 0) if last else 0
        while last is not None and last.kind == "attempt" and last.content.get("from_step", 0) == step:
            count += 1
            last = self.read(last.number - 1) if last.number > 1 else None
        return count, step

    def append(self, after: Event | int | None, kind: Kind, **content: Any) -> Event | None:
        """The event that follows `after`; None where something else followed it already."""
        number = (after.number if isinstance(after, Event) else after or 0) + 1
        whole = {"schema": records.SCHEMA, "kind": kind, **content}
        if number == 1:
            whole["began"] = uuid.uuid4().hex
        if not self.files.create(self.name(number), json.dumps(whole, indent=1).encode() + b"\n"):
            return None
        return Event(number=number, kind=kind, content=whole)

    def began(self) -> str:
        """Tells this history from that of a directory that was deleted."""
        return self.read(1).content.get("began", "")

    def attempt(self, after: Event | None, owner: Owner, **content: Any) -> Event | None:
        return self.append(after, "attempt", owner=asdict(owner), **content)


def _wrong(content: Mapping[str, Any]) -> str:
    """What an event must have and has not, or has of another type; '' where it has all."""

    def named(where: Mapping[str, Any], **types: type | tuple[type, ...]) -> str:
        return next((n for n, one in types.items() if n not in where or not _is(where[n], one)), "")

    kind = content.get("kind")
    if not isinstance(kind, str):
        return "kind"
    if not isinstance(content.get("began", ""), str):
        return "began"
    if kind == "ended":
        says = {"reason": str, "error": str} if content.get("status") == "failed" else {"sha256": str}
        return "status" if content.get("status") not in ENDS else named(content, attempt=str, **says)
    if kind != "attempt":
        return ""
    if not isinstance(owner := content.get("owner"), dict) or set(owner) != {f.name for f in fields(Owner)}:
        return "owner"
    if wrong := named(owner, host=str, machine=str, pid=int, started=(int, type(None)), token=str):
        return f"owner.{wrong}"
    if not 0 < owner["pid"] < 2**31:
        return "owner.pid"
    with_defaults = {"from_step": 0, "lease": 0.0, **content}
    return named(with_defaults, from_step=int, lease=(int, float))


def _is(value: Any, wanted: type | tuple[type, ...]) -> bool:
    return isinstance(value, wanted) and not isinstance(value, bool)
