"""What every source of text gives: documents, in parts that are read by themselves.

A source is listed once, without reading it (`Listing`). Its parts follow from the source alone, never from how many
processes read them, so that a corpus is the same bytes however it was prepared.
"""

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

MB = 2**20
# A part is about so many bytes of its files, or more, so that there are not more parts, each a file of tokens, than MOST_PARTS.
PART, MOST_PARTS = 32 * MB, 1024
# The longest that one document may be, in UTF-8 bytes, and the longest line or record that may hold it. What tokenizes
# a document needs up to a hundred times its size in memory.
LONGEST_DOCUMENT, LONGEST_RECORD = 16 * MB, 64 * MB


@dataclass(frozen=True, kw_only=True)
class Document:
    """`content` is text, or tokens as they are, or a pair of texts (source, target); None where a file was found that is no
    UTF-8 text, or is left out for another `reason`. `number` counts, from 0, the documents of one file within a part; None
    where the file is the document."""

    source: str  # distribution, or what else the text came with
    version: str
    file: str  # within the source, with forward slashes
    content: str | np.ndarray | tuple[str, str] | None
    number: int | None = None
    reason: str = "not_text"  # why there is no content, as the manifest counts it

    @property
    def name(self) -> str:
        return name_of(self.file, self.number)


def name_of(file: str, number: int | None) -> str:
    return file if number is None or number < 0 else f"{file}#{number:06d}"


@dataclass(frozen=True, kw_only=True)
class Part:
    """size: bytes of what is read, for a progress bar; 0 where that is not known."""

    size: int = 0
    read: Callable[[], Iterator[Document]]


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What a corpus is here and now. `fingerprint` changes when the documents may have; to know it reads none.

    Give either `read`, every document in order, or `parts`, of which the documents follow one another. licence: what the
    source says of itself.
    """

    path: str | None
    fingerprint: str
    read: Callable[[], Iterator[Document]] = lambda: iter(())
    parts: Sequence[Part] = ()
    licence: str | None = None

    def __post_init__(self):
        if self.parts:
            object.__setattr__(self, "read", self._read_parts)
        else:
            object.__setattr__(self, "parts", (Part(read=self.read),))

    def _read_parts(self) -> Iterator[Document]:
        return in_turn(self.parts)


def in_turn(parts: Iterable[Part]) -> Iterator[Document]:
    """The documents of one part after the other, numbered through each file, also where it lies in several."""
    before: Counter[str] = Counter()
    for part in parts:
        found: Counter[str] = Counter()
        for document in part.read():
            if document.number is not None:
                found[document.file] = document.number + 1
                if before[document.file]:
                    document = replace(document, number=before[document.file] + document.number)
            yield document
        before.update(found)


def digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def states(root: Path, names: Sequence[str]) -> list[tuple[str, int, int]]:
    """Name, size and time of change of each file; OSError where one can not be looked at."""
    found = []
    for name in names:
        try:
            state = (root / name).stat()
        except OSError as error:
            raise unreadable(root / name, error) from error
        found.append((name, state.st_size, state.st_mtime_ns))
    return found


def unreadable(where: Path | str, error: OSError) -> OSError:
    """What the system says of a source's file. It is no ValueError: that is the text's fault, and leaves nothing behind."""
    way_out = "mend the file or its disk, and the same command goes on from the parts that are done"
    if error.errno is None:
        return OSError(f"{where}: can not be read ({error}): {way_out}")
    return OSError(error.errno, f"can not be read ({error.strerror}): {way_out}", str(where))


def part_size(total: int) -> int:
    """Bytes of a part, of sources of so many."""
    return max(PART, -(-total // MOST_PARTS))


def gather(pieces: Iterable[Part], most: int) -> list[Part]:
    """Neighbouring pieces put together to parts of at most `most` bytes, a larger piece being one by itself."""
    groups: list[list[Part]] = [[]]
    size = 0
    for piece in pieces:
        if groups[-1] and size + piece.size > most:
            groups.append([])
            size = 0
        groups[-1].append(piece)
        size += piece.size

    return [
        Part(size=sum(piece.size for piece in group), read=functools.partial(in_turn, group))
        for group in groups
        if group
    ]


def too_long(where: str, size: int, limit: int = LONGEST_DOCUMENT) -> ValueError:
    return ValueError(
        f"{where}: more than {size / MB:,.0f} MiB, and one document may have {limit / MB:,.0f}: split it into shorter ones "
        "(a plain text file that is given by itself is cut into documents)"
    )
