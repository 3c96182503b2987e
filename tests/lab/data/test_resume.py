"""One corpus, whoever prepares it and whatever interrupts them: the same bytes."""

import errno
import gzip
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lab.data import documents, load, tables, text_files, workers
from lab.data.parts import done
from lab.data.prepare import prepare

PART = 20_000
SCRIPT = f"""
import os, signal, sys
from lab.data import documents
from lab.data.prepare import prepare
documents.PART = {PART}
source, out, count, kill_at = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])

def report(progress):
    if progress.parts >= kill_at:
        os.kill(os.getpid(), signal.SIGKILL)

prepare("jsonl", source, out, workers=count, report=report)
"""


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(documents, "PART", PART)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """About 20 parts; a sixth of the lines are duplicates of others, in parts of their own and in others."""
    folder = tmp_path_factory.mktemp("source")
    rng = np.random.default_rng(0)
    for file in range(3):
        with (folder / f"{file}.jsonl").open("w") as stream:
            for _ in range(1000):
                number = int(rng.integers(0, 8000))
                stream.write(json.dumps({"text": f"document {number} " * 8}) + "\n")
    return folder


@pytest.fixture(scope="module")
def undisturbed(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PART", PART)
        prepare("jsonl", source, out, workers=1)
    return contents(out)


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(directory)): file.read_bytes() for file in sorted(directory.rglob("*")) if file.is_file()
    }


def test_there_are_parts_and_duplicates(undisturbed):
    summary = json.loads(undisturbed["manifest.json"])
    assert len(summary["shards"]) > 15 and summary["skipped"]["duplicate"] > 300
    assert summary["unused_tokens"] > 0
    assert summary["train"]["documents"] + summary["held_out"]["documents"] + summary["skipped"]["duplicate"] == 3000


@pytest.mark.parametrize("count", [2, 3])
def test_workers_change_no_byte(source, undisturbed, tmp_path, count):
    seen = []
    prepare("jsonl", source, tmp_path / "out", workers=count, report=seen.append)
    assert contents(tmp_path / "out") == undisturbed
    assert seen[-1].parts == seen[-1].of_parts and seen[-1].source == seen[-1].of_source > 0
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(("count", "kill_at"), [(1, 1), (1, 9), (2, 3), (2, 14)])
def test_killed_and_started_again_it_is_the_same_and_goes_on(source, undisturbed, tmp_path, count, kill_at):
    out = tmp_path / "out"
    killed = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(source), str(out), str(count), str(kill_at)], timeout=120
    )
    assert killed.returncode == -signal.SIGKILL and not out.exists()
    (work,) = tmp_path.glob(".out.preparing-*")
    finished = [number for number in range(30) if done(work / "parts", number)]
    assert len(finished) >= kill_at
    time.sleep(0.3 if count > 1 else 0)  # workers end once they see that nobody listens
    reports: list[workers.Progress] = []
    prepare("jsonl", source, out, workers=3 - count, report=reports.append)
    assert reports[0].parts >= len(finished)
    assert contents(out) == undisturbed
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("at", ["lab.data.index.write", "lab.data.prepare._publish", "lab.data.prepare.write_json"])
def test_interrupted_at_the_end_it_goes_on(source, undisturbed, tmp_path, monkeypatch, at):
    out = tmp_path / "out"

    def fail(*_, **__):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(at, fail)
        with pytest.raises(OSError, match="disk full"):
            prepare("jsonl", source, out, workers=1)
    assert not out.exists()
    reports: list[workers.Progress] = []
    prepare("jsonl", source, out, workers=1, report=reports.append)
    assert not reports  # every part was there
    assert contents(out) == undisturbed


def test_train_and_held_out_never_overlap(source, undisturbed, tmp_path):
    prepare("jsonl", source, tmp_path / "out")
    corpus = load(prepare("jsonl", source, tmp_path / "out").data)
    sides = [
        [bytes(split.document(i).astype(np.uint8)) for i in range(len(split.lengths))]
        for split in (corpus.train, corpus.held_out)
    ]
    assert all(len(set(side)) == len(side) for side in sides)
    assert not set(sides[0]) & set(sides[1])
    texts = {json.loads(line)["text"].encode() for file in source.iterdir() for line in file.read_text().splitlines()}
    assert set(sides[0]) | set(sides[1]) == texts


