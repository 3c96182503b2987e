"""A prepared corpus, opened: tokens and index are memory-mapped, so that its size costs neither time nor memory.

Letters: B spans, n tokens of each.
"""

import errno
import mmap
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from lab.data.manifest import FILE, SPLITS, array_file
from lab.data.subwords import from_directory
from lab.data.tokenizers import TOKENIZERS, Tokenizer
from lab.records import read_json

_AT_ONCE = 2**20  # numbers of a mapped array that are looked at together
_PREFETCHED, _ASKED_FOR = 2**30, 2**20  # bytes


class Shards:
    """Files of raw ids that count as one array; each is opened when it is first read.

    Spans are read and not mapped: a page that is touched once costs more in a fault than in a call (32 spans of 1,024: 0.22 and
    0.14 ms), and what a disk can not give is an OSError, not a signal.
    """

    def __init__(self, files: Sequence[Path], tokens: Sequence[int], dtype: np.dtype):
        """Raises ValueError where a file has not its size."""
        self.files, self.dtype = list(files), dtype
        self.ends = np.cumsum(np.asarray(tokens, np.int64)) if tokens else np.zeros(0, np.int64)
        for file, count in zip(files, tokens, strict=True):
            if (size := file.stat().st_size) != count * dtype.itemsize:
                raise ValueError(f"{file.name} has {size:,} bytes, and {count * dtype.itemsize:,} belong there")
        self._opened: list[int | None] = [None] * len(self.files)
        weakref.finalize(self, _close, self._opened)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def read(self, starts_B: np.ndarray, length: int) -> Int[np.ndarray, "B n"]:
        """int32; no span crosses the end of a file. Raises OSError where one can not be read, or has been cut off since."""
        shards = np.searchsorted(self.ends, starts_B, side="right")
        before = np.where(shards > 0, self.ends[shards - 1], 0)
        found = np.empty((len(starts_B), length), np.int32)
        size = self.dtype.itemsize
        for row, (shard, start) in enumerate(zip(shards.tolist(), (starts_B - before).tolist(), strict=True)):
            raw = os.pread(self._file(shard), length * size, start * size)
            if len(raw) < length * size:
                raise OSError(
                    errno.EIO, "shorter than when it was opened: put it back as it was", str(self.files[shard])
                )
            found[row] = np.frombuffer(raw, self.dtype)
        return found

    def _file(self, number: int) -> int:
        opened = self._opened[number]
        if opened is None:
            opened = self._opened[number] = os.open(self.files[number], os.O_RDONLY)
            if hasattr(os, "posix_fadvise"):  # examples lie in no order: nothing is read ahead
                os.posix_fadvise(opened, 0, 0, os.POSIX_FADV_RANDOM)
        return opened


def _close(files: list[int | None]) -> None:
    for file in files:
        if file is not None:
            os.close(file)


def map_file(file: Path) -> mmap.mmap:
    """Read where it is touched and not around: examples lie in no order, and what a system reads ahead (up to megabytes) would
    be milliseconds a batch."""
    with file.open("rb") as stream:
        memory = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(memory, "madvise"):
        memory.madvise(mmap.MADV_RANDOM)
    return memory


def in_order(array: np.ndarray) -> Iterator[np.ndarray]:
    """A mapped array in pieces, from the first to the last, for once with what the system reads ahead."""
    memory = _memory(array)
    if memory is not None:
        memory.madvise(mmap.MADV_SEQUENTIAL)
    for at in range(0, len(array), _AT_ONCE):
        yield array[at : at + _AT_ONCE]
    if memory is not None:
        memory.madvise(mmap.MADV_RANDOM)
        memory.madvise(mmap.MADV_DONTNEED)  # out of this process, not out of the system's cache


def prefetch(array: np.ndarray) -> None:
    """Lets the system read a mapped array, if it is not too large, before it is asked for at random."""
    memory = _memory(array)
    if memory is not None and len(memory) <= _PREFETCHED:
        # Systems read no more of it than they would read ahead at once.
        for at in range(0, len(memory), _ASKED_FOR):
            memory.madvise(mmap.MADV_WILLNEED, at, min(_ASKED_FOR, len(memory) - at))


