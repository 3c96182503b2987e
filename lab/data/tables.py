"""JSON-lines (also .gz) and parquet files, one or a folder of them: each record is a document. A broken one is an error that
names file and line: where every record should be text, one that is not says that something is wrong."""

import codecs
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lab.data.columns import Columns, Text
from lab.data.documents import (
    LONGEST_RECORD,
    MB,
    Document,
    Listing,
    Part,
    digest,
    gather,
    part_size,
    states,
    too_long,
    unreadable,
)
from lab.data.text_files import existing, folder_files, line_number

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".json.gz")
PARQUET_SUFFIXES = (".parquet", ".pq")
_AT_ONCE = 8 * MB  # of a parquet file, decoded


def jsonl(
    path: str | None = None,
    *,
    column: str | None = None,
    source_column: str | None = None,
    target_column: str | None = None,
) -> Listing:
    """JSON-lines: an object a line. Files that are not packed are cut into parts; a .gz is one part."""

    def parts(file: Path, shown: str, columns: Columns, size: int, most: int) -> Iterator[Part]:
        if file.name.endswith(".gz"):
            yield Part(size=size, read=_reader("jsonl", _packed_lines, file, shown, columns))
            return
        for start in range(0, max(size, 1), most):
            end = min(start + most, size)
            yield Part(size=end - start, read=_reader("jsonl", _lines, file, shown, columns, start, end))

    return _listing("jsonl", path, JSON_SUFFIXES, Columns.of(column, source_column, target_column), parts)


def parquet(
    path: str | None = None,
    *,
    column: str | None = None,
    source_column: str | None = None,
    target_column: str | None = None,
) -> Listing:
    """Parquet: a row is a document; parts are row groups."""

    def parts(file: Path, shown: str, columns: Columns, size: int, most: int) -> Iterator[Part]:
        with _opened(file) as opened:
            columns.check(opened.schema_arrow, str(file))
            metadata = opened.metadata
            first = 0
            for group in range(metadata.num_row_groups):
                about = metadata.row_group(group)
                packed = sum(about.column(i).total_compressed_size for i in range(about.num_columns))
                yield Part(size=packed, read=_reader("parquet", _rows, file, shown, columns, group, first))
                first += about.num_rows

    return _listing("parquet", path, PARQUET_SUFFIXES, Columns.of(column, source_column, target_column), parts)


def _listing(
    corpus: str,
    path: str | None,
    suffixes: tuple[str, ...],
    columns: Columns,
    parts: Callable[[Path, str, Columns, int, int], Iterator[Part]],
) -> Listing:
    """Of every file that `path` is or holds: its parts, given file, name, columns, bytes and the most that a part has."""
    root, names = _files(corpus, path, suffixes)
    found = states(root, names)
    most = part_size(sum(size for _, size, _ in found))
    files = ((root / name if name else root, name or root.name, size) for name, size, _ in found)
    pieces = [part for file, shown, size in files for part in parts(file, shown, columns, size, most)]
    if not pieces:
        raise ValueError(f"data.path = {path!r}: no rows in it: use another file or folder")
    return Listing(
        path=str(root),
        fingerprint=digest([corpus, str(root), columns.names, found]),
        parts=gather(pieces, most),
    )


def _files(corpus: str, path: str | None, suffixes: tuple[str, ...]) -> tuple[Path, list[str]]:
    """The path, and the names within it of files with such an ending; '' where it is a file itself."""
    if path is None:
        raise ValueError(f"data.path = None: corpus {corpus!r} needs the path of a folder or a file")
    root = existing(path)
    if not root.is_dir():
        return root, [""]
    names = [name for name in folder_files(root) if name.endswith(suffixes)]
    if not names:
        raise ValueError(
            f"data.path = {path!r}: no {', '.join(suffixes)} in this folder (hidden files are left out): use another one, or "
            "corpus 'text'"
        )
    return root, names


def _reader(corpus: str, read: Any, file: Path, shown: str, columns: Columns, *rest: Any) -> Any:
    """A part's documents, numbered from 0."""

    def documents() -> Iterator[Document]:
        for number, content in enumerate(read(file, columns, *rest)):
            yield Document(source=corpus, version="", file=shown, content=content, number=number)

    return documents


def _lines(file: Path, columns: Columns, start: int, end: int) -> Iterator[Text]:
    """Of the lines that begin in [start, end)."""
    try:
        with file.open("rb") as stream:
            if start:
                stream.seek(start - 1)
                while (skipped := stream.readline(MB)) and not skipped.endswith(b"\n"):
                    pass
            while (at := stream.tell()) < end:
                line = stream.readline(LONGEST_RECORD + 1)
                line = line.removeprefix(codecs.BOM_UTF8) if at == 0 else line
                content = _content(line, columns, lambda at=at: f"{file}:{line_number(file, at)}")
                if content is not None:
                    yield content
    except OSError as error:
        raise unreadable(file, error) from error


def _packed_lines(file: Path, columns: Columns) -> Iterator[Text]:
    number = 0
    try:
        with gzip.open(file, "rb") as stream:
            while line := stream.readline(LONGEST_RECORD + 1):
                number += 1
                line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                content = _content(line, columns, lambda number=number: f"{file}:{number}")
                if content is not None:
                    yield content
    except (OSError, EOFError, zlib.error) as error:
        _raise_of_system(file, error)
        raise ValueError(
            f"{file}: not a whole gzip file ({error}), after line {number}: fetch it again or remove it"
        ) from error


def _content(line: bytes, columns: Columns, where: Any) -> Text | None:
    """The text of a line; None of a blank one."""
    if len(line) > LONGEST_RECORD:
        raise too_long(where(), len(line), LONGEST_RECORD)
    if line.isspace() or not line:
        return None
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where()}: not UTF-8 ({error}): mend or remove this line") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where()}: not a JSON object in one line ({error}): mend or remove this line") from error
    if not isinstance(record, dict):
        raise ValueError(
            f"{where()}: a JSON {type(record).__name__}, not an object: each line is one, with the text in it"
        )
    content = columns.of_record(record, where)
    if b"\\ud" in line or b"\\uD" in line:  # the only way to a lone half of a character
        try:
            "".join(content).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{where()}: not Unicode text ({error}): mend or remove this line") from error
    return content


def _raise_of_system(file: Path, error: Exception) -> None:
    """Raises what the system said of a file; libraries say by OSError too, without a number, that its content is damaged."""
    if isinstance(error, OSError) and error.errno is not None:
        raise unreadable(file, error) from error


def _opened(file: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(file, buffer_size=MB, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        _raise_of_system(file, error)
        raise ValueError(f"{file}: not a whole parquet file ({error}): fetch it again or remove it") from error


def _rows(file: Path, columns: Columns, group: int, first: int) -> Iterator[Text]:
    """Of a row group, whose first row is the file's row `first`."""
    import pyarrow as pa

    with _opened(file) as opened:
        about = opened.metadata.row_group(group)
        each = about.total_byte_size / max(1, about.num_rows)
        try:
            for batch in opened.iter_batches(
                batch_size=int(min(max(_AT_ONCE / max(each, 1), 1), 4096)),
                row_groups=[group],
                columns=list(columns.names),
                use_threads=False,
            ):
                yield from columns.of_table(batch, first, str(file))
                first += batch.num_rows
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            _raise_of_system(file, error)
            raise ValueError(
                f"{file}, after row {first}: can not be read ({error}): fetch the file again or remove it"
            ) from error
