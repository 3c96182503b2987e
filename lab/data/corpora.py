"""Which texts there are. A corpus is one function from a path (or None) to a `Listing`, and one line in `CORPORA`.

`python`, the default, is Python source that every machine has which runs the lab: the standard library without its
tests and what the lab's base dependencies install. Nothing is downloaded. It differs between machines and versions:
its manifest (lab.data.manifest) says what exactly it is. Tasks whose truth is known (lab.data.synthetic) are corpora too;
their settings ride in the name: "copy:length=8".
"""

import functools
import hashlib
import json
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import numpy as np
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lab.data.code_pairs import CUTS, pairs
from lab.data.synthetic import TASKS, task
from lab.spec import nearest

LAB = "bitterlab"
# A file given by itself is one long text. So that it can be split, it is cut into documents: 20 or more, of at most
# LONGEST and, as far as that leaves any, at least SHORTEST characters.
PIECES, SHORTEST, LONGEST = 20, 1024, 65_536

# Tests; packages that are not the standard library's own.
_NOT_LIBRARY = {"test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages"}


@dataclass(frozen=True, kw_only=True)
class Document:
    """`content` is text, (source, target) of a pair, or tokens as they are; None where a file was found that is no UTF-8
    text."""

    source: str  # distribution, or what else the text came with
    version: str
    file: str  # within the source, with forward slashes
    content: str | tuple[str, str] | np.ndarray | None


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What a corpus is here and now. `fingerprint` changes when the documents may have; to know it reads none."""

    path: str | None
    fingerprint: str
    read: Callable[[], Iterator[Document]]


def python(path: str | None = None) -> Listing:
    """Every .py file of the standard library (no tests) and of the base dependencies' transitive closure.

    The closure leaves out the lab and its extras, so `[dev]` or `[cuda]` installs change nothing.
    """
    _refuse_path("python", path)
    library = Path(sysconfig.get_path("stdlib"))
    distributions = _closure()
    records = [
        [name, dist.version, hashlib.sha256((dist.read_text("RECORD") or "").encode()).hexdigest()]
        for name, dist in distributions.items()
    ]

    def read() -> Iterator[Document]:
        version = sys.version.split()[0]
        for file in _library_files(library):
            yield Document(source="python", version=version, file=file, content=_text(library / file))
        for name, dist in distributions.items():
            if dist.files is None:
                raise ValueError(
                    f"corpus 'python': {name} {dist.version} has no list of its files (RECORD): "
                    "install it with pip or uv, or use corpus 'text'"
                )
            # Scripts, in directories above, carry the environment's path.
            files = {file.as_posix(): file for file in dist.files if file.suffix == ".py" and ".." not in file.parts}
            for file in sorted(files):
                where = Path(str(files[file].locate()))
                if where.exists():  # images strip tests, and leave the RECORD
                    yield Document(source=name, version=dist.version, file=file, content=_text(where))

    return Listing(path=None, fingerprint=_digest(["python", sys.version, str(library), records]), read=read)


def text(path: str | None = None) -> Listing:
    """A folder: each file in it is a document, hidden ones excepted. A file: cut into documents at blank lines."""
    if path is None:
        raise ValueError("data.path = None: corpus 'text' needs the path of a folder or a file")
    root = Path(path).expanduser().absolute()
    if not root.exists():
        raise ValueError(f"data.path = {path!r}: no such folder or file{_sibling(root)}")
    names = _folder_files(root) if root.is_dir() else [""]
    if not names:
        raise ValueError(f"data.path = {path!r}: no files in this folder (hidden ones are left out): use another one")
    try:
        states = [(name, (root / name).stat()) for name in names]
    except OSError as error:
        raise ValueError(f"data.path = {path!r}: can not be read ({error})") from error
    fingerprint = _digest(["text", str(root), [[name, state.st_size, state.st_mtime_ns] for name, state in states]])

    def read() -> Iterator[Document]:
        for name in names:
            content = _text(root / name)
            if name or content is None:
                yield Document(source="text", version="", file=name or root.name, content=content)
                continue
            for number, piece in enumerate(_pieces(content)):
                yield Document(source="text", version="", file=f"{root.name}#{number:06d}", content=piece)

    return Listing(path=str(root), fingerprint=fingerprint, read=read)


def python_pairs(corpus: str, path: str | None = None) -> Listing:
    """Functions of corpus `python` cut into source and target (lab.data.code_pairs): `python_docstrings` gives code and asks for
    the first sentence of its docstring, `python_bodies` gives signature and docstring and asks for the body."""
    _refuse_path(corpus, path)
    files = python()

    def read() -> Iterator[Document]:
        texts = ((document, document.content) for document in files.read() if isinstance(document.content, str))
        for document, name, pair in pairs(texts, CUTS[corpus]):
            yield replace(document, file=f"{document.file}:{name}", content=pair)

    return Listing(path=None, fingerprint=_digest([corpus, files.fingerprint]), read=read)


def generated(corpus: str, path: str | None = None) -> Listing:
    """The documents of a task, by its name with its settings: the same for ever."""
    _refuse_path(corpus, path)
    made = task(corpus)

    def read() -> Iterator[Document]:
        for number, tokens in enumerate(made.read()):
            yield Document(source=made.name, version="1", file=f"{number:04d}", content=tokens)

    # A numpy that drew other numbers would be found out: the corpus is made anew and its manifest compared.
    return Listing(path=None, fingerprint=_digest([made.name, np.__version__]), read=read)


CORPORA: dict[str, Callable[[str | None], Listing]] = {
    "python": python,
    "text": text,
    **{name: functools.partial(python_pairs, name) for name in CUTS},
    **{name: functools.partial(generated, name) for name in TASKS},
}


def listing(corpus: str, path: str | None = None) -> Listing:
    """The listing of a corpus; ValueError for an unknown name, a bad setting, or a path that it can not use."""
    name, colon, _ = corpus.partition(":")
    if name not in CORPORA:
        raise ValueError(f"data.corpus = {corpus!r}: {nearest(name, list(CORPORA))}")
    if colon and name not in TASKS:
        raise ValueError(f"data.corpus = {corpus!r}: corpus {name!r} has no settings: use {name!r}")
    return generated(corpus, path) if name in TASKS else CORPORA[name](path)


def _closure() -> dict[str, metadata.Distribution]:
    """Canonical name -> distribution of everything that the lab's base dependencies need, sorted by name."""
    found: dict[str, metadata.Distribution] = {}
    seen: set[tuple[str, str]] = set()
    waiting: list[tuple[str, str, str]] = [(LAB, "", "")]  # distribution, extra ("" is none), who wants it
    while waiting:
        name, extra, wanted_by = waiting.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        if name not in found:
            try:
                found[name] = metadata.distribution(name)
            except metadata.PackageNotFoundError as error:
                needed = f", which {wanted_by} needs," if wanted_by else ""
                remedy = f"pip install {name}" if wanted_by else "pip install -e . in its clone"
                raise ValueError(
                    f"corpus 'python': distribution {name}{needed} is not installed: {remedy}, or use corpus 'text'"
                ) from error
        for line in found[name].requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                needs = canonicalize_name(requirement.name)
                waiting += [(needs, extra, name) for extra in ("", *requirement.extras)]
    del found[LAB]
    return dict(sorted(found.items()))


