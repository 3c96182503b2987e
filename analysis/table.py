"""Any table of runs: CSV, parquet, JSON-lines, or the records of one of our own studies, with its columns checked.

The letters are those of laws: N parameters, D tokens, C FLOPs, loss in nats; `arm` and `run_id` where there are arms and
where several rows are of one run.
"""

# pandas' own annotations lose the type of a column; its errors are not this file's.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportReturnType=false

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.frame import finished, load
from analysis.problem import nearest
from lab import records

NUMBERS = ("N", "D", "C", "loss")
_STUDY = {"N": "parameters_body", "D": "tokens_seen", "C": "flops_exact"}
_CLUSTERS = ("run_id", "run", "hyper_id", "name")  # what a run is called in published tables
_UNITS = (1e3, 1e6, 1e9, 1e12)
_GAP, _SMALL = 500.0, 1e5  # between neighbours in a column of which no run is really as small
_UNIT_TOLERANCE = 3.0  # between C and 6 N D there is the way of counting, and not more


def read_table(
    path: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    where: str | None = None,
    drop_duplicates: bool = False,
) -> pd.DataFrame:
    """The runs in a .csv, .parquet or .jsonl file (also .gz), or the finished runs of the study in a directory.

    `columns` says what the file calls the letters, {"N": "params"}; `where` keeps the rows for which it holds, "D > 1e9".
    A compute column that is missing is 6 N D, in floats, and `attrs["C"]` says so. Raises ValueError, with the column, the
    row and the way out, for a file that can not be read, columns that are not there, numbers that are not positive and
    finite, rows given twice, and N, D or C in mixed units.
    """
    path = Path(path)
    frame, renamed = _read(path), dict(columns or {})
    for letter, name in renamed.items():
        if name not in frame:
            known = [str(column) for column in frame]
            raise ValueError(
                f"{path}: no column {name!r} for {letter}: {nearest(name, known)}it has {', '.join(known)}"
            )
    if path.is_dir():
        renamed = {letter: name for letter, name in _STUDY.items() if letter not in renamed} | renamed
    taken = [letter for letter, name in renamed.items() if letter in frame and letter != name]
    frame = frame.drop(columns=taken).rename(columns={name: letter for letter, name in renamed.items()})
    if where:
        frame = _kept(path, frame, where)
    if frame.empty:
        raise ValueError(
            f"{path}: no row{f' for which {where}' if where else ''}; give a table of runs that have ended"
        )
    for name in NUMBERS:
        if name in frame:
            frame[name] = _numbers(path, frame[name], name)
    frame = _without_duplicates(path, frame, drop_duplicates)
    if {"N", "D"} <= set(frame):
        _check_units(path, frame)
        if "C" not in frame:
            frame["C"] = 6.0 * frame["N"].to_numpy(float) * frame["D"].to_numpy(float)
            frame.attrs["C"] = "6 N D"
    frame = frame.reset_index(drop=True)
    return frame


def clusters_of(frame: pd.DataFrame) -> str | None:
    """The column by which rows belong together: of the names that runs usually have, one that repeats. Rows of one run
    are not independent, and an interval that takes them so is several times too sure."""
    for name in _CLUSTERS:
        if name in frame and frame[name].duplicated().any():
            return name
    return None


