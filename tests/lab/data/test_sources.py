"""Tables and files of tokens as documents, and what is said of broken ones."""

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.data import documents, text_files
from lab.data.corpora import listing
from lab.data.locate import locate


def read(corpus: str, path: Path) -> list[tuple[str, object]]:
    return [(document.name, document.content) for document in listing(corpus, str(path)).read()]


def lines(*records: object) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def test_json_lines_of_files_and_folders_packed_or_not(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines({"text": "one"}, {"text": "zwei é"}) + "\n  \n" + '{"text": "no end"}')
    with gzip.open(tmp_path / "b.json.gz", "wt") as packed:
        packed.write(lines({"id": 1, "text": "three"}))
    (tmp_path / "notes.txt").write_text("not a table")
    assert read("jsonl", tmp_path) == [
        ("a.jsonl#000000", "one"),
        ("a.jsonl#000001", "zwei é"),
        ("a.jsonl#000002", "no end"),
        ("b.json.gz#000000", "three"),
    ]
    assert read("jsonl", tmp_path / "a.jsonl")[0] == ("a.jsonl#000000", "one")


def test_a_mark_of_byte_order_is_no_text(tmp_path, monkeypatch):
    content = b"\xef\xbb\xbf" + lines({"text": "one"}, {"text": "two"}).encode()
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(content))
    monkeypatch.setattr(documents, "PART", 20)
    assert [text for _, text in read("jsonl", tmp_path)] == ["one", "two"] * 2
    with pytest.raises(ValueError, match=r"a\.jsonl:2: not a JSON object"):
        (tmp_path / "a.jsonl").write_bytes(lines({"text": "zero"}).encode() + content)
        read("jsonl", tmp_path / "a.jsonl")


def table(path: Path, *, rows: int = 10, groups: int = 3, **columns: list) -> Path:
    columns = columns or {"text": [f"row {i}" for i in range(rows)]}
    pq.write_table(pa.table(columns), path, row_group_size=groups)
    return path


def test_parquet_rows_are_documents(tmp_path):
    table(tmp_path / "a.parquet")
    table(tmp_path / "b.parquet", other=[1, 2], text=["x", None])
    expected = [(f"a.parquet#{i:06d}", f"row {i}") for i in range(10)]
    assert read("parquet", tmp_path) == [*expected, ("b.parquet#000000", "x"), ("b.parquet#000001", "")]


def test_pairs_and_nested_columns(tmp_path):
    pairs = [{"de": "Haus", "en": "house"}, {"de": "Baum", "en": "tree"}]
    table(tmp_path / "a.parquet", translation=pairs, title=["h", "t"])
    (tmp_path / "a.jsonl").write_text(lines(*({"translation": p, "a.b": "dotted"} for p in pairs)))
    settings = "source_column=translation.de,target_column=translation.en"
    for kind in ("parquet", "jsonl"):
        found = read(f"{kind}:{settings}", tmp_path / f"a.{kind}")
        assert [content for _, content in found] == [("Haus", "house"), ("Baum", "tree")]
    assert read("jsonl:column=a.b", tmp_path)[0][1] == "dotted"
    assert read("parquet:column=translation.en", tmp_path)[1][1] == "tree"
    assert read("parquet:column=title", tmp_path)[1][1] == "t"


TEXTS = st.lists(st.text(alphabet='aé∑🙂\n"\\', max_size=30), min_size=1, max_size=30)


@settings(deadline=None, max_examples=40)
@given(TEXTS, st.integers(1, 200))
def test_parts_change_no_document(tmp_path_factory, texts, part):
    folder = tmp_path_factory.mktemp("parts")
    (folder / "a.jsonl").write_text(lines(*({"text": text} for text in texts)), newline="")
    (folder / "b.jsonl").write_text(lines({"text": "last"}))
    table(folder / "a.parquet", text=texts)
    np.save(folder / "a.npy", np.arange(5 * len(texts), dtype=np.uint16).reshape(-1, 5))
    for corpus, names in (("jsonl", [*texts, "last"]), ("parquet", texts), ("tokens", None)):
        whole = read(corpus, folder)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(documents, "PART", part)
            found = listing(corpus, str(folder))
            again = [(document.name, document.content) for document in found.read()]
        assert [name for name, _ in again] == [name for name, _ in whole]
        assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(again, whole, strict=True))
        if names:
            assert [content for _, content in whole] == names


