"""Manifests, splits, and the cache that holds a corpus's tokens."""

import hashlib
import json
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.cache import cache_directory
from lab.data import describe, index, load
from lab.data.manifest import describe_summary, differences
from lab.data.parts import RECORD


@pytest.fixture(autouse=True)
def own_cache(cache, tmp_path, monkeypatch):
    """Each test's own, after the session's (`cache`)."""
    monkeypatch.setenv("BITTERLAB_CACHE", str(tmp_path / "own"))
    return tmp_path / "own" / "corpora"


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "texts", {f"{i}.txt": f"document {i} " * (i + 1) for i in range(40)})


def contents(split) -> list[bytes]:
    return [split.document(number).astype(np.uint8).tobytes() for number in range(len(split.lengths))]


def test_tokens_are_the_documents_and_the_splits_are_disjoint(folder):
    described = describe("text", folder, held_out=0.3)
    corpus = load(described.data)
    train, held_out = contents(corpus.train), contents(corpus.held_out)
    assert not set(train) & set(held_out)
    assert sorted(train + held_out) == sorted(file.read_bytes() for file in folder.iterdir())
    assert described.data.train_tokens == sum(map(len, train)) == described.summary["train"]["tokens"]
    assert described.summary["held_out"] == {
        "documents": len(held_out),
        "bytes": sum(map(len, held_out)),
        "tokens": sum(map(len, held_out)),
    }
    assert 4 <= len(held_out) <= 20


def test_duplicates_empty_and_binary_files_are_left_out_and_counted(tmp_path):
    described = describe("text", write(tmp_path / "t", {"a": "one", "b": "two", "c": "one", "d": "", "e": b"\xff"}))
    assert described.summary["skipped"] == {"not_text": 1, "empty": 1, "duplicate": 1}
    assert described.summary["train"]["documents"] == described.summary["held_out"]["documents"] == 1


def test_the_manifest_is_the_texts_not_its_place_or_time(folder, tmp_path):
    first = describe("text", folder)
    copy = write(tmp_path / "elsewhere" / "x", {file.name: file.read_bytes() for file in folder.iterdir()})
    for file in copy.iterdir():
        os.utime(file, (1, 1))
    second = describe("text", copy)
    assert second.data.manifest == first.data.manifest
    assert replace(second.data, path=None) == replace(first.data, path=None)


def test_the_manifest_changes_with_content_name_and_share(folder):
    seen = {describe("text", folder).data.manifest, describe("text", folder, held_out=0.5).data.manifest}
    (folder / "0.txt").rename(folder / "00.txt")
    seen.add(describe("text", folder).data.manifest)
    (folder / "00.txt").write_text("document 1 ")
    seen.add(describe("text", folder).data.manifest)
    assert len(seen) == 4


def test_the_index_holds_every_document_and_the_hash_is_of_all_of_them(folder, own_cache):
    described = describe("text", folder)
    directory = own_cache / described.data.manifest / "bytes"
    rows = pq.read_table(directory / "documents.parquet").to_pylist()
    assert [row["file"] for row in rows] == sorted(file.name for file in folder.iterdir())
    for row in rows:
        content = (folder / row["file"]).read_bytes()
        assert row["sha256"] == hashlib.sha256(content).digest() and row["bytes"] == row["tokens"] == len(content)
    names = [["text", r["file"], r["sha256"].hex(), "held_out" if r["held_out"] else "train"] for r in rows]
    content = json.dumps([1, 0.05, names], separators=(",", ":"))
    assert described.data.manifest == hashlib.sha256(content.encode()).hexdigest()
    assert "40 documents" in str(described) and described.data.manifest[:12] in str(described)


DIGESTS = st.lists(st.binary(min_size=32, max_size=32), min_size=2, max_size=60, unique=True)