def _read(path: Path) -> pd.DataFrame:
    if path.is_dir():
        if not (path / records.PLAN).exists():
            raise ValueError(f"{path}: a directory without {records.PLAN}; give a study's directory or a file of runs")
        return finished(load(path))
    if not path.exists():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ValueError(
            f"{path}: no such file; {nearest(path.name, beside)}give a .csv, .parquet or .jsonl file of runs"
        )
    kind = [suffix for suffix in path.suffixes if suffix not in (".gz", ".xz", ".bz2", ".zst")][-1:]
    readers = {".csv": pd.read_csv, ".parquet": pd.read_parquet, ".jsonl": _read_lines, ".tsv": _read_tabs}
    if not kind or kind[0] not in readers:
        raise ValueError(f"{path}: {''.join(path.suffixes) or 'no ending'}: use one of {', '.join(readers)} (also .gz)")
    try:
        return readers[kind[0]](path)
    except (ValueError, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as {kind[0]}: {error}") from error


def _read_lines(path: Path) -> pd.DataFrame:
    return pd.read_json(path, lines=True)


def _read_tabs(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, sep="\t")


def _kept(path: Path, frame: pd.DataFrame, where: str) -> pd.DataFrame:
    if "@" in where or "__" in where:
        raise ValueError(f"where = {where!r}: use columns and numbers only, such as 'D > 1e9 and arm == \"moe\"'")
    try:
        keep = frame.eval(where, engine="python")
    except Exception as error:  # pandas raises anything from SyntaxError to TypeError here
        known = ", ".join(str(column) for column in frame)
        raise ValueError(f"{path}: where = {where!r}: {error}; the columns are {known}") from error
    keep = np.broadcast_to(np.asarray(keep), (len(frame),))
    if keep.dtype != bool:
        raise ValueError(f"where = {where!r} is {keep.dtype}, not true or false; compare a column with something")
    return frame[keep].copy()


def _numbers(path: Path, column: pd.Series, name: str) -> np.ndarray:
    values = pd.to_numeric(column, errors="coerce").to_numpy(float)
    bad = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
    if bad.size:
        row, more = int(bad[0]), f" (and {bad.size - 1} more rows)" if bad.size > 1 else ""
        given = column.iloc[row].item() if isinstance(column.iloc[row], np.generic) else column.iloc[row]
        keep = f'--where "{name} == {name}"' if np.isnan(float(values[row])) else f'--where "{name} > 0"'
        raise ValueError(
            f"{path}: {name} in row {column.index[row]} is {given!r}{more}: laws are fitted to positive finite "
            f"numbers (a run that diverged has no loss); mend the file or leave such rows out with {keep}"
        )
    return values


def _without_duplicates(path: Path, frame: pd.DataFrame, drop: bool) -> pd.DataFrame:
    hashable = frame[[c for c in frame if not frame[c].map(lambda v: isinstance(v, dict | list)).any()]]
    again = hashable.duplicated()
    if not again.any():
        return frame
    if drop:
        return frame[~again].copy()
    first = frame.index[int(np.flatnonzero(again.to_numpy())[0])]
    raise ValueError(
        f"{path}: row {first} is the same as one before it in every column ({int(again.sum())} such rows): a run that is "
        "counted twice makes intervals too narrow; remove it, or say --drop-duplicates"
    )


def _check_units(path: Path, frame: pd.DataFrame) -> None:
    """N, D or C in thousands or millions, in all rows or in some: seen against 6 N D where there is a C, else by a gap in
    the column that nothing fills."""
    if "C" in frame:
        off = frame["C"].to_numpy() / (6.0 * frame["N"].to_numpy() * frame["D"].to_numpy())
        for unit in _UNITS:
            for factor in (unit, 1 / unit):
                rows = np.flatnonzero(np.abs(np.log(off / factor)) < np.log(_UNIT_TOLERANCE))
                if rows.size:
                    share = "every row" if rows.size == len(off) else f"{rows.size} of {len(off)} rows"
                    raise ValueError(
                        f"{path}: C is about {factor:.0e} times 6 N D in {share} (row {frame.index[rows[0]]}): N, D or C are "
                        "in thousands, millions or billions there; write all of them in units"
                    )
    for name in ("N", "D"):
        ordered = np.sort(frame[name].to_numpy())
        steps = ordered[1:] / ordered[:-1]
        if len(steps) and steps.max() > _GAP and ordered[0] < _SMALL:
            cut = ordered[int(steps.argmax())]
            raise ValueError(
                f"{path}: {name} jumps from {cut:.6g} to {ordered[int(steps.argmax()) + 1]:.6g}: some rows seem to be in "
                "millions or billions; write all of them in units"
            )