@settings(deadline=None, max_examples=40)
@given(st.text(alphabet="aé∑🙂\n", min_size=1, max_size=400), st.integers(1, 50), st.integers(0, 40))
def test_a_file_in_parts_loses_nothing(tmp_path_factory, content, part, look_ahead):
    file = tmp_path_factory.mktemp("long") / "book.txt"
    file.write_text(content, newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PART", part)
        patch.setattr(text_files, "LOOK_AHEAD", 4 + look_ahead)
        found = listing("text", str(file))
        assert len(found.parts) == -(-len(content.encode()) // part)
        found_documents = list(found.read())
    assert "".join(document.content for document in found_documents) == content
    assert [document.number for document in found_documents] == list(range(len(found_documents)))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            b"\xe9t\xe9",
            r"book\.txt: byte 7,000 \(from 0\), in line 1,001, is 0xe9, which is not UTF-8 .*: mend it, or write",
        ),
        (b"\0", r"book\.txt: byte 7,000 \(from 0\), in line 1,001, is a NUL: mend it"),
    ],
)
def test_a_file_given_by_itself_must_be_text(tmp_path, monkeypatch, bad, message):
    monkeypatch.setattr(documents, "PART", 3000)
    monkeypatch.setattr(text_files, "LONGEST_DOCUMENT", 3000)
    (tmp_path / "book.txt").write_bytes(b"a line\n" * 1000 + bad + b"a line\n" * 1000)
    with pytest.raises(ValueError, match=message):
        read("text", tmp_path / "book.txt")
    # In a folder it is counted, and what is text of it stays.
    (tmp_path / "other.txt").write_text("a line\n")
    found = list(listing("text", str(tmp_path)).read())
    assert sum(document.content is None for document in found) == 1
    assert sum(len(document.content) for document in found if isinstance(document.content, str)) > 10_000


def test_large_files_of_a_folder_are_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "LONGEST_DOCUMENT", 3000)
    (tmp_path / "long.txt").write_text("a line\n" * 1000)
    (tmp_path / "short.txt").write_text("a line\n" * 100)
    found = read("text", tmp_path)
    assert [name for name, _ in found] == [*(f"long.txt#{i:06d}" for i in range(len(found) - 1)), "short.txt"]
    assert "".join(content for _, content in found[:-1]) == "a line\n" * 1000 and len(found) > 4


def test_tokens_as_arrays_and_streams(tmp_path, monkeypatch):
    ids = np.arange(1000, dtype=np.uint16)
    np.save(tmp_path / "rows.npy", ids.reshape(10, 100))
    found = read("tokens", tmp_path / "rows.npy")
    assert len(found) == 10 and np.array_equal(found[3][1], ids[300:400])
    stream = np.tile(np.array([50256, 1, 2, 3], np.uint16), 5)
    stream.tofile(tmp_path / "raw.bin")
    found = read("tokens:separator=50256", tmp_path / "raw.bin")
    assert [content.tolist() for _, content in found] == [[1, 2, 3]] * 5
    monkeypatch.setattr(documents, "PART", 10)
    assert len(read("tokens:separator=50256", tmp_path / "raw.bin")) == 5
    monkeypatch.setattr("lab.data.token_files.LONGEST", 7)
    assert [len(content) for _, content in read("tokens", tmp_path / "raw.bin")] == [7, 7, 6]
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, 20
    (tmp_path / "headed.bin").write_bytes(header.tobytes() + stream.tobytes())
    assert len(read("tokens:separator=50256", tmp_path / "headed.bin")) == 5
    np.arange(6, dtype="<i4").tofile(tmp_path / "wide.bin")
    assert read("tokens:dtype=int32", tmp_path / "wide.bin")[0][1].tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("part", [1, 2, 3, 100])
