"""Any table of runs: CSV, parquet, JSON-lines, or the records of one of our own studies, with its columns checked.

    table = read_table("runs.csv", columns={"N": "params", "D": "tokens"}, where="tokens > 1e9")
    fit_law("chinchilla", table)

The letters are those of laws: N parameters, D tokens, C FLOPs, loss in nats; `arm` and `run_id` where there are arms and
where several rows are of one run. Nothing is dropped silently: what can not be fitted is an error that names the row,
counted from 1 below the header.
"""

# pandas' own annotations lose the type of a column; its errors are not this file's.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportReturnType=false, reportOperatorIssue=false, reportIndexIssue=false

import io
import itertools
import re
import tokenize
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
import pandas as pd
from scipy import optimize

from analysis.frame import finished, load
from analysis.problem import nearest
from lab import records

NUMBERS = ("N", "D", "C", "loss")
# Where a study's frame has a D and an L already, they are the model's width and depth.
STUDY = {"N": "parameters_body", "D": "tokens_seen", "C": "flops_exact"}
_CLUSTERS = ("run_id", "run", "run_name", "hyper_id", "model", "name", "experiment")  # what published tables call a run
_UNITS = (1e3, 1e6, 1e9, 1e12)
_UNIT_TOLERANCE = 3.0  # between C and 6 N D there is the way of counting, and not more
_GAP = 500.0  # between neighbours in a column, above which they may be in two units
_ROWS = 6  # below which losses contradict nothing
_EXPONENTS = (0.15, 0.25, 0.35, 0.5)
_TELLS = 0.5  # of the scatter about a law: what a change of unit must leave, at most, to be believed
# What `where` may call: enough to choose rows by, and nothing that writes.
_CALLS = frozenset({"isna", "notna", "isin", "between", "contains", "startswith", "endswith", "abs", "round", "lower"})


def read_table(
    path: str | Path,
    columns: Mapping[str, str] | None = None,
    where: str | None = None,
    *,
    needs: Sequence[str] = (),
    drop_duplicates: bool = False,
) -> pd.DataFrame:
    """The runs in a .csv, .tsv, .parquet or .jsonl file (also .gz), or the finished runs of the study in a directory.

    `columns` says what the file calls the letters, {"N": "params", "loss": "eval_loss"}; the file's own names stay beside
    them. `where` keeps the rows for which it holds, as in DataFrame.query: "D > 1e9 and arm == 'moe'". `needs` are the
    letters without which the table is of no use, as a law's columns. A compute column that is missing is 6 N D, in floats,
    and D is C / 6 N where D is needed; `attrs["notes"]` says so. The index is the row in the file. Raises ValueError, with
    the column, the row and the way out, for a file that can not be read, columns that are not there, numbers that are not
    positive and finite, needed columns that are constant, rows given twice, and N, D or C in mixed units.
    """
    path = Path(path)
    frame, named = _read(path), dict(columns or {})
    for letter, name in named.items():
        if name not in frame:
            _unknown(path, frame, letter, name)
    if path.is_dir():
        named = {letter: name for letter, name in STUDY.items() if letter not in named} | named
    if frame.empty:
        raise ValueError(f"{path}: no row below the header; give a table with a row for each run that has ended")
    # A column of the file whose letter another one takes is kept under another name.
    taken = {letter: f"{letter}_in_file" for letter, name in named.items() if letter in frame and letter != name}
    given = {letter: frame[name] for letter, name in named.items()}
    frame = frame.rename(columns=taken).assign(**given)
    frame.index = pd.RangeIndex(1, len(frame) + 1, name="row")
    if where:
        frame = _kept(path, frame, where)
    notes: list[str] = []
    letters = [name for name in dict.fromkeys((*needs, *NUMBERS)) if name in frame]
    unused = []
    for name in letters:
        try:
            frame = frame.assign(**{name: _numbers(path, frame[name], name)})
        except ValueError as error:
            # Compute that no one asked for, and that can be worked out, need not be right.
            if name != "C" or "C" in {*needs, *(columns or {})} or not {"N", "D"} <= set(frame):
                raise
            notes.append(f"The file's column C is not used: {str(error).split(': ', 1)[1].split(':')[0]}.")
            unused.append(name)
    frame = frame.drop(columns=unused)
    frame = _without_duplicates(path, frame, drop_duplicates, notes)
    frame = _completed(frame, needs, notes)
    for name in needs:
        if name not in frame:
            _unknown(path, frame, name, named.get(name, name))
        _varies(path, frame[name], name)
    if {"N", "D", "C"} <= set(frame):
        _check_compute(path, frame)
    for name in ("N", "D"):
        if {"loss", name} <= set(frame):
            _check_gap(path, frame, name)
    frame.attrs = {**frame.attrs, "source": str(path), "notes": tuple(notes)}
    return frame


