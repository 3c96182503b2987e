"""What documents a corpus has, on small made-up installations and folders."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.data import corpora, text_files
from lab.data.corpora import CORPORA, listing
from lab.data.synthetic import DOCUMENT, FIRST, entropy_rate, markov_documents, markov_transitions, uniform_documents


def install(site: Path, name: str, files: dict[str, str], requires: tuple[str, ...] = (), version: str = "1.0"):
    """A distribution as pip leaves it: METADATA, RECORD, files."""
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = "".join(f"Requires-Dist: {line}\n" for line in requires)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{lines}\n")
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))
    for file, content in files.items():
        (site / file).parent.mkdir(parents=True, exist_ok=True)
        (site / file).write_text(content)


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """site-packages and a standard library of this test's own; bitterlab needs a-dep, and Extra.Thing with [dev]."""
    site, library = tmp_path / "site", tmp_path / "python3"
    install(
        site, "bitterlab", {"lab.py": "lab"}, ("A_Dep>=1", "extra-thing; extra == 'dev'", "never; python_version<'3'")
    )
    install(site, "a-dep", {"a.py": "a", "a_data.txt": "x", "../bin/a.py": "script"}, ("b-dep[fast]",))
    install(
        site, "b-dep", {"b/z.py": "bz", "b/a.py": "ba"}, ("c-dep; extra == 'fast'", "d-dep; extra == 'slow'", "a-dep")
    )
    install(site, "c-dep", {"c.py": "c"}, version="3.1")
    install(site, "unrelated", {"u.py": "u"})
    for file in ("os.py", "json/decoder.py", "test/test_os.py", "json/tests/t.py", "site-packages/p.py",
                 "config-3.11-x/python-config.py", "_sysconfigdata__linux_.py", "notes.txt"):  # fmt: skip
        (library / file).parent.mkdir(parents=True, exist_ok=True)
        (library / file).write_text(file)
    monkeypatch.syspath_prepend(str(site))
    get_path = corpora.sysconfig.get_path
    monkeypatch.setattr(
        corpora.sysconfig, "get_path", lambda name, *rest: str(library) if name == "stdlib" else get_path(name, *rest)
    )
    return site


def documents(corpus: str, path: Path | None = None):
    found = listing(corpus, None if path is None else str(path))
    return [(document.source, document.name, document.content) for document in found.read()]


def test_python_is_the_library_and_the_closure_of_base_dependencies(environment):
    assert documents("python") == [
        ("python", "json/decoder.py", "json/decoder.py"),
        ("python", "os.py", "os.py"),
        ("a-dep", "a.py", "a"),
        ("b-dep", "b/a.py", "ba"),
        ("b-dep", "b/z.py", "bz"),
        ("c-dep", "c.py", "c"),
    ]
    assert [document.version for document in listing("python").read()][-1] == "3.1"


def test_extras_that_are_installed_change_nothing(environment):
    before, fingerprint = documents("python"), listing("python").fingerprint
    install(environment, "Extra.Thing", {"extra.py": "extra"}, ("unrelated",))
    install(environment, "d-dep", {"d.py": "d"})
    assert documents("python") == before
    assert listing("python").fingerprint == fingerprint


def test_another_version_changes_the_fingerprint(environment):
    fingerprint = listing("python").fingerprint
    (environment / "c_dep-3.1.dist-info" / "RECORD").write_text("c.py,sha256=abc,1\n")
    assert listing("python").fingerprint != fingerprint


def test_what_is_missing_is_named(environment):
    record = environment / "b_dep-1.0.dist-info" / "RECORD"
    (environment / "c.py").unlink()
    assert "c-dep" not in [source for source, _, _ in documents("python")]
    record.unlink()
    with pytest.raises(ValueError, match=r"b-dep 1\.0 has no list of its files"):
        documents("python")
    (environment / "c_dep-3.1.dist-info" / "METADATA").unlink()
    (environment / "c_dep-3.1.dist-info" / "RECORD").unlink()
    (environment / "c_dep-3.1.dist-info").rmdir()
    with pytest.raises(ValueError, match=r"distribution c-dep, which b-dep needs, is not installed: pip install c-dep"):
        documents("python")


def test_text_is_every_visible_utf8_file(tmp_path):
    (tmp_path / "sub" / ".hidden").mkdir(parents=True)
    for name in ("b.txt", "a.md", "sub/c.py", ".d", "sub/.hidden/e.txt"):
        (tmp_path / name).write_text(f"I am {name}\r\n", newline="")
    (tmp_path / "latin").write_bytes("é".encode("latin-1"))
    (tmp_path / "binary").write_bytes(b"a\0b")
    assert documents("text", tmp_path) == [
        ("text", "a.md", "I am a.md\r\n"),
        ("text", "b.txt", "I am b.txt\r\n"),
        ("text", "binary", None),
        ("text", "latin", None),
        ("text", "sub/c.py", "I am sub/c.py\r\n"),
    ]


@given(
    st.lists(st.text(alphabet="abé😀\n", max_size=60), max_size=20),
    st.integers(1, 80),
)
def test_a_long_text_is_cut_alike_in_whatever_blocks_it_comes(blocks, size):
    """Each piece ends where the text itself says, looked at as one: the rule in its own words."""
    content, pieces = "".join(blocks), list(text_files.pieces(blocks, size))
    assert "".join(pieces) == content and all(pieces)
    start = 0
    for piece in pieces[:-1]:
        window, half = content[start : start + size], size // 2
        blank, line = window.rfind("\n\n", half), window.rfind("\n", half)
        assert len(piece) == (blank + 2 if blank >= 0 else line + 1 if line >= 0 else size)
        start += len(piece)
    assert len(content) - start <= size