@pytest.mark.parametrize(
    ("stream", "expected"),
    [
        ([9, 1, 2, 9, 3], [[1, 2], [3]]),
        ([1, 2, 9, 3, 9], [[1, 2], [3]]),
        ([1, 2, 9, 9, 3], [[1, 2], [], [3]]),
        ([1, 2, 3, 4, 5, 6, 9, 7], [[1, 2, 3, 4, 5, 6], [7]]),
        ([1, 2], [[1, 2]]),
    ],
)
def test_separators_are_in_no_document(tmp_path, monkeypatch, part, stream, expected):
    monkeypatch.setattr(documents, "PART", 2 * part)
    monkeypatch.setattr("lab.data.token_files.LONGEST", part)
    np.array(stream, np.uint16).tofile(tmp_path / "raw.bin")
    assert [content.tolist() for _, content in read("tokens:separator=9", tmp_path / "raw.bin")] == expected


def headed(magic: int, count: int, ids: np.ndarray, version: int = 1) -> bytes:
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, count
    return header.tobytes() + ids.tobytes()


def test_headers_say_how_wide_ids_are(tmp_path):
    file = tmp_path / "llama.bin"
    file.write_bytes(headed(20240801, 3, np.array([128000, 5, 128001], "<u4"), version=7))
    for given_dtype in ("", ":dtype=uint32"):
        assert read(f"tokens{given_dtype}", file)[0][1].tolist() == [128000, 5, 128001]
    with pytest.raises(
        ValueError, match=r"llama\.bin: dtype = 'uint16', and its header \(20240801\) says uint32: leave"
    ):
        read("tokens:dtype=uint16", file)
    file.write_bytes(headed(20240326, 3, np.array([1, 2, 3], "<u2"), version=3))
    with pytest.raises(
        ValueError, match=r"a header with the unknown magic number 20240326; 20240520, 20240801 are known"
    ):
        read("tokens", file)
    # Ids that begin as a day does are ids.
    np.array([20240326 & 0xFFFF, 20240326 >> 16, 40, 50, 60, 70], "<u2").tofile(file)
    assert len(read("tokens", file)[0][1]) == 6


def broken_utf8(folder):
    (folder / "a.jsonl").write_bytes(b'{"text": "one"}\n{"text": "\xff"}\n')


def broken_json(folder):
    (folder / "a.jsonl").write_text(lines({"text": "one"}, {"text": "two"}) + '{"text": "thr\n')


def half_a_character(folder):
    (folder / "a.jsonl").write_text(lines({"text": "\U0001f642"}) + '{"text": "a \\ud83d lone half"}\n')


def no_object(folder):
    (folder / "a.jsonl").write_text('["text"]\n')


def no_column(folder):
    (folder / "a.jsonl").write_text(lines({"txt": "one", "id": 3}))


def no_text(folder):
    (folder / "a.jsonl").write_text(lines({"text": "one"}, {"text": 3}))


def long_line(folder):
    (folder / "a.jsonl").write_text(lines({"text": "one"}, {"text": "x" * 3000}))


def long_text(folder):
    (folder / "a.jsonl").write_text(lines({"text": "x" * 1500}))


def torn_gzip(folder):
    content = gzip.compress(lines(*({"text": f"{i * i}"} for i in range(2000))).encode())
    (folder / "a.jsonl.gz").write_bytes(content[:-50])


def torn_parquet(folder):
    file = table(folder / "a.parquet")
    file.write_bytes(file.read_bytes()[:-20])


def torn_pages(folder):
    file = table(folder / "a.parquet", rows=5000, groups=1000)
    content = bytearray(file.read_bytes())
    content[200:4000] = bytes(3800)
    file.write_bytes(content)


def parquet_column(folder):
    table(folder / "a.parquet", body=["x"], id=[3])


def parquet_numbers(folder):
    table(folder / "a.parquet", text=[3])


def torn_npy(folder):
    np.save(folder / "a.npy", np.arange(100))
    (folder / "a.npy").write_bytes((folder / "a.npy").read_bytes()[:-7])


def fractions(folder):
    np.save(folder / "a.npy", np.arange(100.0))


