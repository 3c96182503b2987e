"""Text that is tokens already: .npy arrays, and .bin files of raw ids as nanoGPT and llm.c write them."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lab.checks import nearest
from lab.data.documents import LONGEST_DOCUMENT, Document, Listing, Part, digest, gather, part_size, states, unreadable
from lab.data.text_files import existing, folder_files

SUFFIXES = (".npy", ".bin")
# Tokens of the pieces that a stream without separators is cut into.
LONGEST = 65_536
# llm.c's header: 256 int32, of which the first are such a number, a version, and the count of tokens.
MAGICS, HEADER = {20240520: "uint16", 20240801: "uint32"}, 1024
KINDS = ("uint8", "uint16", "uint32", "int32", "int64")
DTYPE = "uint16"


def tokens(path: str | None = None, *, dtype: str | None = None, separator: str | None = None) -> Listing:
    """Each row of a 2-D .npy is a document. A .bin, or a 1-D .npy, is one stream: it is cut at each `separator` (the id
    between documents, before the first or behind the last), which is in no document: ends are the objective's own. Where
    none is given, it is cut into pieces of 65,536 tokens. dtype: of a .bin without a header (default: uint16)."""
    if path is None:
        raise ValueError("data.path = None: corpus 'tokens' needs the path of a .npy or .bin file, or a folder of them")
    if dtype is not None and dtype not in KINDS:
        raise ValueError(f"dtype = {dtype!r}: {nearest(dtype, list(KINDS))}")
    if separator is not None and not separator.isdigit():
        raise ValueError(f"separator = {separator!r}: use the id of the token between documents")
    cut = None if separator is None else int(separator)
    root = existing(path)
    names = [name for name in folder_files(root) if name.endswith(SUFFIXES)] if root.is_dir() else [""]
    if not names:
        raise ValueError(f"data.path = {path!r}: no .npy or .bin in this folder: use another one")
    found = states(root, names)
    most = part_size(sum(size for _, size, _ in found))
    parts = []
    for name, _, _ in found:
        file, shown = (root / name if name else root), name or root.name
        array = _open(file, dtype)
        rows = max(1, most // max(1, array.itemsize * (array.shape[1] if array.ndim == 2 else 1)))
        if array.ndim == 1:
            rows = -(-rows // LONGEST) * LONGEST
        for start in range(0, len(array), rows):
            end = min(start + rows, len(array))
            size = (end - start) * array.nbytes // max(1, len(array))
            parts.append(Part(size=size, read=_reader(file, shown, dtype, cut, start, end)))
    if not parts:
        raise ValueError(f"data.path = {path!r}: no tokens in it: use another file or folder")
    return Listing(
        path=str(root), fingerprint=digest(["tokens", str(root), dtype, cut, found]), parts=gather(parts, most)
    )


def _header(file: Path, dtype: str | None) -> tuple[str, int | None]:
    """The type of a .bin's ids, and how many its header says there are; None where it has none."""
    try:
        with file.open("rb") as stream:
            raw = stream.read(12)
    except OSError as error:
        raise unreadable(file, error) from error
    magic, version, count = np.frombuffer(raw, "<i4").tolist() if len(raw) == 12 else (0, 0, 0)
    if magic not in MAGICS:
        # Magic numbers of this family are days. As ids, no text begins so: the upper half of a version is 0.
        if re.fullmatch(r"20[2-9]\d(0[1-9]|1[0-2])([0-2]\d|3[01])", str(magic)) and 0 <= version < 100:
            known = ", ".join(map(str, MAGICS))
            raise ValueError(
                f"{file}: a header with the unknown magic number {magic}; {known} are known: save its ids as .npy, or without "
                "a header"
            )
        return dtype or DTYPE, None
    if dtype not in (None, MAGICS[magic]):
        raise ValueError(
            f"{file}: dtype = {dtype!r}, and its header ({magic}) says {MAGICS[magic]}: leave the dtype out"
        )
    return MAGICS[magic], count


def _open(file: Path, dtype: str | None) -> np.ndarray:
    """Memory-mapped."""
    kind, count = ("", None) if file.name.endswith(".npy") else _header(file, dtype)
    try:
        if file.name.endswith(".npy"):
            array = np.load(file, mmap_mode="r")
        else:
            array = np.memmap(file, np.dtype(kind).newbyteorder("<"), mode="r", offset=0 if count is None else HEADER)
            if count is not None and len(array) != count:
                raise ValueError(f"{len(array):,} tokens, and its header says {count:,}")
    except (OSError, EOFError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise unreadable(file, error) from error
        raise ValueError(f"{file}: not a whole file of tokens ({error}): fetch it again or remove it") from error
    if array.dtype.kind not in "ui" or array.ndim not in (1, 2):
        raise ValueError(
            f"{file}: {array.dtype} of {array.ndim} dimensions: use whole numbers, in one stream or [documents, tokens]"
        )
    return array


def _reader(file: Path, shown: str, dtype: str | None, cut: int | None, start: int, end: int):
    def read() -> Iterator[Document]:
        array = _open(file, dtype)
        try:
            for number, content in enumerate(_documents(array, cut, start, end)):
                yield Document(source="tokens", version="", file=shown, content=content, number=number)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error

    return read


def _documents(array: np.ndarray, cut: int | None, start: int, end: int) -> Iterator[np.ndarray]:
    if array.ndim == 2:
        yield from (np.ascontiguousarray(row) for row in array[start:end])
    elif cut is None:
        yield from (np.array(array[at : min(at + LONGEST, end)]) for at in range(start, end, LONGEST))
    else:
        # A part has the documents before which a separator lies in it; the last may end behind it.
        begins = np.flatnonzero(array[start:end] == cut) + start + 1
        if start == 0 and array[0] != cut:
            begins = np.concatenate([[0], begins])
        ends = [*(begins[1:] - 1), _next(array, cut, end)] if len(begins) else []
        for at, following in zip(begins.tolist(), ends, strict=True):
            if at == len(array):  # behind the last separator
                return
            if following - at > LONGEST_DOCUMENT:
                raise ValueError(
                    f"{following - at:,} tokens from {at:,} on without separator {cut}: more than the {LONGEST_DOCUMENT:,} that "
                    "one document may have: give the id that lies between documents here"
                )
            yield np.array(array[at:following])


def _next(array: np.ndarray, cut: int, place: int) -> int:
    """The first place from `place` on at which a separator lies, or the end."""
    step = 2**20
    for at in range(place, len(array), step):
        found = np.flatnonzero(array[at : at + step] == cut)
        if len(found):
            return at + int(found[0])
    return len(array)
