"""What is shown of a study that runs: every state, a bar and a rest that count what is still to be trained, speeds."""

import io
import json
import os
import time
from dataclasses import replace

import pytest
from rich.console import Console

import sweeps
from lab import records
from sweeps import Study, arm, corpus
from sweeps.cli.control import status
from sweeps.cli.progress import Display
from sweeps.ladder import ladder
from sweeps.signs import sign_of
from sweeps.store import Status, Store


@pytest.fixture
def plan():
    study = Study(name="shown", question="?", baseline="a", budgets=(2e8,), batch=4, window=1, seeds=8, learning_rate=0.01,
                  arms={"a": arm("decoder_only", corpus("markov"), S=8, T=8)},
                  sizes=ladder(8, depth=1, head_width=8))  # fmt: skip
    return sweeps.plan(study)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def shown(plan):
    """A display on a fake clock that is no terminal, and what is printed at each look."""
    out, clock = io.StringIO(), Clock()
    display = Display(plan, Console(file=out, width=300), clock=clock)

    def look(after: float, *statuses: Status) -> str:
        clock.now += after
        at = out.tell()
        display.show(list(statuses))
        return out.getvalue()[at:].strip()

    return look


def states(plan, *given, **changes) -> list[Status]:
    """A status for each run of the plan, waiting beyond those given."""
    full = {"done": 1.0, "diverged": 1.0}
    named = [*given, *["waiting"] * (len(plan.unique) - len(given))]
    found = [
        Status(run_id=i, state=state, share=full.get(state, 0.0)) for i, state in zip(plan.unique, named, strict=True)
    ]
    return [replace(s, **changes) if s.state == "running" else s for s in found]


def test_every_state_is_counted(plan, shown):
    line = shown(30, *states(plan, "done", "running", "diverged", "failed", "cancelled", "damaged"))
    assert "1/8 done, 1 running, 2 waiting, 1 diverged, 1 failed, 1 cancelled, 1 damaged" in line
    line = shown(30, *states(plan, "done"))
    assert "1/8 done, 0 running, 7 waiting" in line and "failed" not in line and "cancelled" not in line


def test_the_bar_and_the_rest_count_what_is_to_be_trained(plan, shown):
    assert shown(30, *states(plan)).startswith("0.0%")
    half = states(plan, "done", "done", *["cancelled"] * 4)
    line = shown(100, *half)  # two of the four that are trained took the 130 s since the display began
    assert line.startswith("50.0%") and "2 min 10 s left" in line and "4 cancelled" in line
    line = shown(30, *states(plan, *["done"] * 3, *["failed"] * 4, "damaged"))
    assert line.startswith("100.0%") and "left" not in line
    assert shown(30, *states(plan, *["failed"] * 8)).startswith("100.0%")


def test_a_run_that_failed_is_no_progress(plan, shown):
    shown(30, *states(plan, "running", share=0.5))
    line = shown(30, *states(plan, "failed"))
    assert line.startswith("0.0%") and "left" not in line


def test_what_was_done_before_is_no_pace(plan, shown):
    shown(0, *states(plan, *["done"] * 4))
    line = shown(100, *states(plan, *["done"] * 5))
    assert "5 min 00 s left" in line  # three runs at 100 s each


def test_runs_that_the_plan_does_not_have_are_left_out(plan, shown):
    line = shown(30, *states(plan), Status(run_id="another", state="running"))
    assert "0/8 done, 0 running, 8 waiting" in line


def test_speed_of_what_runs(plan, shown):
    row = next(iter(plan.unique.values()))
    shown(30, *states(plan, "running", step=0, loss=3.0))
    line = shown(30, *states(plan, "running", step=60, loss=2.5, share=60 / row.planned["steps"]))
    assert f"{row.planned['tokens'] / row.planned['steps'] * 2:,.0f} tokens/s" in line


def test_it_does_not_look_more_often_than_it_has_to(plan):
    clock, looks = Clock(), []

    class Slow:
        def status(self):
            looks.append(clock.now)
            clock.now += 1  # a second a look
            return states(plan)

    display = Display(plan, Console(file=io.StringIO()), clock=clock)
    for _ in range(60):
        display(Slow())
        clock.now += 0.5
    assert len(looks) == 2 and looks[1] - looks[0] >= 20


# ---- one look -------------------------------------------------------------------------------------------------------


@pytest.fixture
def running(plan, tmp_path):
    """A study of which one run is held, with two lines of metrics and a heartbeat."""
    store = Store(tmp_path / "study")
    store.write_plan(plan.to_json())
    with store.claim(next(iter(store.runs))) as claim:
        claim.run_dir.mkdir(parents=True, exist_ok=True)
        claim.renew()
        yield store, claim


def written(claim, *lines) -> None:
    (claim.run_dir / records.METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9, "lo')


def test_speed_rest_and_sign_of_a_run(running):
    store, claim = running
    planned = store.runs[claim.run_id]["planned"]
    written(claim)
    assert sign_of(store, claim.run_id).speed is None and sign_of(store, claim.run_id).ago < 60
    lines = [
        {"step": 10, "loss": 2.0, "seconds": 5.0},
        {"step": 20, "held_out_loss": 2.0},
        {"step": 50, "loss": 1.0, "seconds": 25.0},
    ]
    written(claim, *lines)
    os.utime(claim.run_dir / "heartbeat.json", (time.time() - 95, time.time() - 95))
    sign = sign_of(store, claim.run_id)
    assert sign.speed == pytest.approx(2 * planned["tokens"] / planned["steps"])
    assert sign.left == pytest.approx((planned["steps"] - 50) / 2) and 90 < sign.ago < 120
    assert sign_of(store, list(store.runs)[1]).ago is None


def test_status_shows_them(running, capsys):
    store, claim = running
    written(
        claim,
        {"step": 10, "loss": 2.0, "seconds": 5.0, "share": 0.1},
        {"step": 50, "loss": 1.25, "seconds": 25.0, "share": 0.5},
    )
    status(str(store.root))
    out = capsys.readouterr().out
    head, line = out.splitlines()[:2]
    for name in ("tokens/s", "left", "last sign"):
        assert name in head
    assert claim.run_id in line and "1.2500" in line and " s ago" in line and "min" in line and "process" in line
    assert "0 done, 1 running, 7 waiting" in out
