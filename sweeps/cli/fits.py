"""Commands on any table of runs: fit, report."""

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from sweeps.cli import studies
from sweeps.cli.control import records_of

if TYPE_CHECKING:  # pandas and jax load when a command runs, not for --help
    from analysis.fit_answer import FitAnswer

Name = Annotated[str, tyro.conf.Positional]


@dataclass(frozen=True, kw_only=True)
class Options:
    """How the law is fitted and judged."""

    law: str = "chinchilla"
    """one of the laws: chinchilla, chinchilla_tied, chinchilla_gamma, kaplan, power_law_with_asymptote, ..."""
    where: str | None = None
    """which rows, such as "N > 1e7 and set == 'c4'" """
    columns: str = ""
    """what the table calls the law's columns: N=params,D=tokens"""
    loss: str = "loss"
    """the column of losses, in nats"""
    weights: str | None = None
    """a column of weights"""
    delta: str = "scatter"
    """Huber's constant of log residuals: 'scatter' takes it from them, a number such as the 1e-3 of the literature, 'inf' for
    least squares"""
    outliers: Literal["beyond_4_sd", "beyond_3_sd", "five_highest_losses"] | None = None
    """a rule that leaves rows out, in the fit and in every resample"""
    quantile: float = 0.5
    """which quantile of the losses the law goes through"""
    fix: tuple[str, ...] = ()
    """parameters held at a value: alpha=.35, or rho_N[base]=1"""
    tie: tuple[str, ...] = ()
    """parameters made equal: beta=alpha"""
    per_arm: str = ""
    """parameters with a value for every arm: A,B"""
    arm: str = "arm"
    """the column that names arms"""
    clusters: str | None = None
    """the column that says which rows are of one run, or are not independent otherwise"""
    method: Literal["bootstrap", "jackknife", "wild", "sandwich"] | None = None
    """of intervals (default: the one that covers best for this delta)"""
    draws: int = 1000
    """resamples; 0 for no intervals"""
    holdout: str = "rolling"
    """'rolling' cuts, 'none', or the FLOPs up to which the law is fitted to predict the rest: 3e20 or 1e20,1e21"""
    starts: int | None = None
    """random starts of the fit (default: 64, fewer for very many rows)"""
    seed: int = 0
    """of starts and resamples"""
    laws: str = "all"
    """those that the page sets beside this one: 'all' of the same columns (a minute or two), 'none', or kaplan,farseer,..."""
    drop_duplicates: bool = False
    """keep one of rows that repeat another exactly, instead of refusing them"""


Fitted = Annotated[Options, tyro.conf.arg(name=""), tyro.conf.OmitArgPrefixes]


def fit(table: Name, /, options: Fitted = Options(), out: Path | None = None) -> None:
    """Fit a scaling law to any table of runs: parameters with intervals, hold-out score, and whether to trust them.

    Example: lab fit runs.csv --law chinchilla --columns N=params,D=tokens --where "tokens > 1e9" --out fit
    Example: lab fit runs/quickstart --law chinchilla --per-arm A,B --clusters run_id
    Example: lab fit runs.parquet --law power_law_with_asymptote --delta 1e-3 --holdout 1e20

    Args:
        table: a .csv, .parquet or .jsonl file (also .gz), or a study's directory, whose finished runs are fitted
        options: how
        out: write the page fit.html, fit.json and runs.csv there (default: print only)
    """
    if out is None and options.laws != Options().laws:
        raise ValueError(f"laws = {options.laws!r}: other laws stand on the page only; add --out DIR")
    laws = _laws(options)
    found, console = _fitted(table, options)
    print(_text(found))
    if out is not None:
        _page(found, out, laws, console)


