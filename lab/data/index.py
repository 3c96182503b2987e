"""From parts to a corpus: exact duplicates are found, documents split, and the index of all of them written.

Nothing here grows with the corpus but files: digests are sorted in buckets by their first bits, a bucket at a time, and
marks of duplicates are a memory-mapped file, a byte a document.

    train.starts.npy  train.lengths.npy  train.sources.npy     int64 of each document, in order: its first token among all
    held_out.*.npy                                             shards', its tokens, and (pairs) how many are its source
    documents.parquet                                          source, version, file, sha256, bytes, tokens, split of each
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lab.data.documents import name_of
from lab.data.manifest import DOCUMENTS, SPLITS, Sums, array_file
from lab.data.parts import RECORD, SKIPPED, stem
from lab.records import read_json

# Documents whose digests are sorted at once, about: more where 512 buckets, each an open file, are too few.
BUCKET, MOST_BITS = 2**20, 9
_ROWS = 2**16  # documents of a row group


@dataclass(frozen=True, kw_only=True)
class Divided:
    """How documents were divided. `moved`: documents whose hash is of the other side, so that none is empty."""

    share: float
    train: int
    held_out: int
    moved: int | None  # the number, among all documents, of the one that changed sides


class Parts:
    """The records of all parts, one part at a time."""

    def __init__(self, directory: Path, count: int):
        self.directory = directory
        self.notes = [read_json(stem(directory, number).with_suffix(".json")) for number in range(count)]
        self.documents = sum(note["documents"] for note in self.notes)
        self.pairs = any(note["pairs"] for note in self.notes)

    def __iter__(self) -> Iterator[tuple[int, int, np.ndarray]]:
        """Part, number of its first document, its records."""
        first = 0
        for number, note in enumerate(self.notes):
            if note["documents"]:
                file = stem(self.directory, number).with_suffix(".documents")
                records = np.memmap(file, RECORD, mode="r")
                assert len(records) == note["documents"], file
                yield number, first, records
            first += note["documents"]

    def files(self, number: int) -> list[tuple[str, str, str]]:
        with stem(self.directory, number).with_suffix(".files").open() as stream:
            return [tuple(json.loads(line)) for line in stream]

    def skipped(self) -> dict[str, int]:
        counted: Counter[str] = Counter(dict.fromkeys(SKIPPED, 0))
        for note in self.notes:
            counted.update(note["skipped"])
        return dict(counted)


def duplicates(parts: Parts, work: Path) -> np.ndarray:
    """bool [documents], memory-mapped: the exact duplicates of an earlier one."""
    found = np.memmap(work / "duplicates", np.bool_, mode="w+", shape=(max(1, parts.documents),))
    bits = min((parts.documents // BUCKET).bit_length(), MOST_BITS)
    buckets = [work / f"bucket-{number}" for number in range(2**bits)]
    row = np.dtype([("digest", ">u8", (4,)), ("place", "<i8")])
    streams = [bucket.open("wb") for bucket in buckets]
    try:
        for _, first, records in parts:
            for at in range(0, len(records), BUCKET):
                some = records[at : at + BUCKET]
                rows = np.empty(len(some), row)
                rows["digest"] = some["digest"]
                rows["place"] = first + at + np.arange(len(some))
                belongs = (rows["digest"][:, 0].astype(np.uint64) >> np.uint64(64 - bits)) if bits else None
                for number, stream in enumerate(streams):
                    stream.write((rows if belongs is None else rows[belongs == number]).tobytes())
    finally:
        for stream in streams:
            stream.close()
    for bucket in buckets:
        rows = np.fromfile(bucket, row)
        bucket.unlink()
        words = rows["digest"].astype(np.uint64)
        # Sorted by place too, as they came: the first of equal ones stays.
        order = np.lexsort(tuple(words[:, i] for i in (3, 2, 1, 0)))
        same = (words[order[1:]] == words[order[:-1]]).all(axis=1)
        found[rows["place"][order[1:][same]]] = True
    return found[: parts.documents]


def split(parts: Parts, repeated: np.ndarray, share: float) -> Divided:
    """Held out is a document whose hash (of a pair: its source's), read as a fraction, lies below `share`. So a document's
    split does not change with the others: what one machine trains on, none holds out at the same share. Only where a
    side would be empty, the document that comes nearest moves over."""
    held = kept = 0
    lowest, highest = (np.inf, -1), (-np.inf, -1)
    for _, first, records in parts:
        fractions = fraction(records["key"])
        live = ~repeated[first : first + len(records)]
        if not live.any():
            continue
        places = np.flatnonzero(live)
        fractions = fractions[places]
        kept += len(places)
        held += int((fractions < share).sum())
        least, most = int(fractions.argmin()), int(fractions.argmax())
        lowest = min(lowest, (float(fractions[least]), first + int(places[least])))
        if fractions[most] > highest[0]:
            highest = (float(fractions[most]), first + int(places[most]))
    moved = lowest[1] if held == 0 else highest[1] if held == kept else None
    held += 0 if moved is None else 1 if held == 0 else -1
    return Divided(share=share, train=kept - held, held_out=held, moved=moved)


def fraction(keys: np.ndarray) -> np.ndarray:
    return keys.astype(np.float64) / 2.0**64


def write(parts: Parts, repeated: np.ndarray, divided: Divided, target: Path) -> Sums:
    """Writes the index into `target`."""
    writer = _Writer(parts, divided, target)
    token, before, counted = 0, Counter(), 0
    try:
        for number, first, records in parts:
            # What parts before this one hold, those without documents too.
            for note in parts.notes[counted:number]:
                token += note["tokens"]
                before.update(note["numbered"])
            counted = number
            files = parts.files(number)
            starts = token + np.cumsum(records["tokens"]) - records["tokens"]
            for at in range(0, len(records), _ROWS):
                rows = slice(at, at + _ROWS)
                live = np.flatnonzero(~repeated[first + at : first + at + len(records[rows])])
                if len(live):
                    writer.add(records[rows][live], starts[rows][live], first + at + live, files, before)
    finally:
        writer.close()
    return writer.sums


class _Writer:
    def __init__(self, parts: Parts, divided: Divided, target: Path):
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.divided, self.pa = divided, pa
        sizes = {"train": divided.train, "held_out": divided.held_out}
        names = ("starts", "lengths", "sources") if parts.pairs else ("starts", "lengths")
        self.arrays = {
            name: {which: _Array(target / array_file(name, which), sizes[name]) for which in names} for name in SPLITS
        }
        text, whole = pa.string(), pa.int64()
        self.schema = pa.schema([("source", text), ("version", text), ("file", text), ("sha256", pa.binary(32)),
                                 ("bytes", whole), ("tokens", whole), ("held_out", pa.bool_())])  # fmt: skip
        self.parquet = pq.ParquetWriter(target / DOCUMENTS, self.schema, compression="zstd")
        self.sums = Sums(divided.share)

    def add(
        self,
        records: np.ndarray,
        starts: np.ndarray,
        places: np.ndarray,
        files: list[tuple[str, str, str]],
        before: Counter[str],
    ) -> None:
        """before: documents of each numbered file in earlier parts."""
        held = fraction(records["key"]) < self.divided.share
        held ^= places == (-1 if self.divided.moved is None else self.divided.moved)
        for name, mask in (("train", ~held), ("held_out", held)):
            columns = {"starts": starts, "lengths": records["tokens"], "sources": records["sources"]}
            for which, array in self.arrays[name].items():
                array.add(columns[which][mask])
        sources, versions, names = zip(*(files[file] for file in records["file"]), strict=True)
        names = [
            name_of(name, int(number) + before[name] if number >= 0 else None)
            for name, number in zip(names, records["number"], strict=True)
        ]
        raw = records["digest"].tobytes()
        digests = [raw[at : at + 32] for at in range(0, len(raw), 32)]
        self.sums.add(records, sources, versions, names, digests, held)
        shown = [name.encode("utf-8", "backslashreplace").decode() for name in names]
        columns = [list(sources), list(versions), shown, digests, records["bytes"], records["tokens"], held]
        self.parquet.write_table(
            self.pa.table([self.pa.array(c, f.type) for c, f in zip(columns, self.schema, strict=True)], self.schema)
        )

    def close(self) -> None:
        self.parquet.close()
        for arrays in self.arrays.values():
            for array in arrays.values():
                array.close()


class _Array:
    """An int64 .npy of a known length, written in pieces."""

    def __init__(self, path: Path, length: int):
        self.stream = path.open("wb")
        header = {"descr": "<i8", "fortran_order": False, "shape": (length,)}
        np.lib.format.write_array_header_1_0(self.stream, header)

    def add(self, values: np.ndarray) -> None:
        self.stream.write(np.ascontiguousarray(values, "<i8").tobytes())

    def close(self) -> None:
        self.stream.close()