def test_a_worker_that_finds_a_broken_line_leaves_nothing(source, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    lines = (source / "0.jsonl").read_text().splitlines(keepends=True)
    (broken / "a.jsonl").write_text("".join(lines[:700]) + '{"text": \n' + "".join(lines[700:]))
    for count in (1, 2):
        with pytest.raises(ValueError, match=r"a\.jsonl:701: not a JSON object"):
            prepare("jsonl", broken, tmp_path / "out", workers=count)
        assert [path.name for path in tmp_path.iterdir()] == ["broken"]


@pytest.mark.parametrize("count", [1, 2])
def test_a_disk_that_is_full_leaves_the_parts_that_are_done(source, tmp_path, count):
    """A limit on the size of files stands for it: the last part is beyond it."""
    folder, out = tmp_path / "source", tmp_path / "out"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes((source / "0.jsonl").read_bytes())
    (folder / "b.jsonl").write_text(json.dumps({"text": "long " * 60_000}) + "\n")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            prepare("jsonl", folder, out, workers=count)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG and not out.exists()
    (work,) = tmp_path.glob(".out.preparing-*")
    finished = sum(done(work / "parts", number) for number in range(30))
    assert finished >= 3
    reports: list[workers.Progress] = []
    prepare("jsonl", folder, out, workers=count, report=reports.append)
    assert reports[0].parts >= finished
    prepare("jsonl", folder, tmp_path / "whole", workers=1)
    assert contents(out) == contents(tmp_path / "whole")


def as_text(folder, rows):
    (folder / "a.txt").write_text("\n\n".join(rows))


def as_jsonl(folder, rows):
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))


def as_gzip(folder, rows):
    for number in range(6):
        with gzip.open(folder / f"{number}.jsonl.gz", "wt") as stream:
            stream.writelines(json.dumps({"text": row}) + "\n" for row in rows[number::6])


def as_parquet(folder, rows):
    pq.write_table(pa.table({"text": rows}), folder / "a.parquet", row_group_size=200, compression="none")


def as_folder(folder, rows):
    for number in range(6):
        (folder / f"{number}.txt").write_text("\n".join(rows[number::6]))


class Failing:
    """A file on a disk that breaks after so many bytes."""

    def __init__(self, stream, left):
        self.stream, self.left = stream, left

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stream.close()

    def _count(self, found):
        self.left[0] -= len(found)
        if self.left[0] < 0:
            raise OSError(errno.EIO, "Input/output error")
        return found

    def read(self, *given):
        return self._count(self.stream.read(*given))

    def readline(self, *given):
        return self._count(self.stream.readline(*given))

    def readinto(self, into):
        size = self.stream.readinto(into)
        return len(self._count(into[:size]))


@pytest.mark.parametrize("write", [as_text, as_jsonl, as_gzip, as_parquet, as_folder])
def test_a_disk_that_breaks_while_a_source_is_read_is_said_and_leaves_the_parts_that_are_done(
    tmp_path, monkeypatch, write
):
    folder, out = tmp_path / "source", tmp_path / "out"
    folder.mkdir()
    rng = np.random.default_rng(0)
    write(folder, [f"document {i} " + " ".join(map(str, rng.integers(0, 10**6, 15))) for i in range(1200)])
    corpus = {as_text: "text", as_folder: "text", as_parquet: "parquet"}.get(write, "jsonl")
    source = folder / "a.txt" if write is as_text else folder
    left = [sum(file.stat().st_size for file in folder.iterdir()) * 6 // 10]
    left[0] += 4 * 2**16 if write is as_parquet else 0  # each time that it is opened, so much of its end is read
    real, real_parquet, streams = Path.open, pq.ParquetFile, []
    bytes_of_real = Path.read_bytes

    def opened(self, *given, **options):
        if folder not in self.parents:
            return real(self, *given, **options)
        streams.append(Failing(real(self, *given, **options), left))  # closed at the end: not all libraries do
        return streams[-1]

    def read_bytes(self):
        if folder not in self.parents:
            return bytes_of_real(self)
        with self.open("rb") as stream:
            return stream.read()

    def parquet_of(path, **_):
        return real_parquet(pa.PythonFile(opened(path, "rb")), buffer_size=2**12, pre_buffer=False)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", opened)
        patch.setattr(text_files, "LOOK_AHEAD", 1000)
        patch.setattr(Path, "read_bytes", read_bytes)
        patch.setattr(tables, "gzip", SimpleNamespace(open=lambda path, mode: gzip.GzipFile(fileobj=path.open("rb"))))
        patch.setattr("pyarrow.parquet.ParquetFile", parquet_of) if write is as_parquet else None
        with pytest.raises(OSError) as caught:
            prepare(corpus, source, out, workers=1)
    for stream in streams:
        stream.close()
    assert caught.value.errno == errno.EIO and str(folder) in str(caught.value.filename)
    assert "can not be read (Input/output error): mend the file or its disk, and the same command goes on" in str(
        caught.value
    )
    (work,) = tmp_path.glob(".out.preparing-*")
    finished = sum(done(work / "parts", number) for number in range(30))
    assert finished >= 1
    reports: list[workers.Progress] = []
    prepare(corpus, source, out, workers=1, report=reports.append)
    assert reports[0].parts >= finished
    prepare(corpus, source, tmp_path / "whole", workers=1)
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device", "/x/y"), OSError("without a number"), ValueError("broken")]
)
def test_errors_of_workers_are_of_their_own_kind(error):
    again = workers._error(json.loads(json.dumps(workers._told(error))))
    assert isinstance(again, OSError) == isinstance(error, OSError) and str(again) == str(error)
    if isinstance(error, OSError):
        assert isinstance(again, OSError) and (again.errno, again.filename) == (error.errno, error.filename)