def report(
    table_or_study: Name, /, options: Fitted = Options(), out: Path | None = None, publish: Path | None = None
) -> None:
    """Print an answer and write it as one web page: the verdict on a study's arms, or a law fitted to a table.

    Example: lab report runs/quickstart
    Example: lab report runs.csv --law chinchilla --columns N=params,D=tokens

    Args:
        table_or_study: a study's directory, the name of a study under runs/, or a file as for `lab fit`
        options: how the law is fitted to a table; a study's report takes none
        out: where the page goes (default: the study's directory, or this machine's copy of one in an object store; a table's
            name, with -fit)
        publish: of a study, a directory for files that a repository keeps: <name>.md, its runs as CSV, figures as PNG
    """
    path = Path(table_or_study)
    if publish is not None and path.is_file():
        raise ValueError(
            f"publish = {str(publish)!r}: a study's answer is published; {table_or_study} is a table, use --out"
        )
    if not path.is_file():
        if options != Options():
            raise ValueError(
                f"{table_or_study}: a study's report takes no options of a fit; use lab fit {table_or_study} ..."
            )
        studies.report(table_or_study, out, publish)
        return
    laws = _laws(options)
    found, console = _fitted(table_or_study, options)
    print(_text(found))
    _page(found, out or Path(f"{path.name.split('.')[0]}-fit"), laws, console)


def _text(found: "FitAnswer") -> str:
    from analysis.fit_report import text

    return text(found)


def _fitted(table: str, options: Options) -> tuple["FitAnswer", Console]:
    from analysis.fit import LEAST_SQUARES, named
    from analysis.fit_answer import analyse_fit
    from analysis.table import read_table
    from sweeps.cli.sources import pairs_of

    columns = pairs_of(options.columns, "columns")
    if options.loss != "loss":
        columns["loss"] = options.loss
    law = named(options.law)
    delta: Any = options.delta
    if delta != "scatter":
        delta = LEAST_SQUARES if delta == "inf" else number(delta, "delta")
    console = Console(stderr=True)
    path = records_of(table) or Path(table)
    with console.status(f"reading {path}"):
        runs = read_table(
            path,
            columns=columns,
            where=options.where,
            needs=(*law.columns, "loss"),
            drop_duplicates=options.drop_duplicates,
        )
    with _progress(console) as tell:
        found = analyse_fit(
            runs,
            law,
            arm=options.arm,
            clusters=options.clusters,
            weights=options.weights,
            draws=options.draws,
            method=options.method,
            holdout=cuts(options.holdout),
            starts=options.starts,
            seed=options.seed,
            delta=delta,
            outliers=options.outliers,
            quantile=options.quantile,
            fixed={name: number(value, f"fix: {name}") for name, value in each(options.fix, "fix").items()},
            tied=each(options.tie, "tie"),
            per_arm=tuple(filter(None, (name.strip() for name in options.per_arm.split(",")))),
            progress=tell,
        )
    return found, console


def _laws(options: Options) -> list[str] | None:
    """Names of the laws to set beside the fitted one; None for all of the same columns."""
    from analysis.fit import named

    if options.laws in ("all", "none"):
        return None if options.laws == "all" else []
    return [named(name.strip()).name for name in options.laws.split(",")]


def _page(found: "FitAnswer", out: Path, laws: list[str] | None, console: Console) -> None:
    from analysis.fit_report import fit_report

    command = shlex.join(["lab", *sys.argv[1:]]) if Path(sys.argv[0]).name == "lab" else ""
    with _progress(console) as tell:
        page = fit_report(found, out, laws=laws, command=command, progress=tell)
    print(f"report: {page}")


@contextmanager
def _progress(console: Console) -> Iterator[Any]:
    """One bar for each part that is under way; it leaves nothing behind, and shows nothing where there is no terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:.0f} of {task.total:.0f}"),
    )
    with Progress(
        *columns, TimeElapsedColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as shown:
        tasks: dict[str, Any] = {}

        def tell(what: str, done: int, of: int) -> None:
            if what not in tasks:
                for other in tasks.values():
                    shown.update(other, visible=False)
                tasks[what] = shown.add_task(what, total=of)
            shown.update(tasks[what], completed=done, total=of)

        yield tell


# --- what words mean -------------------------------------------------------------------------------------------------


def each(words: tuple[str, ...], field: str) -> dict[str, str]:
    """Pairs given apart or with commas."""
    from sweeps.cli.sources import pairs_of

    return pairs_of(",".join(words), field)


def number(text: str, field: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f"{field} = {text!r}: use a number") from error


def cuts(text: str) -> tuple[float, ...] | None:
    """FLOPs to cut at: () for rolling cuts, None for none."""
    if text in ("rolling", "none"):
        return () if text == "rolling" else None
    return tuple(number(part, "holdout") for part in text.split(","))
