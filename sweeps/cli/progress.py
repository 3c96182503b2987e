"""What `lab run` shows while it works: the whole, and each run in progress, with loss, tokens/s and what is left."""

import math
import time
from collections import Counter, deque
from collections.abc import Callable
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from sweeps.plan import Plan
from sweeps.store import Status, Store

REPORT_SECONDS = 20.0  # between lines where there is no terminal
REST = 20.0  # times as long as it took to look at the study, it is left alone: 100,000 runs take a second to look at
WINDOW_SECONDS = 60.0  # over which a run's speed is measured
GIVEN_UP = ("failed", "cancelled", "damaged")  # states of runs that nobody goes on with
LEAST_GAIN = 0.01  # of the work, before what is left is estimated


class Display:
    """Call it with the store about twice a second. The bar and what is left count runs that are trained: not those that
    failed, were cancelled or are damaged, which nobody will go on with."""

    def __init__(self, plan: Plan, console: Console, *, clock: Callable[[], float] = time.monotonic):
        self.console, self.clock, self.began = console, clock, clock()
        self.reported = self.due = -math.inf
        self.rows = plan.unique
        self.seconds = {i: row.seconds_estimated for i, row in self.rows.items()}
        self.first: dict[str, float] = {}  # the share of each run when this display first saw it
        self.history: dict[str, deque[tuple[float, int]]] = {}
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.percentage:>3.0f}%"),
                   TextColumn("{task.fields[note]}"))  # fmt: skip
        self.whole = Progress(*columns, TimeElapsedColumn(), console=console)
        self.runs = Progress(*columns, console=console)
        self.task = self.whole.add_task("all runs", total=1.0, note="")
        self.tasks: dict[str, TaskID] = {}
        self.live = Live(Group(self.whole, self.runs), console=console, refresh_per_second=4, transient=True)

    def __enter__(self) -> "Display":
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.live.stop()

    def __call__(self, store: Store) -> None:
        began = self.clock()
        if began < self.due:
            return
        self.show(store.status())
        self.due = self.clock() + REST * (self.clock() - began)

    def show(self, statuses: list[Status]) -> None:
        statuses = [s for s in statuses if s.run_id in self.rows]  # the plan may have gained some since
        for s in statuses:
            self.first.setdefault(s.run_id, s.share)
        share, note = self._share(statuses), self._whole(statuses)
        self.whole.update(self.task, completed=share, note=note)
        running = [s for s in statuses if s.state == "running"]
        for run_id in list(self.tasks):
            if run_id not in {s.run_id for s in running}:
                self.runs.remove_task(self.tasks.pop(run_id))
        for s in running:
            if s.run_id not in self.tasks:
                self.tasks[s.run_id] = self.runs.add_task(s.run_id, total=1.0, note="compiling")
            self.runs.update(self.tasks[s.run_id], completed=s.share, note=self._run(s))
        if not self.console.is_terminal and self.clock() - self.reported > REPORT_SECONDS:
            self.reported = self.clock()
            self.console.print(Text(f"{share:5.1%}  {note}"), soft_wrap=True)

    def _share(self, statuses: list[Status]) -> float:
        """Of the work of all runs that are trained, what is done; 1 where there are none."""
        counted = [s for s in statuses if s.state not in GIVEN_UP]
        whole = sum(self.seconds[s.run_id] for s in counted)
        return sum(self.seconds[s.run_id] * s.share for s in counted) / whole if whole else 1.0

    def _left(self, statuses: list[Status]) -> float | None:
        """Seconds until the runs that wait or run have ended, at the pace since this display began; None while it is too
        early to say."""
        at_work = [s for s in statuses if s.state in ("done", "running", "waiting")]
        gained = sum(self.seconds[s.run_id] * (s.share - self.first[s.run_id]) for s in at_work)
        left = sum(self.seconds[s.run_id] * (1 - s.share) for s in at_work)
        if left <= 0 or gained <= LEAST_GAIN * (gained + left):
            return None
        return (self.clock() - self.began) / gained * left

    def _whole(self, statuses: list[Status]) -> str:
        count = Counter(s.state for s in statuses)
        note = f"{count['done']}/{len(statuses)} done, {count['running']} running, {count['waiting']} waiting"
        note += "".join(f", {count[state]} {state}" for state in ("diverged", *GIVEN_UP) if count[state])
        if (left := self._left(statuses)) is not None:
            note += f", {duration(left)} left"
        speeds = {s.run_id: self._speed(s) or 0.0 for s in statuses if s.state == "running"}
        if not (tokens := sum(speeds.values())):
            return note
        flops = sum(speed * self._flops_a_token(run_id) for run_id, speed in speeds.items())
        return note + f", {tokens:,.0f} tokens/s, {flops:.3g} exact FLOP/s"

    def _run(self, s: Status) -> str:
        if s.loss is None:
            return "starting"
        speed = self._speed(s)
        if not speed:
            return f"loss {s.loss:.3f}"
        left = (1 - s.share) * self.rows[s.run_id].planned["tokens"] / speed
        return f"loss {s.loss:.3f}, {speed:,.0f} tokens/s, {duration(left)} left"

    def _flops_a_token(self, run_id: str) -> float:
        planned = self.rows[run_id].planned
        return planned["exact"] / planned["tokens"]

    def _speed(self, s: Status) -> float | None:
        """Tokens a second over the last minute of this display."""
        if s.step is None:
            return None
        now, seen = self.clock(), self.history.setdefault(s.run_id, deque())
        if not seen or seen[-1][1] != s.step:
            seen.append((now, s.step))
        while len(seen) > 2 and now - seen[0][0] > WINDOW_SECONDS:
            seen.popleft()
        if len(seen) < 2:
            return None
        row = self.rows[s.run_id]
        tokens = row.planned["tokens"] / row.planned["steps"] * (seen[-1][1] - seen[0][1])
        return tokens / (seen[-1][0] - seen[0][0])


def duration(seconds: float) -> str:
    """Such as 3 h 05 min."""
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes // 60} h {minutes % 60:02d} min"
        if minutes >= 60
        else f"{minutes} min {rest:02d} s"
        if minutes
        else f"{rest} s"
    )