def test_a_worker_that_dies_is_told_of(source, undisturbed, tmp_path, monkeypatch):
    """Its parts are kept: only what was cut off is made again."""

    class Doomed(subprocess.Popen):
        def __init__(self, *arguments, **settings):
            super().__init__(*arguments, **settings)
            os.kill(self.pid, signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(workers.subprocess, "Popen", Doomed)
        with pytest.raises((RuntimeError, OSError)):
            prepare("jsonl", source, tmp_path / "out", workers=2)
    assert not (tmp_path / "out").exists()
    prepare("jsonl", source, tmp_path / "out", workers=2)
    assert contents(tmp_path / "out") == undisturbed


def test_a_source_that_changed_is_prepared_anew(source, tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes((source / "0.jsonl").read_bytes())
    first = prepare("jsonl", folder, tmp_path / "out", workers=1)
    assert prepare("jsonl", folder, tmp_path / "out", workers=2).data == first.data
    with (folder / "a.jsonl").open("a") as stream:
        stream.write(json.dumps({"text": "one more"}) + "\n")
    with pytest.raises(
        ValueError,
        match=r"it is there, of another text, .*; source_bytes \d+ here, \d+ there: choose another --out, or delete",
    ):
        prepare("jsonl", folder, tmp_path / "out")
    (tmp_path / ".other.preparing-0123456789abcdef").mkdir()  # of the source before it changed
    prepare("jsonl", folder, tmp_path / "other", workers=1)
    assert not list(tmp_path.glob(".*"))


def test_files_that_were_only_touched_are_the_same_text(source, tmp_path):
    folder, out = tmp_path / "source", tmp_path / "out"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes((source / "0.jsonl").read_bytes())
    first = prepare("jsonl", folder, out, workers=1)
    before = contents(out)
    os.utime(folder / "a.jsonl", (1, 1))
    again = prepare("jsonl", folder, out, workers=1)
    assert again.data == first.data and not list(tmp_path.glob(".*"))
    after = contents(out)
    assert [name for name in before if before[name] != after[name]] == ["manifest.json"]
    reports: list[workers.Progress] = []
    prepare("jsonl", folder, out, workers=1, report=reports.append)
    assert not reports  # it is known now
    # Other text of the same size is found out.
    (folder / "a.jsonl").write_bytes((source / "0.jsonl").read_bytes().replace(b"document", b"dokument", 1))
    with pytest.raises(
        ValueError, match=r"it is there, .*; jsonl has other contents .*: choose another --out, or delete it"
    ):
        prepare("jsonl", folder, out, workers=1)
    assert contents(out) == after and not list(tmp_path.glob(".*"))
    for settings, message in (
        ({"held_out": 0.1}, r"held_out_share 0\.1 here, 0\.05 there"),
        ({"licence": "MIT"}, r"licence 'MIT' here, None there"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare("jsonl", folder, out, workers=1, **settings)


def test_an_empty_directory_is_taken_and_others_are_not(source, undisturbed, tmp_path):
    (tmp_path / "out").mkdir()
    prepare("jsonl", source, tmp_path / "out", workers=1)
    assert contents(tmp_path / "out") == undisturbed
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("words")
    (tmp_path / "file").write_text("words")
    for name in ("mine", "file"):
        with pytest.raises(
            ValueError, match=r"it is there, and no prepared corpus: choose another --out, or delete it"
        ):
            prepare("jsonl", source, tmp_path / name, workers=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "mine", "out"]