def records(digests: list[bytes], parts: int = 1) -> list[tuple[int, int, np.ndarray]]:
    found = np.zeros(len(digests), RECORD)
    found["digest"] = np.frombuffer(b"".join(digests), ">u8").reshape(-1, 4)
    found["key"] = found["digest"][:, 0]
    pieces = np.array_split(found, parts)
    ends = np.cumsum([len(piece) for piece in pieces])
    return [(i, int(end) - len(piece), piece) for i, (piece, end) in enumerate(zip(pieces, ends, strict=True))]


@given(DIGESTS, st.floats(0.001, 0.5), st.integers(1, 5))
def test_both_splits_have_documents_and_a_document_stays_in_its_own(digests, share, parts):
    divided = index.split(records(digests, parts), np.zeros(len(digests), bool), share)
    assert divided.train and divided.held_out and divided.train + divided.held_out == len(digests)
    below = np.array([int.from_bytes(digest) / 2**256 < share for digest in digests])
    if below.any() and not below.all():
        assert divided.moved is None and divided.held_out == below.sum()
    else:
        nearest = min if not below.any() else max
        assert divided.moved == digests.index(nearest(digests, key=lambda digest: digest[:8]))


@pytest.mark.parametrize("bucket", [2, 7, 2**20])
def test_duplicates_are_found_whatever_the_bucket(tmp_path, monkeypatch, bucket):
    monkeypatch.setattr(index, "BUCKET", bucket)
    rng = np.random.default_rng(0)
    digests = [hashlib.sha256(bytes([number])).digest() for number in rng.integers(0, 60, 200)]

    class Parts(list):
        documents = len(digests)

    found = index.duplicates(Parts(records(digests, 3)), tmp_path)
    assert found.tolist() == [digest in digests[:place] for place, digest in enumerate(digests)]


def test_the_held_out_share_is_about_what_was_asked_for():
    digests = [os.urandom(32) for _ in range(20_000)]
    divided = index.split(records(digests), np.zeros(len(digests), bool), 0.05)
    assert divided.held_out / len(digests) == pytest.approx(0.05, abs=0.01)


def test_an_unchanged_corpus_is_not_read_again(folder, monkeypatch):
    first = describe("text", folder)
    with monkeypatch.context() as patch:
        read = Path.read_bytes
        patch.setattr(Path, "read_bytes", lambda self: pytest.fail(f"{self}") if self.suffix == ".txt" else read(self))
        assert describe("text", folder) == first
    (folder / "0.txt").write_text("changed")
    assert describe("text", folder).data.manifest != first.data.manifest


def test_a_run_keeps_its_text_when_the_folder_changes(folder):
    described = describe("text", folder)
    before = contents(load(described.data).train)
    (folder / "0.txt").write_text("changed")
    assert contents(load(described.data).train) == before


def fail_reading(patch):
    texts = iter(["one", "two", "three"])
    patch.setattr("lab.data.text_files.read_text", lambda file: next(texts))  # and no fourth


def fail_publishing(patch):
    def fail(*_):
        raise OSError("disk full")

    patch.setattr(Path, "rename", fail)


@pytest.mark.parametrize("fail", [fail_reading, fail_publishing])
def test_a_build_that_fails_is_no_corpus(folder, own_cache, monkeypatch, fail):
    with monkeypatch.context() as patch:
        fail(patch)
        with pytest.raises((OSError, RuntimeError)):
            describe("text", folder)
    files = [path.relative_to(own_cache) for path in own_cache.rglob("*") if path.is_file()]
    assert {file.parts[0][:11] for file in files} == {".preparing-"}
    load(describe("text", folder).data)
    assert not list(own_cache.glob(".*"))


def test_a_file_that_is_missing_meanwhile_is_an_error(folder, own_cache, monkeypatch):
    """Not taken for a work directory that another process has removed."""

    def fail(*_):
        raise FileNotFoundError(2, "No such file or directory", "gone")

    with monkeypatch.context() as patch:
        patch.setattr("lab.data.index.write", fail)
        with pytest.raises(FileNotFoundError, match="gone"):
            describe("text", folder)
    load(describe("text", folder).data)