def _library_files(library: Path) -> list[str]:
    """.py files below `library`, tests and files that building Python wrote left out; sorted by path."""
    found = []
    for folder, folders, files in os.walk(library):
        folders[:] = [name for name in folders if name not in _NOT_LIBRARY and not name.startswith("config-")]
        for name in files:
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                found.append((Path(folder) / name).relative_to(library).as_posix())
    if not found:
        raise ValueError(f"corpus 'python': no .py files in {library}: use a Python with its library's source")
    return sorted(found)


def _folder_files(root: Path) -> list[str]:
    def stop(error: OSError) -> None:
        raise ValueError(f"data.path = {str(root)!r}: can not be read ({error})") from error

    found = []
    for folder, folders, files in os.walk(root, onerror=stop):
        folders[:] = [name for name in folders if not name.startswith(".")]
        visible = [Path(folder) / name for name in files if not name.startswith(".")]
        found += [file.relative_to(root).as_posix() for file in visible if file.is_file()]
    return sorted(found)


def _text(file: Path) -> str | None:
    """The file's text, exactly; None where it is not UTF-8 or holds a NUL, which text does not."""
    try:
        content = file.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return None
    except OSError as error:
        raise ValueError(f"{file}: can not be read ({error}): mend or remove it") from error
    return None if "\0" in content else content


def _pieces(content: str) -> Iterator[str]:
    """Cuts after the last blank line, else line end, else anywhere."""
    size = min(max(len(content) // PIECES, SHORTEST), LONGEST)
    start = 0
    while start < len(content):
        end = start + size
        if end < len(content):
            for mark in ("\n\n", "\n"):
                at = content.rfind(mark, start + size // 2, end)
                if at >= 0:
                    end = at + len(mark)
                    break
        yield content[start:end]
        start = end


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


def _refuse_path(corpus: str, path: str | None) -> None:
    if path is not None:
        raise ValueError(f"data.path = {path!r}: corpus {corpus!r} takes none; for a folder use corpus 'text'")


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
