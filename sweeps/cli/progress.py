"""What `lab run` shows while it works: the whole, and each run in progress, with loss, tokens/s and what is left."""

import time
from collections import deque
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


class Display:
    """Call it with the store about twice a second."""

    def __init__(self, plan: Plan, console: Console):
        self.console, self.began, self.reported, self.due = console, time.monotonic(), 0.0, 0.0
        self.rows = plan.unique
        self.seconds = {i: row.seconds_estimated for i, row in self.rows.items()}
        self.first_share: float | None = None
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
        began = time.monotonic()
        if began < self.due:
            return
        self._show(store.status())
        self.due = time.monotonic() + REST * (time.monotonic() - began)

    def _show(self, statuses: list[Status]) -> None:
        share = sum(self.seconds[s.run_id] * s.share for s in statuses) / sum(self.seconds.values())
        if self.first_share is None:
            self.first_share = share
        note = self._whole(statuses, share)
        self.whole.update(self.task, completed=share, note=note)
        running = [s for s in statuses if s.state == "running"]
        for run_id in list(self.tasks):
            if run_id not in {s.run_id for s in running}:
                self.runs.remove_task(self.tasks.pop(run_id))
        for s in running:
            if s.run_id not in self.tasks:
                self.tasks[s.run_id] = self.runs.add_task(s.run_id, total=1.0, note="compiling")
            self.runs.update(self.tasks[s.run_id], completed=s.share, note=self._run(s))
        if not self.console.is_terminal and time.monotonic() - self.reported > REPORT_SECONDS:
            self.reported = time.monotonic()
            self.console.print(Text(f"{share:5.1%}  {note}"), soft_wrap=True)

    def _whole(self, statuses: list[Status], share: float) -> str:
        count = {state: sum(s.state == state for s in statuses) for state in ("done", "running", "diverged", "failed")}
        note = f"{count['done']}/{len(statuses)} done, {count['running']} running"
        note += "".join(f", {count[state]} {state}" for state in ("diverged", "failed") if count[state])
        assert self.first_share is not None
        gained, elapsed = share - self.first_share, time.monotonic() - self.began
        if gained > 0.01:
            note += f", {_duration(elapsed / gained * (1 - share))} left"
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
        return f"loss {s.loss:.3f}, {speed:,.0f} tokens/s, {_duration(left)} left"

    def _flops_a_token(self, run_id: str) -> float:
        planned = self.rows[run_id].planned
        return planned["exact"] / planned["tokens"]

    def _speed(self, s: Status) -> float | None:
        """Tokens a second over the last minute of this display."""
        if s.step is None:
            return None
        now, seen = time.monotonic(), self.history.setdefault(s.run_id, deque())
        if not seen or seen[-1][1] != s.step:
            seen.append((now, s.step))
        while len(seen) > 2 and now - seen[0][0] > WINDOW_SECONDS:
            seen.popleft()
        if len(seen) < 2:
            return None
        row = self.rows[s.run_id]
        tokens = row.planned["tokens"] / row.planned["steps"] * (seen[-1][1] - seen[0][1])
        return tokens / (seen[-1][0] - seen[0][0])


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes // 60} h {minutes % 60:02d} min"
        if minutes >= 60
        else f"{minutes} min {rest:02d} s"
        if minutes
        else f"{rest} s"
    )