def torn_bin(folder):
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, 20
    (folder / "a.bin").write_bytes(header.tobytes() + bytes(30))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (broken_utf8, r"a\.jsonl:2: not UTF-8 .* mend or remove this line"),
        (broken_json, r"a\.jsonl:3: not a JSON object in one line .* mend or remove this line"),
        (half_a_character, r"a\.jsonl:2: not Unicode text .*surrogates not allowed\): mend or remove this line"),
        (no_object, r"a\.jsonl:1: a JSON list, not an object"),
        (no_column, r"a\.jsonl:1: no column 'text' \(did you mean 'txt'\?\): name the text with --column"),
        (no_text, r"a\.jsonl:2: column 'text' holds int, not text"),
        (long_line, r"a\.jsonl:2: more than .* MiB, .* split it"),
        (long_text, r"a\.jsonl:1: more than .* MiB, and one document may have"),
        (torn_gzip, r"a\.jsonl\.gz: not a whole gzip file .* after line \d+: fetch it again or remove it"),
        (torn_parquet, r"a\.parquet: not a whole parquet file .* fetch it again or remove it"),
        (torn_pages, r"a\.parquet, after row \d+: can not be read .* fetch the file again"),
        (parquet_column, r"a\.parquet: no column 'text' \(use one of body, id\)"),
        (parquet_numbers, r"a\.parquet: column 'text' holds int64, not text"),
        (torn_npy, r"a\.npy: not a whole file of tokens .* fetch it again"),
        (fractions, r"a\.npy: float64 of 1 dimensions: use whole numbers"),
        (torn_bin, r"a\.bin: not a whole file of tokens \(15 tokens, and its header says 20\)"),
    ],
)
def test_broken_files_are_errors_that_name_file_and_line(tmp_path, monkeypatch, make, message):
    monkeypatch.setattr("lab.data.tables.LONGEST_RECORD", 2000)
    monkeypatch.setattr("lab.data.columns.LONGEST_DOCUMENT", 1000)
    make(tmp_path)
    corpus, path = locate(tmp_path)
    with pytest.raises(ValueError, match=message):
        list(listing(corpus, path).read())


def test_a_line_beyond_all_bounds_is_refused_in_bounded_memory(tmp_path):
    """2 GB without a line end (a hole in the file): no more than the longest record is read."""
    import tracemalloc

    file = tmp_path / "a.jsonl"
    with file.open("wb") as stream:
        stream.write(b'{"text": "')
        stream.truncate(2 * 2**30)
    parts = listing("jsonl", str(file)).parts
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"a\.jsonl:1: more than 64 MiB"):
        list(parts[0].read())
    assert list(parts[-1].read()) == []
    assert tracemalloc.get_traced_memory()[1] < 200 * 2**20
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        ("jsonl:colum=a", r"no setting 'colum': did you mean 'column'\?"),
        ("jsonl:column", r"write settings as name=value"),
        ("python:a=b", r"no setting 'a': it takes none"),
        ("jsonl:source_column=a", r"give one column, or both of a pair"),
        ("tokens:dtype=uint17", r"dtype = 'uint17': did you mean 'uint16'\?"),
        ("tokens:separator=eos", r"separator = 'eos': use the id"),
        ("parquet", r"no \.parquet, \.pq in this folder"),
    ],
)
def test_bad_settings_say_what_to_do(tmp_path, corpus, message):
    with pytest.raises(ValueError, match=message):
        listing(corpus, str(tmp_path))


def test_a_source_is_what_its_files_are(tmp_path):
    for name in ("t/a.md", "t/b.txt", "j/a.jsonl.gz", "j/README.md", "p/x/a.parquet", "n/a.bin", "m/a.jsonl", "m/a.parquet",
                 "prepared/manifest.json", "saved/dataset_info.json", "novels.txt"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    kinds = {"t": "text", "j": "jsonl", "p": "parquet", "n": "tokens", "m": "text", "prepared": "prepared", "saved": "hf",
             "novels.txt": "text", "m/a.jsonl": "jsonl"}  # fmt: skip
    for name, kind in kinds.items():
        assert locate(tmp_path / name) == (kind, str(tmp_path / name))
    assert locate("python") == ("python", None)
    assert locate("text", tmp_path) == ("text", str(tmp_path))
    assert locate("HuggingFaceFW/fineweb-edu", config="sample-10BT", split=None) == (
        "hf:config=sample-10BT",
        "HuggingFaceFW/fineweb-edu",
    )
    assert locate(f"{tmp_path}/j:column=body") == ("jsonl:column=body", str(tmp_path / "j"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("pyhton", r"no such file or folder, and no corpus: did you mean 'python'"),
        ("./nothing", r"'nothing' is not in"),
        ("novel.txt", r"'novel.txt' is not in"),
    ],
)
def test_unknown_sources_are_refused(source, message):
    with pytest.raises(ValueError, match=message):
        locate(source)