def clusters_of(frame: pd.DataFrame) -> str | None:
    """The column by which rows belong together: of the names that runs usually have, one that repeats. Rows of one run
    are not independent, and an interval that takes them so is several times too sure.

    A name whose rows differ in N is that of a family of models, and not of a run.
    """
    for name in _CLUSTERS:
        repeats = name in frame and frame[name].duplicated().any() and frame[name].nunique() > 1
        if repeats and ("N" not in frame or frame.groupby(name, sort=False)["N"].nunique().max() == 1):
            return name
    return None


# --- reading ---------------------------------------------------------------------------------------------------------


def _read(path: Path) -> pd.DataFrame:
    if path.is_dir():
        if not (path / records.PLAN).exists():
            raise ValueError(f"{path}: a directory without {records.PLAN}; give a study's directory or a file of runs")
        done = finished(load(path))
        study = done.attrs.get("study")
        done = done.drop(columns=["loss_per_position", "versions"]).rename(columns={"D": "width", "L": "depth"})
        done.attrs = {"study": study}
        return done
    if not path.exists():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ValueError(
            f"{path}: no such file; {nearest(path.name, beside)}give a .csv, .parquet or .jsonl file of runs"
        )
    kind = [suffix.lower() for suffix in path.suffixes if suffix not in (".gz", ".xz", ".bz2", ".zst")][-1:]
    readers = {
        ".csv": _read_csv,
        ".parquet": _read_parquet,
        ".jsonl": _read_lines,
        ".ndjson": _read_lines,
        ".tsv": _read_tabs,
    }
    if not kind or kind[0] not in readers:
        raise ValueError(f"{path}: {''.join(path.suffixes) or 'no ending'}: use one of {', '.join(readers)} (also .gz)")
    try:
        return readers[kind[0]](path)
    except (ValueError, OSError, EOFError) as error:
        told = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: not readable as {kind[0]}: {told}; write the file again, or as CSV") from error


def _read_csv(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, low_memory=False)


def _read_tabs(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, sep="\t", low_memory=False)


def _read_lines(path: Path) -> pd.DataFrame:
    return pd.read_json(path, lines=True)


def _read_parquet(path: Path) -> pd.DataFrame:
    return pd.read_parquet(path).reset_index(drop=True)


def _unknown(path: Path, frame: pd.DataFrame, letter: str, name: str) -> NoReturn:
    known = [str(column) for column in frame]
    near = nearest(name, known) or nearest(name.lower(), known)
    raise ValueError(
        f"{path}: no column {name!r} for {letter}: {near}it has {', '.join(known)}; say which one it is with --columns "
        f"{letter}=NAME"
    )


# --- choosing rows ---------------------------------------------------------------------------------------------------


def _kept(path: Path, frame: pd.DataFrame, where: str) -> pd.DataFrame:
    known = ", ".join(str(column) for column in frame)
    _refuse_code(where)
    try:
        keep = frame.eval(where, engine="python", local_dict={}, global_dict={})
    except Exception as error:  # pandas raises anything from SyntaxError to TypeError here
        missing = re.match(r"name '(\w+)' is not defined", str(error))
        near = nearest(missing[1], [str(column) for column in frame]) if missing else ""
        raise ValueError(f"{path}: where = {where!r}: {error}; {near}the columns are {known}") from error
    if not isinstance(keep, pd.Series) or not (keep.dtype == bool or keep.isin([0, 1]).all()):
        what = keep.dtype if isinstance(keep, pd.Series) else type(keep).__name__
        raise ValueError(
            f"where = {where!r} is {what}, not true or false for each row; compare a column with something; the columns "
            f"are {known}"
        )
    chosen = frame[keep.astype(bool)].copy()
    if chosen.empty:
        raise ValueError(f"{path}: no row for which {where} among {len(frame)}; the columns are {known}")
    return chosen


def _refuse_code(where: str) -> None:
    """An expression chooses rows; it does not run anything else."""
    plain = re.sub(r"`[^`]*`", "column", where)
    quoted = re.sub(r"'[^']*'|\"[^\"]*\"", "text", plain)
    if "@" in quoted or "__" in quoted:
        raise ValueError(f"where = {where!r}: use columns and numbers only, such as 'D > 1e9 and arm == \"moe\"'")
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(plain.strip()).readline))
    except (tokenize.TokenError, SyntaxError) as error:
        raise ValueError(f"where = {where!r}: {error.args[0]}; write it as in 'D > 1e9 and loss < 4'") from error
    for token, following in itertools.pairwise(tokens):
        called = token.type == tokenize.NAME and token.string not in ("and", "or", "not", "in")
        if called and following.string == "(" and token.string not in _CALLS:
            raise ValueError(
                f"where = {where!r}: {token.string}() can not be called here; use {', '.join(sorted(_CALLS))}"
            )


# --- checks ----------------------------------------------------------------------------------------------------------


