"""The command that tunes arms alike: tune."""

import os
import shlex
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.table import Table

from lab import records
from sweeps.launch.ray_node import Cluster
from sweeps.launch.settings import Settings
from sweeps.launch.slurm import Job

Name = Annotated[str, tyro.conf.Positional]
CLUSTER, JOB = Cluster(), Job()
WIDTH = 220  # of tables where there is no terminal


def tune(
    tuning: Name,
    /,
    preset: str = "small",
    out: str | None = None,
    data: str | None = None,
    tokenizer: str | None = None,
    rules: Path | None = None,
    dry: bool = False,
    workers: int | None = None,
    on: Literal["local", "ray", "slurm"] = "local",
    ray: Cluster = CLUSTER,
    slurm: Job = JOB,
    pack: int | None = None,
    mesh: str | None = None,
    flops: float | None = None,
    hours: float | None = None,
    until: str | None = None,
    retry: bool = False,
    replace_plan: bool = False,
) -> None:
    """Tune every arm alike and fit each its own rule: learning rate = c size^a tokens^b. Started again, it goes on where it was.

    As many trials for each arm, on seeds that no study has; a grid whose best rate lies at an edge is moved, for all arms.
    A study takes the rules with learning_rate="tuned:NAME", or "tuned:runs/tune-NAME/rules.json" (docs/tuning.md).

    Example: lab tune ladder --rules sweeps/rules/ladder.json
    Example: lab tune ladder --preset smoke
    Example: lab tune ./mine.py --out runs/tune-mine --dry

    Args:
        tuning: a shipped tuning, or a path to a file that defines tuning(preset)
        preset: which size of the tuning
        out: where trials, rules.json, tuning.md and CSV go (default: runs/tune-<its name>)
        data: other text than the tuning's own, as `lab data prepare` takes it, or a directory that it wrote
        tokenizer: of text that is not prepared (default: bytes)
        rules: write the rules here too, such as sweeps/rules/<name>.json to share them between studies
        dry: show the trials of the first round and what they cost, and go no further
        workers: as in `lab run`
        on: as in `lab run`; on slurm each call submits one round
        ray: which Ray cluster, and what each worker takes of it
        slurm: what each job asks Slurm for
        pack: as in `lab run`
        mesh: as in `lab run`
        flops: as in `lab run`
        hours: as in `lab run`
        until: as in `lab run`
        retry: try the failed trials again
        replace_plan: accept a plan that drops trials which were begun (their directories are kept)
    """
    from sweeps.cli import studies
    from sweeps.cli.data import of_source
    from sweeps.cli.tables import show
    from sweeps.plan import Plan
    from sweeps.store import Store
    from sweeps.tune import report
    from sweeps.tune import rules as files
    from sweeps.tune.rounds import source
    from sweeps.tune.rounds import tune as tune_rounds
    from sweeps.tune.trials import grid_trials
    from sweeps.tune.tuning import load

    console = Console(stderr=True)
    if rules is not None and rules.suffix != ".json":
        raise ValueError(f"rules = {str(rules)!r}: name a .json file")
    settings = Settings(pack=pack, mesh=mesh, most_flops=flops, until=studies.end_of(hours, until))
    studies.check_options(out or "", on=on, ray=ray, slurm=slurm, settings=settings, workers=workers)
    given = {"--preset": None if preset == "small" else preset, "--out": out, "--data": data, "--tokenizer": tokenizer}
    words = [word for name, value in given.items() if value is not None for word in (name, value)]
    again = shlex.join(["lab", "tune", tuning, *words, "--retry"])
    console.print(f"planning {tuning}; the first time, the corpus is read and tokenized")
    asked = load(tuning, preset, of_source(data, tokenizer), tokenizer=tokenizer)
    if dry:
        show(grid_trials(asked, asked.grids), Console(), workers=workers or os.cpu_count() or 1)
        return
    place = out or f"runs/tune-{asked.name}"
    if retry and Store(place).files.exists(records.PLAN):
        console.print(f"{Store(place).retry()} failed trials will be tried again")

    def train(plan: Plan) -> None:
        studies.train(plan, place, workers=workers, on=on, ray=ray, slurm=slurm, settings=settings,
                      replace_plan=replace_plan, again=again)  # fmt: skip

    tuned = tune_rounds(asked, place, train, say=lambda line: console.print(f"[yellow]note:[/] {line}", soft_wrap=True))
    if tuned is None:
        console.print("trials are left; the same command goes on with them")
        return
    directory = Store(place).records()
    found = report.write(tuned, source(tuned, place), directory)
    page = Console(highlight=False) if Console().is_terminal else Console(highlight=False, width=WIDTH)
    for table in report.tables(tuned, found):
        shown = Table(*table.heads, box=None, pad_edge=False)
        for row in table.rows:
            shown.add_row(*row)
        page.print(f"[bold]{table.title}[/]", shown, table.note, sep="\n", end="\n\n", soft_wrap=True)
    print(f"rules: {directory / report.RULES}; page: {directory / report.PAGE}")
    if rules is not None:
        files.write(rules, found)
        print(
            f'rules: {rules}; in a study: learning_rate="tuned:{rules.stem if rules.parent.name == "rules" else rules}"'
        )
