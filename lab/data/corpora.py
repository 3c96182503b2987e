"""Which texts there are. A corpus is one function from a path (or None) to a `Listing`, and one line in `CORPORA`; what it
takes by name may stand in the corpus's name (jsonl:column=body). Tasks whose truth is known (lab.data.synthetic) are corpora
too, and so are pairs cut from source code (lab.data.code_pairs).

`python`, the default, is Python source that every machine has which runs the lab: the standard library without its
tests and what the lab's base dependencies install. Nothing is downloaded. It differs between machines and versions:
its manifest (lab.data.manifest) says what exactly it is.
"""

import functools
import hashlib
import inspect
import os
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import numpy as np
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lab.checks import nearest
from lab.data.code_pairs import CUTS, pairs
from lab.data.documents import Document, Listing, digest
from lab.data.hub import hf
from lab.data.synthetic import TASKS, task
from lab.data.tables import jsonl, parquet
from lab.data.text_files import read_text, text
from lab.data.token_files import tokens

LAB = "bitterlab"
PREPARED = "prepared"  # the corpus that is a prepared directory (lab.data.prepare)
# Tests; packages that are not the standard library's own.
_NOT_LIBRARY = {"test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages"}


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
            yield Document(source="python", version=version, file=file, content=read_text(library / file))
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
                    yield Document(source=name, version=dist.version, file=file, content=read_text(where))

    return Listing(path=None, fingerprint=digest(["python", sys.version, str(library), records]), read=read)


def python_pairs(corpus: str, path: str | None = None) -> Listing:
    """Functions of corpus `python` cut into source and target (lab.data.code_pairs): `python_docstrings` gives code and asks
    for the first sentence of its docstring, `python_bodies` gives signature and docstring and asks for the body. Of what is
    left out, a document without content each, so that the manifest counts it."""
    _refuse_path(corpus, path)
    files = python()

    def read() -> Iterator[Document]:
        left_out: Counter[str] = Counter()
        texts = ((document, document.content) for document in files.read() if isinstance(document.content, str))
        for document, name, pair in pairs(texts, CUTS[corpus], left_out):
            yield replace(document, file=f"{document.file}:{name}", content=pair)
        for reason in left_out.elements():
            yield Document(source=corpus, version="", file="", content=None, reason=reason)

    return Listing(path=None, fingerprint=digest([corpus, files.fingerprint]), read=read)


def generated(corpus: str, path: str | None = None) -> Listing:
    """The documents of a task, by its name with its settings: the same for ever."""
    _refuse_path(corpus, path)
    made = task(corpus)

    def read() -> Iterator[Document]:
        for number, content in enumerate(made.read()):
            yield Document(source=made.name, version="1", file=f"{number:04d}", content=content)

    # A numpy that drew other numbers would be found out: the corpus is made anew and its manifest compared.
    return Listing(path=None, fingerprint=digest([made.name, np.__version__]), read=read)


CORPORA: dict[str, Callable[..., Listing]] = {
    "python": python,
    "text": text,
    "jsonl": jsonl,
    "parquet": parquet,
    "hf": hf,
    "tokens": tokens,
    **{name: functools.partial(python_pairs, name) for name in CUTS},
    **{name: functools.partial(generated, name) for name in TASKS},
}


def listing(corpus: str, path: str | None = None) -> Listing:
    """The listing of a corpus, whose name may carry settings: jsonl:column=body; ValueError for an unknown name or setting,
    or a path that it can not use."""
    name, _, settings = corpus.partition(":")
    if name == PREPARED:
        raise ValueError(
            f"data.path = {path!r}: it is prepared already, and its text is not read again: use it as it is (--data {path}; "
            "`lab data mix` mixes such), or give the source that it was prepared from"
        )
    if name not in CORPORA:
        raise ValueError(f"data.corpus = {corpus!r}: {nearest(name, list(CORPORA))}")
    if name in TASKS:  # which read their settings themselves, by kind and range
        return generated(corpus, path)
    return CORPORA[name](path, **_settings(corpus, settings, CORPORA[name]))


def _settings(corpus: str, text: str, of: Callable[..., Listing]) -> dict[str, str]:
    """The settings in a corpus's name, name=value with commas between them, where `of` takes them."""
    known = list(inspect.signature(of).parameters)[1:]
    found = {}
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        if not equals or not value:
            raise ValueError(f"data.corpus = {corpus!r}: write settings as name=value, with commas between them")
        if name not in known:
            hint = nearest(name, known) if known else "it takes none"
            raise ValueError(f"data.corpus = {corpus!r}: no setting {name!r}: {hint}")
        found[name] = value
    return found


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


def _refuse_path(corpus: str, path: str | None) -> None:
    if path is not None:
        raise ValueError(f"data.path = {path!r}: corpus {corpus!r} takes none; for a folder use corpus 'text'")