def _numbers(path: Path, column: pd.Series, name: str) -> pd.Series:
    """As float64, in which 6 N D does not overflow."""
    values = pd.to_numeric(column, errors="coerce").astype(float)
    bad = ~(np.isfinite(values) & (values > 0))
    if bad.any():
        row = bad.idxmax()
        given = column[row].item() if isinstance(column[row], np.generic) else column[row]
        more = f" (and {bad.sum() - 1} more rows)" if bad.sum() > 1 else ""
        letter = name if name.isidentifier() else f"`{name}`"
        if isinstance(given, str):
            keep = f"--where '{letter} != \"{given}\"'"
        else:
            keep = f'--where "{letter} == {letter}"' if np.isnan(values[row]) else f'--where "0 < {letter} < inf"'
        raise ValueError(
            f"{path}: {name} in row {row} is {given!r}{more}: laws are fitted to positive finite numbers (a run that "
            f"diverged has no loss); mend the file or leave such rows out with {keep}"
        )
    return values


def _without_duplicates(path: Path, frame: pd.DataFrame, drop: bool, notes: list[str]) -> pd.DataFrame:
    try:
        again = frame.duplicated()
    except TypeError:  # lists and mappings, from JSON
        again = frame.astype(str).duplicated()
    if not again.any():
        return frame
    if drop:
        notes.append(f"{again.sum()} rows are the same as one before them in every column and were dropped.")
        return frame[~again].copy()
    raise ValueError(
        f"{path}: row {again.idxmax()} is the same as one before it in every column ({again.sum()} such rows): a run that is "
        "counted twice makes intervals too narrow; remove it, or say --drop-duplicates; where it is another run, add a "
        "column that tells them apart"
    )


def _completed(frame: pd.DataFrame, needs: Sequence[str], notes: list[str]) -> pd.DataFrame:
    if {"N", "D"} <= set(frame) and "C" not in frame:
        notes.append("The table has no compute: C is 6 N D.")
        return frame.assign(C=6.0 * frame["N"] * frame["D"])
    if {"N", "C"} <= set(frame) and "D" not in frame and "D" in needs:
        notes.append("The table has no tokens: D is C / (6 N).")
        return frame.assign(D=frame["C"] / (6.0 * frame["N"]))
    return frame


def _varies(path: Path, column: pd.Series, name: str) -> None:
    if len(column) > 1 and column.nunique() == 1:
        raise ValueError(
            f"{path}: {name} is {column.iloc[0]:g} in all {len(column)} rows: a constant column determines no law; add runs "
            f"that differ in it, or use a law without {name}"
        )


def _check_compute(path: Path, frame: pd.DataFrame) -> None:
    """N, D or C in thousands or millions, in all rows or in some, seen against 6 N D."""
    off = frame["C"] / (6.0 * frame["N"] * frame["D"])
    for unit in _UNITS:
        for factor in (unit, 1 / unit):
            rows = (off / factor).between(1 / _UNIT_TOLERANCE, _UNIT_TOLERANCE)
            if rows.any():
                share = "every row" if rows.all() else f"{rows.sum()} of {len(off)} rows"
                raise ValueError(
                    f"{path}: C is about {factor:.0e} times 6 N D in {share} (row {rows.idxmax()}): N, D or C are "
                    "in thousands, millions or billions there; write all of them in units"
                )


def _check_gap(path: Path, frame: pd.DataFrame, name: str) -> None:
    """A wide gap in N or D is one of units where a law goes through the losses only without it: a table may well have very
    small and very large runs."""
    ordered = np.sort(frame[name].unique())
    steps = ordered[1:] / ordered[:-1]
    if len(frame) < _ROWS or not len(steps) or steps.max() < _GAP:
        return
    below, above = ordered[steps.argmax()], ordered[steps.argmax() + 1]
    low = (frame[name] <= below).to_numpy()
    loss = frame["loss"].to_numpy()
    x = {letter: frame[letter].to_numpy() for letter in ("N", "D") if letter in frame}

    def scatter(factor: float) -> float:
        """Of E + A N^-alpha + B D^-beta, none of them negative, with the best exponents of a grid."""
        moved = {letter: value * factor**low if letter == name else value for letter, value in x.items()}
        powers = {
            letter: [np.exp(-p * np.log(value / value.min())) for p in _EXPONENTS] for letter, value in moved.items()
        }
        least = np.inf
        for terms in itertools.product(*powers.values()):
            Q, R = np.linalg.qr(np.stack([np.ones_like(loss), *terms], axis=1))
            found, _ = optimize.nnls(R, Q.T @ loss)
            least = min(least, float(np.sqrt(np.mean((loss - Q @ (R @ found)) ** 2))))
        return least

    left = {factor: scatter(factor) for factor in _UNITS}
    factor = min(left, key=lambda one: left[one])
    if left[factor] < _TELLS * scatter(1.0):
        row = frame.index[np.argmax(frame[name].to_numpy() == below)]
        raise ValueError(
            f"{path}: {name} jumps from {below:.6g} (row {row}) to {above:.6g}, and the losses of the {low.sum()} rows below "
            f"fit the others only if their {name} is times {factor:.0e}: some rows are in thousands, millions or billions; "
            "write all of them in units"
        )
