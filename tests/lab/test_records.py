"""metrics.jsonl as a killed writer or a broken disk leave it: what is whole is read, up to the first line that is not."""

import json

import pytest

from lab import records

LINES = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}]
WHOLE = b"".join(json.dumps(line).encode() + b"\n" for line in LINES)


@pytest.mark.parametrize(
    "tail",
    [b"", b'{"step": 3, "lo', b'{"step": 3, "loss": "\xff\xfe', b"\x00" * 64, b"3\n", b"null\n", b"[1, 2]\n", b'{"loss": 1}\n',
     b'{"step": "3"}\n', b"[" * 100_000, b'{"step": 3}x\n' + WHOLE],
    ids=[str(i) for i in range(11)],
)  # fmt: skip
def test_metrics_are_read_up_to_the_first_line_that_is_not_whole(tmp_path, tail):
    (tmp_path / records.METRICS).write_bytes(WHOLE + tail)
    assert records.read_metrics(tmp_path) == LINES


@pytest.mark.parametrize("schema", [0, 2, "1", None])
def test_metrics_of_another_schema_are_refused(tmp_path, schema):
    path = tmp_path / records.METRICS
    path.write_bytes(json.dumps({"schema": schema}).encode() + b"\n" + WHOLE)
    with pytest.raises(ValueError, match=rf"{path}: schema {schema!r}, this version reads 1; read it with the version"):
        records.read_metrics(tmp_path)


def test_a_writer_says_its_schema_once_and_keeps_lines(tmp_path):
    for kept in ([], LINES[:1]):  # begun, and gone on with
        writer = records.MetricsWriter(tmp_path, kept)
        writer.write(**LINES[len(kept)])
        writer.close()
        assert json.loads((tmp_path / records.METRICS).read_text().splitlines()[0]) == {"schema": 1}
        assert (tmp_path / records.METRICS).read_text().count("schema") == 1
        assert records.read_metrics(tmp_path) == LINES[: len(kept) + 1]


def test_metrics_of_a_run_that_has_none(tmp_path):
    assert records.read_metrics(tmp_path) == []