def _memory(array: np.ndarray) -> mmap.mmap | None:
    """What is mapped under an array or a part of it; None where that is nothing, or takes no advice."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    base = base.obj if isinstance(base, memoryview) else base
    return base if isinstance(base, mmap.mmap) and hasattr(base, "madvise") else None


def _array(file: Path) -> np.ndarray:
    """A .npy of one dimension, mapped."""
    with file.open("rb") as stream:
        np.lib.format.read_magic(stream)
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
        start = stream.tell()
    if len(shape) != 1 or file.stat().st_size != start + shape[0] * dtype.itemsize:
        raise ValueError(f"{file.name} is cut off")
    return np.frombuffer(map_file(file), dtype, offset=start) if shape[0] else np.zeros(0, dtype)


@dataclass(frozen=True, kw_only=True)
class Share:
    """Of a mixture: how large a part of the examples these documents give, which follow those of the share before."""

    weight: int  # relative to the others'
    documents: int


@dataclass(frozen=True, kw_only=True)
class Split:
    """Documents of one split: document d is tokens[starts[d] : starts[d] + lengths[d]]; all are memory-mapped.
    sources: of a corpus of pairs, how many tokens of each document are its source (the others are its target).
    mixture: of which corpora it is mixed, () where it is one."""

    tokens: np.ndarray | Shards
    starts: np.ndarray
    lengths: np.ndarray
    sources: np.ndarray | None = None
    mixture: tuple[Share, ...] = ()

    def read(self, starts_B: np.ndarray, length: int) -> Int[np.ndarray, "B n"]:
        """int32 tokens of the spans of one length that begin at these places, each within a document."""
        if isinstance(self.tokens, Shards):
            return self.tokens.read(starts_B, length)
        return self.tokens[starts_B[:, None] + np.arange(length)].astype(np.int32)

    def document(self, number: int) -> Int[np.ndarray, "n"]:
        """int32 tokens of one document."""
        return self.read(self.starts[number : number + 1], int(self.lengths[number]))[0]


@dataclass(frozen=True, kw_only=True)
class Corpus:
    train: Split
    held_out: Split
    tokenizer: Tokenizer
    summary: dict[str, Any]


def open_corpus(directory: Path) -> Corpus:
    """Raises ValueError, naming the directory and what is wrong, where it is not whole."""
    try:
        summary = read_json(directory / FILE)
        tokenizer = tokenizer_in(directory, summary)
        shards = summary["shards"]
        tokens = Shards([directory / s["file"] for s in shards], [s["tokens"] for s in shards], tokenizer.dtype)
        splits = {name: _split(directory, name, summary, tokens) for name in SPLITS}
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{directory}: not a whole corpus ({error}); delete this folder to prepare it again"
        ) from error
    return Corpus(train=splits["train"], held_out=splits["held_out"], tokenizer=tokenizer, summary=summary)


def _split(directory: Path, name: str, summary: Mapping[str, Any], tokens: Shards) -> Split:
    count = summary[name]["documents"]
    arrays = {}
    for which in ("starts", "lengths", *(("sources",) if summary["pairs"] else ())):
        file = array_file(name, which)
        arrays[which] = _array(directory / file)
        if arrays[which].shape != (count,) or arrays[which].dtype != np.int64:
            raise ValueError(f"{file} has {arrays[which].shape} of {arrays[which].dtype}, {count} int64 expected")
    if count and not 0 <= arrays["starts"][-1] <= len(tokens) - arrays["lengths"][-1]:
        raise ValueError(f"{array_file(name, 'starts')} points behind the last token")
    mixture = tuple(Share(weight=m["weight"], documents=m[name]) for m in summary.get("mixture", ()))
    return Split(tokens=tokens, mixture=mixture, **arrays)


def tokenizer_in(directory: Path, summary: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that a prepared directory was made with, its bytes scaled where it does not keep them all; ValueError
    where it is another than the manifest names."""
    wanted = summary["tokenizer"]
    tokenizer = TOKENIZERS.get(wanted["name"]) or from_directory(directory)
    if tokenizer.name != wanted["name"] or tokenizer.text != wanted["vocabulary"]:
        raise ValueError(
            f"its tokenizer is {tokenizer.name!r} of {tokenizer.text} ids, and the manifest says {wanted['name']!r} of "
            f"{wanted['vocabulary']}: put the file back that belongs there"
        )
    scale = wanted["scale"]
    return tokenizer if scale == 1.0 else replace(tokenizer, token_bytes=tokenizer.token_bytes * scale)