def test_what_killed_processes_left_is_removed_in_time(folder, own_cache):
    old, young = own_cache / ".preparing-old", own_cache / ".preparing-young"
    for directory in (old, young):
        (directory / "parts").mkdir(parents=True)
    os.utime(old, (1, 1))
    describe("text", folder)
    assert young.exists() and not old.exists()


def test_several_builders_at_once_agree(folder):
    with ThreadPoolExecutor(8) as pool:
        manifests = {d.data.manifest for d in pool.map(lambda _: describe("text", folder), range(8))}
    assert len(manifests) == 1


def test_a_torn_index_is_only_a_shortcut_lost(folder, own_cache):
    first = describe("text", folder)
    for file in (own_cache / "listings").iterdir():
        file.write_text("{")
    assert describe("text", folder) == first


@pytest.mark.parametrize("tokenizer", [None, {"scale": 2.0}])
def test_what_an_earlier_version_counted_otherwise_is_replaced(folder, own_cache, tokenizer):
    first = describe("text", folder)
    file = own_cache / first.data.manifest / "bytes" / "manifest.json"
    stale = json.loads(file.read_text())
    stale["tokenizer"] = tokenizer and {**stale["tokenizer"], **tokenizer}
    file.write_text(json.dumps(stale))
    for shortcut in (own_cache / "listings").iterdir():
        shortcut.unlink()
    assert describe("text", folder) == first
    assert json.loads(file.read_text())["tokenizer"]["scale"] == 1.0 and not list(own_cache.glob(".*"))


@pytest.mark.parametrize("shortcut", [True, False], ids=["listed", "not listed"])
@pytest.mark.parametrize("again", ["describe", "load"])
def test_a_cache_in_the_layout_of_an_earlier_version_is_replaced(folder, own_cache, again, shortcut):
    """One file of tokens and no shards, as it was; the tokenizer is the same."""
    first = describe("text", folder)
    directory = own_cache / first.data.manifest / "bytes"
    tokens = load(first.data).train.document(0)
    about = json.loads((directory / "manifest.json").read_text())
    (directory / "tokens.bin").write_bytes(b"".join((directory / s["file"]).read_bytes() for s in about.pop("shards")))
    shutil.rmtree(directory / "shards")
    (directory / "manifest.json").write_text(json.dumps(about))
    if not shortcut:
        shutil.rmtree(own_cache / "listings")
    assert describe("text", folder) == first if again == "describe" else load(first.data)
    np.testing.assert_array_equal(load(first.data).train.document(0), tokens)
    assert not (directory / "tokens.bin").exists() and not list(own_cache.glob(".*"))


@pytest.mark.parametrize("file", ["shards/00000.bin", "train.starts.npy", "held_out.lengths.npy"])
def test_torn_tokens_are_refused(folder, own_cache, file):
    data = describe("text", folder).data
    torn = own_cache / data.manifest / "bytes" / file
    torn.write_bytes(torn.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"not a whole corpus .* delete this folder"):
        load(data)


def test_another_text_is_refused_and_the_difference_named(folder, own_cache, tmp_path, monkeypatch):
    described = describe("text", folder)
    monkeypatch.setenv("BITTERLAB_CACHE", str(tmp_path / "another machine"))
    (folder / "0.txt").unlink()
    with pytest.raises(ValueError, match=r"is another text on this machine .*39 documents.*Copy .* or plan again here"):
        load(described.data)
    with pytest.raises(ValueError, match=r"text has other contents \(39 documents here, 40 there\)"):
        load(described.data, described.summary)
    with pytest.raises(ValueError, match=r"data\.train_tokens = 7.* take both from lab\.data\.describe"):
        load(replace(describe("text", folder).data, train_tokens=7))


