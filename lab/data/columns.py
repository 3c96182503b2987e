"""Which columns of a table are the text: one, or a pair of source and target; nested ones by dots (translation.de)."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lab.checks import nearest
from lab.data.documents import LONGEST_DOCUMENT, too_long

Text = str | tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class Columns:
    """names: of the text, or of source and target."""

    names: tuple[str, ...]

    @classmethod
    def of(cls, column: str | None, source_column: str | None, target_column: str | None) -> "Columns":
        """Raises ValueError where one of a pair is missing, or both kinds are given."""
        if source_column is None and target_column is None:
            return cls(names=(column or "text",))
        if column is not None or source_column is None or target_column is None:
            raise ValueError(
                f"column = {column!r}, source_column = {source_column!r}, target_column = {target_column!r}: give one column, "
                "or both of a pair"
            )
        return cls(names=(source_column, target_column))

    def of_record(self, record: Mapping[str, Any], where: Callable[[], str]) -> Text:
        """The text of a JSON object; where(): the file and line, for an error."""
        texts = []
        for name in self.names:
            value = record[name] if name in record else _walk(record, name, where)
            texts.append(checked(value, name, where))
        return _text(texts)

    def of_table(self, table: Any, first: int, file: str) -> Iterator[Text]:
        """The texts of a pyarrow Table or RecordBatch, whose first row is the file's row `first`."""
        values = [_column(table, name, file).to_pylist() for name in self.names]
        for row, texts in enumerate(zip(*values, strict=True)):

            def where(row: int = row) -> str:
                return f"{file}, row {first + row}"

            yield _text([checked(text, name, where) for name, text in zip(self.names, texts, strict=True)])

    def check(self, schema: Any, file: str) -> None:
        """Raises ValueError where a pyarrow Schema has no such columns of text."""
        import pyarrow as pa

        for name in self.names:
            kind = _kind(schema, name, file)
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
                raise ValueError(f"{file}: column {name!r} holds {kind}, not text: name another with --column")


def _text(texts: list[str]) -> Text:
    return texts[0] if len(texts) == 1 else (texts[0], texts[1])


def checked(value: object, name: str, where: Callable[[], str]) -> str:
    """The text itself, '' for null; ValueError for another kind, or one that is too long."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(
            f"{where()}: column {name!r} holds {type(value).__name__}, not text: mend it, or name another with --column"
        )
    if 4 * len(value) > LONGEST_DOCUMENT and (size := len(value.encode("utf-8", "surrogatepass"))) > LONGEST_DOCUMENT:
        raise too_long(where(), size)
    return value


def _walk(record: Mapping[str, Any], name: str, where: Callable[[], str]) -> Any:
    value: Any = record
    for key in name.split("."):
        if not isinstance(value, Mapping) or key not in value:
            raise _missing(name, list(value) if isinstance(value, Mapping) else list(record), where())
        value = value[key]
    return value


def _kind(schema: Any, name: str, file: str) -> Any:
    import pyarrow as pa

    if schema.get_field_index(name) >= 0:
        return schema.field(name).type
    first, *others = name.split(".")
    if schema.get_field_index(first) < 0:
        raise _missing(name, schema.names, file)
    kind = schema.field(first).type
    for key in others:
        names = [kind.field(i).name for i in range(kind.num_fields)] if pa.types.is_struct(kind) else []
        if key not in names:
            raise _missing(name, [f"{first}.{known}" for known in names] or schema.names, file)
        kind = kind.field(key).type
    return kind


def _column(table: Any, name: str, file: str) -> Any:
    import pyarrow as pa
    import pyarrow.compute as pc

    _kind(table.schema, name, file)
    if table.schema.get_field_index(name) >= 0:
        return table.column(name)
    first, *others = name.split(".")
    found = table.column(first)
    found = found.combine_chunks() if isinstance(found, pa.ChunkedArray) else found
    return pc.struct_field(found, others)  # pyright: ignore[reportAttributeAccessIssue]


def _missing(name: str, known: list[str], where: str) -> ValueError:
    hint = nearest(name, known) if known else "it has none"
    return ValueError(
        f"{where}: no column {name!r} ({hint}): name the text with --column, or a pair with --source-column and --target-column"
    )
