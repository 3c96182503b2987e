"""The command that measures reference times: calibrate."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from lab.spec import Budget, Run, Seed
from sweeps.cli.runs import read
from sweeps.plan import plan
from sweeps.study import load


def calibrate(
    what: Annotated[str, tyro.conf.Positional],
    /,
    out: Path = Path("reference_times.json"),
    steps: int = 1000,
    preset: str = "small",
) -> None:
    """Measure the reference times of all operations that a study's runs, or one run, can be charged, on the device at hand.

    What is in the file already, from the same machine, is not measured again. Measure on an idle device.

    Example: lab calibrate ./mine.py --out a100.json
    Example: lab calibrate run.json --steps 200

    Args:
        what: a study (its name or file), a run.json, or a run's directory
        out: the table, a JSON file, to which a budget of reference_seconds refers
        steps: runs of each operation, each waited for
        preset: of the study
    """
    from lab.calibrate import calibrate as measure

    console = Console(stderr=True)

    def show(key: str, number: int, of: int) -> None:
        console.print(f"{number + 1} of {of}: {key}", highlight=False, soft_wrap=True)

    table = measure(runs_of(what, preset), out, steps=steps, on_progress=show)
    shown = Table("operation", "milliseconds", box=None, pad_edge=False)
    for key, seconds in table.entries.items():
        shown.add_row(key, f"{seconds * 1e3:.4g}")
    Console().print(shown)
    print(f"{out}: SHA-256 {table.sha256}; lab.reference_times.budget({str(out)!r}, seconds) is a budget in it")


def runs_of(what: str, preset: str) -> list[Run]:
    """Of a run.json, or of a plan, its runs; those that differ in seed, rate or budget alone need the same operations."""
    path = Path(what)
    if path.suffix == ".json" or path.is_dir():
        return [read(path)[0]]
    found: dict[Run, Run] = {}
    for row in plan(load(what, preset)).unique.values():
        run = row.run
        alike = replace(
            run, seed=Seed(), budget=Budget(amount=1.0), optimizer=replace(run.optimizer, learning_rate=1.0)
        )
        found.setdefault(alike, run)
    return list(found.values())