def test_differences_name_versions():
    def summary(*sources, share=0.05):
        keys = ("name", "version", "sha256")
        return {"held_out_share": share, "sources": [dict(zip(keys, s, strict=True), documents=1) for s in sources]}

    there = summary(("a", "1", "x"), ("b", "1", "x"), ("gone", "2", "x"), ("same", "1", "s"))
    here = summary(("a", "2", "y"), ("b", "1", "z"), ("new", "3", "x"), ("same", "1", "s"), share=0.1)
    assert differences(there, here) == (
        "held_out 0.1 here, 0.05 there; a 2 here, 1 there; b 1 has other contents (1 documents here, 1 there); "
        "gone 2 only there; new 3 only here"
    )
    assert differences(there, here, most=1) == "held_out 0.1 here, 0.05 there; 4 more"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.bin": b"\xff", "b.bin": b"\0"}, r"0 different documents of text here \(2 not_text left out\)"),
        ({"a": "same", "b": "same"}, r"1 different documents of text here \(1 duplicate left out\).*two UTF-8 text"),
    ],
)
def test_too_few_documents_are_refused(tmp_path, own_cache, files, message):
    with pytest.raises(ValueError, match=message):
        describe("text", write(tmp_path / "t", files))
    assert not any(path.is_file() for path in own_cache.rglob("*"))


def test_one_long_file_is_a_corpus(tmp_path):
    book = write(tmp_path, {"book.txt": "".join(f"line {i}\n" for i in range(3000))}) / "book.txt"
    described = describe("text", book)
    corpus = load(described.data)
    assert min(len(corpus.train.starts), len(corpus.held_out.starts)) >= 1
    assert sum(map(len, contents(corpus.train) + contents(corpus.held_out))) == book.stat().st_size


@pytest.mark.parametrize("share", [0, 0.6, -1, float("nan"), "0.1", True])
def test_bad_shares_are_refused(share):
    with pytest.raises(ValueError, match=r"data\.held_out = .* in \(0, 0\.5\]"):
        describe("markov", held_out=share)


def test_unknown_tokenizers_are_refused(folder):
    with pytest.raises(ValueError, match=r"data\.tokenizer = 'byte': did you mean 'bytes'\?"):
        describe("text", folder, tokenizer="byte")


@pytest.mark.parametrize("name", ["markov", "uniform"])
def test_generated_corpora_are_whole(name):
    described = describe(name)
    corpus = load(described.data)
    assert described.data.path is None
    assert described.data.train_tokens == corpus.train.lengths.sum() > 3e6
    assert len(corpus.held_out.starts) >= 10


def test_generated_text_never_changes():
    assert describe("markov").data.manifest == "82f29c41a0b7b6616e220731825dcbbbc6a0636bb2d733a383c8736a21576708"


def test_the_real_python_corpus(cache, monkeypatch, tmp_path_factory):
    # In the session's cache, for other tests to use.
    monkeypatch.setenv("BITTERLAB_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    described = describe("python")
    with monkeypatch.context() as again:  # nothing is read a second time
        again.setattr(sys.modules[describe.__module__], "_build", None)
        assert describe("python") == described
    names = {source["name"] for source in described.summary["sources"]}
    assert {"python", "jax", "numpy", "scipy", "flax", "optax"} <= names
    assert not names & {"bitterlab", "pytest", "hypothesis", "ruff", "pip"}
    assert described.data.train_tokens > 50e6
    share = described.summary["held_out"]["documents"] / described.summary["train"]["documents"]
    assert share == pytest.approx(0.05 / 0.95, rel=0.2)
    assert "MB to train on" in describe_summary(described.summary)
    corpus = load(described.data)
    assert b"def " in corpus.train.document(0).astype(np.uint8).tobytes()


def test_the_cache_lies_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("BITTERLAB_CACHE", str(tmp_path / "x"))
    assert cache_directory() == tmp_path / "x"
    monkeypatch.delenv("BITTERLAB_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "bitterlab"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_directory() == Path.home() / ".cache" / "bitterlab"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory() == Path.home() / ".cache" / "bitterlab"