@given(
    st.text(alphabet="a\u00e9\u4e00😀", max_size=40),
    st.integers(1, 9),
    st.sampled_from([b"", b"\0", b"\xff", b"\xf0\x9f"]),
)
def test_text_is_decoded_in_blocks_as_at_once(content, block, broken):
    """Also where characters lie across their ends; what is no text is none wherever it lies."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "MB", block)
        found = text_files._decoded(content.encode() + broken)
    assert found is None if broken else "".join(found) == content


def test_a_file_is_cut_at_blank_lines(tmp_path):
    paragraph = "words words\nwords\n\n"
    (tmp_path / "book.txt").write_text(paragraph * 10_000)
    found = documents("text", tmp_path / "book.txt")
    assert len(found) >= 20
    assert [file for _, file, _ in found][:2] == ["book.txt#000000", "book.txt#000001"]
    assert all(content.endswith("\n\n") for _, _, content in found)


def test_uniform_bytes_are_uniform():
    tokens = uniform_documents(16)
    assert tokens.shape == (16, DOCUMENT)
    counts = np.bincount(tokens.ravel(), minlength=256)
    expected = tokens.size / 256
    assert ((counts - expected) ** 2 / expected).sum() < 350  # chi-squared of 255 degrees: p = 7e-5
    pairs = np.bincount(tokens[:, :-1].ravel() // 16 * 16 + tokens[:, 1:].ravel() // 16, minlength=256)
    expected = pairs.sum() / 256
    assert ((pairs - expected) ** 2 / expected).sum() < 350


def test_markov_documents_follow_their_chain():
    tokens = markov_documents(64).astype(np.int64) - FIRST
    assert tokens.min() >= 0 and tokens.max() < 64
    pairs = np.zeros((64, 64))
    np.add.at(pairs, (tokens[:, :-1].ravel(), tokens[:, 1:].ravel()), 1)
    transitions = markov_transitions()
    np.testing.assert_allclose(pairs / pairs.sum(1, keepdims=True), transitions, atol=0.03)
    loss = -(pairs * np.log(transitions)).sum() / pairs.sum()
    assert loss == pytest.approx(entropy_rate(), abs=0.005)


@pytest.mark.parametrize(
    ("make", "start", "total"),
    [
        (uniform_documents, [131, 243, 36, 242, 79, 108, 211, 104], 68528183910),
        (markov_documents, [37, 46, 60, 66, 66, 33, 86, 41], 34806325841),
    ],
)
def test_generated_documents_never_change(make, start, total):
    tokens = make(4)
    assert tokens[0, :8].tolist() == start
    assert int((tokens.astype(np.int64) * np.arange(DOCUMENT)).sum()) == total


def missing(tmp_path):
    (tmp_path / "corpus_en").mkdir()
    return tmp_path / "corpus_em"


@pytest.mark.parametrize(
    ("corpus", "path", "message"),
    [
        ("pyhton", None, r"data.corpus = 'pyhton': did you mean 'python'\?"),
        ("python", lambda tmp: tmp, "corpus 'python' takes none; for a folder use corpus 'text'"),
        ("markov", lambda tmp: tmp, "takes none"),
        ("text", None, "needs the path of a folder or a file"),
        ("text", missing, r"no such folder or file.*did you mean 'corpus_en'\?"),
        ("text", lambda tmp: tmp / "no" / "where" / "here", "'no' is not in"),
        ("text", lambda tmp: tmp, "no files in this folder"),
    ],
)
def test_bad_requests_say_what_to_do(tmp_path, corpus, path, message):
    with pytest.raises(ValueError, match=message):
        listing(corpus, path and str(path(tmp_path)))


def test_files_that_can_not_be_read_are_errors(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("text")
    found = listing("text", str(tmp_path))

    def refuse(self):
        raise PermissionError("not yours")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(OSError, match=r"a\.txt: can not be read \(not yours\): mend the file or its disk"):
        list(found.read())


def test_folders_that_can_not_be_read_are_errors(tmp_path, monkeypatch):
    def refuse(folder):
        raise PermissionError("not yours")

    monkeypatch.setattr(text_files.os, "scandir", refuse)
    with pytest.raises(OSError, match=r"can not be read \(not yours\): mend the file or its disk"):
        listing("text", str(tmp_path))


def test_every_corpus_lists_itself_twice_alike(environment, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt").write_text("a")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    np.save(tmp_path / "a.npy", np.zeros((2, 3), np.uint16))
    paths = {"text": folder, "hf": tmp_path, "tokens": tmp_path / "a.npy"}
    for name, corpus in CORPORA.items():
        if name == "hf":
            continue  # needs an extra: test_hub
        path = str(paths.get(name, tmp_path / f"a.{name}")) if name in (*paths, "jsonl", "parquet") else None
        assert corpus(path).fingerprint == corpus(path).fingerprint, name


def test_planning_imports_no_jax():
    code = "import sys, lab.data, lab.data.examples; assert not {'jax', 'grain'} & set(sys.modules), 'imported'"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
