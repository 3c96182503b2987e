"""Plain text: a folder of files, each a document, or one long file that is cut into documents."""

import codecs
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from lab.checks import nearest
from lab.data import documents
from lab.data.documents import (
    LONGEST_DOCUMENT,
    MB,
    Document,
    Listing,
    Part,
    digest,
    gather,
    part_size,
    states,
    unreadable,
)

# A file given by itself is one long text. So that it can be split, it is cut into documents: 20 or more, of at most
# LONGEST and, as far as that leaves any, at least SHORTEST characters.
PIECES, SHORTEST, LONGEST = 20, 1024, 65_536
# How far behind a part's place in a long file a line end is looked for, before it is cut at any character.
LOOK_AHEAD = MB
_UTF8_LONGEST = 4  # bytes of a character


def text(path: str | None = None) -> Listing:
    """A folder: each file in it is a document, hidden ones excepted; what is no UTF-8 text is left out and counted (of a file
    of more than 16 MiB, the 32 MiB in which that is). A file, and one of more than 16 MiB in a folder: cut into documents
    at blank lines. A file given by itself must be text."""
    if path is None:
        raise ValueError("data.path = None: corpus 'text' needs the path of a folder or a file")
    root = existing(path)
    names = folder_files(root) if root.is_dir() else [""]
    if not names:
        raise ValueError(f"data.path = {path!r}: no files in this folder (hidden ones are left out): use another one")
    found = states(root, names)
    most = part_size(sum(size for _, size, _ in found))
    found_parts: list[Part] = []
    for name, size, _ in found:
        if name and size <= LONGEST_DOCUMENT:
            found_parts.append(_whole(root, name, size))
        else:
            begins = range(0, max(size, 1), documents.PART)  # what is in memory at once, however large the file
            found_parts += [_piece(root, name, at, min(at + documents.PART, size)) for at in begins]
    return Listing(path=str(root), fingerprint=digest(["text", str(root), found]), parts=gather(found_parts, most))


def _whole(root: Path, name: str, size: int) -> Part:
    def read() -> Iterator[Document]:
        yield Document(source="text", version="", file=name, content=read_text(root / name))

    return Part(size=size, read=read)


def _piece(root: Path, name: str, start: int, end: int) -> Part:
    def read() -> Iterator[Document]:
        file = root / name if name else root
        try:
            with file.open("rb") as stream:
                stream.seek(0, os.SEEK_END)
                whole = stream.tell()
                first, last = _boundary(stream, start, whole), _boundary(stream, end, whole)
                stream.seek(first)
                raw = stream.read(last - first)
        except OSError as error:
            raise unreadable(file, error) from error
        blocks = _decoded(raw)
        if blocks is None and not name:
            raise _no_text(file, raw, first)
        if blocks is None:
            yield Document(source="text", version="", file=name or root.name, content=None)
            return
        # A longer text is cut into pieces of LONGEST characters, wherever it is looked at.
        longer = whole > PIECES * LONGEST * _UTF8_LONGEST
        size = LONGEST if longer else min(max(sum(map(len, blocks)) // PIECES, SHORTEST), LONGEST)
        for number, piece in enumerate(pieces(blocks, size)):
            yield Document(source="text", version="", file=name or root.name, content=piece, number=number)

    return Part(size=end - start, read=read)


def _boundary(stream, place: int, whole: int) -> int:
    """Where a part that should begin at `place` does: after the next line end, if one is near, else at a character."""
    if place <= 0 or place >= whole:
        return min(max(place, 0), whole)
    stream.seek(place)
    ahead = stream.read(LOOK_AHEAD)
    at = ahead.find(b"\n")
    if at >= 0:
        return place + at + 1
    # No more than three bytes go on with a character that began before.
    most = min(_UTF8_LONGEST, len(ahead))
    return place + next((i for i in range(most) if ahead[i] & 0xC0 != 0x80), most)


def read_text(file: Path) -> str | None:
    """The file's text, exactly; None where it is not UTF-8 or holds a NUL, which text does not."""
    try:
        blocks = _decoded(file.read_bytes())
    except OSError as error:
        raise unreadable(file, error) from error
    return None if blocks is None else "".join(blocks)


def _decoded(raw: bytes) -> list[str] | None:
    """The text, a MiB at a time: in one string every character takes four bytes where one of them does."""
    if b"\0" in raw:
        return None
    decode = codecs.getincrementaldecoder("utf-8")().decode
    try:
        return [decode(raw[at : at + MB], at + MB >= len(raw)) for at in range(0, len(raw), MB)]
    except UnicodeDecodeError:
        return None


def _no_text(file: Path, raw: bytes, first: int) -> ValueError:
    """raw: what lies in the file from byte `first` on, which is no text."""
    try:
        raw.decode("utf-8")
        at, what = raw.index(b"\0"), "a NUL"
    except UnicodeDecodeError as error:
        at, what = error.start, f"0x{raw[error.start]:02x}, which is not UTF-8 ({error.reason})"
    return ValueError(
        f"{file}: byte {first + at:,} (from 0), in line {line_number(file, first + at):,}, is {what}: mend it, or write the file "
        f"anew as UTF-8, such as with iconv -f latin1 -t utf-8 {file.name}"
    )


def line_number(file: Path, place: int) -> int:
    """From 1."""
    lines, left = 1, place
    with file.open("rb") as stream:
        while left > 0 and (block := stream.read(min(left, MB))):
            lines += block.count(b"\n")
            left -= len(block)
    return lines


def pieces(blocks: Iterable[str], size: int) -> Iterator[str]:
    """A text that comes in blocks, in pieces of `size` characters at most: cut after the last blank line in the second half of
    them, else line end, else anywhere."""
    text = ""
    for block in blocks:
        text, start = text + block, 0
        while start + size < len(text):
            end = start + size
            for mark in ("\n\n", "\n"):
                at = text.rfind(mark, start + size // 2, end)
                if at >= 0:
                    end = at + len(mark)
                    break
            yield text[start:end]
            start = end
        text = text[start:]
    if text:
        yield text


def existing(path: str) -> Path:
    """The absolute path; ValueError, with what is there instead, where it is of nothing."""
    root = Path(path).expanduser().absolute()
    if not root.exists():
        raise ValueError(f"data.path = {path!r}: no such folder or file{_sibling(root)}")
    return root


def folder_files(root: Path) -> list[str]:
    """Every file below a folder, hidden ones left out, as paths within it; sorted."""

    found, folders = [], [""]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(root / folder) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(f"{folder}{entry.name}/")
                    elif entry.is_file():
                        found.append(f"{folder}{entry.name}")
        except OSError as error:
            raise unreadable(root / folder, error) from error
    return sorted(found)


def _sibling(path: Path) -> str:
    """' in FOLDER (did you mean ...?)' for a path that is not there."""
    parent = path.parent
    while not parent.is_dir():
        path, parent = parent, parent.parent
    try:
        names = sorted(entry.name for entry in parent.iterdir() if not entry.name.startswith("."))
    except OSError:
        names = []
    hint = nearest(path.name, names[:200]) if names else "it is empty"
    return f": {path.name!r} is not in {parent} ({hint if len(hint) < 200 else f'{len(names)} others are'})"
