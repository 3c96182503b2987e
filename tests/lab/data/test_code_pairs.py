"""Functions cut into pairs: what is taken, what is left out and why, and that no source tells its target."""

import ast
import inspect
import statistics
from collections import Counter

import pytest

from lab.data import corpora, describe
from lab.data.code_pairs import CUTS, first_sentence, pairs
from lab.data.corpora import Document, Listing, listing
from lab.data.manifest import describe_skipped

BODY = "    total = sum(x for x in values if x)\n    return total / max(1, len(values))\n"
FILE = f'''
import os

@cache
def mean(values):
    """Mean of what is true. Zero for
    nothing at all."""
{BODY}

class Table:
    """Not a function."""

    def rows(self, *, limit: int = 3):
        r"""
        Rows of the table
        up to a limit (in π order).

        More is said here.
        """

        def inside(row):
            """A function inside a function is a part of it."""
            return row

        return [inside(row) for row in self.read(limit)]

    async def undocumented(self):
        return await self.rows(), "nothing is said of this function at all"

if os.name:
    def conditional(values):
        """Defined under a condition."""
{BODY.replace("    ", "        ")}
'''


def cut(text: str, name: str, left_out: Counter | None = None):
    return [(where, pair) for _, where, pair in pairs([("file.py", text)], CUTS[name], left_out)]


def test_code_and_what_its_docstring_says():
    found = dict(cut(FILE, "python_docstrings"))
    assert list(found) == ["mean", "Table.rows", "conditional"]
    assert found["mean"] == ("@cache\ndef mean(values):\n" + BODY.rstrip(), "Mean of what is true.")
    source, target = found["Table.rows"]
    assert target == "Rows of the table up to a limit (in π order)."
    assert source.startswith("def rows(self, *, limit: int = 3):\n\n    def inside(row):\n")
    assert found["conditional"][0] == "def conditional(values):\n" + BODY.rstrip()


def test_signature_and_docstring_and_then_the_body():
    found = dict(cut(FILE, "python_bodies"))
    assert found["mean"] == (
        '@cache\ndef mean(values):\n    """Mean of what is true. Zero for\n    nothing at all."""',
        BODY.rstrip(),
    )
    source, target = found["Table.rows"]
    assert source.endswith('    More is said here.\n    """') and target.endswith("self.read(limit)]")


def function(docstring: str, body: str = BODY, name: str = "f") -> str:
    return f"def {name}(values):\n    {docstring}\n{body}\n"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (function('"""It does nothing."""', ""), "no body"),
        (function('"""It does nothing."""', "    return None\n"), "trivial body"),
        (function('"""Short."""'), "first sentence too short or too long"),
        (function('"""Long ' + "long " * 100 + '."""'), "first sentence too short or too long"),
        (function('"""It does much."""', "    x = 1234567890\n" * 300), "longer than 4,096 characters"),
        (function('"""Mean of values, no more."""', "    # Mean of\n" + BODY), ""),
        (function('"""Mean of all values."""', '    log("Mean of all values.")\n' + BODY), "source holds the target"),
        (function('"""The mean: \\n\\n x"""; x = 1'), "docstring shares its line"),
        ("def f(values): 'It does very much'; return values\n", "docstring shares its line"),
        (function('"""It does much."""') * 2, "source seen before"),
        ("def f(:\n", "file that does not parse"),
        ("def f(x):\n" + "    '''It is an empty string'''\n" + "    '''\0'''\n" + BODY, "file that does not parse"),
    ],
)
def test_what_is_left_out_is_counted(text, reason):
    left_out = Counter()
    found = cut(text, "python_docstrings", left_out)
    assert list(left_out) == ([reason] if reason else [])
    assert len(found) == (1 if reason in ("", "source seen before") else 0)


def test_a_sentence_that_is_broken_over_lines_is_seen_in_the_source():
    left_out = Counter()
    body = '    text = """Mean of all\n    values."""\n' + BODY
    assert cut(function('"""Mean of all values."""', body), "python_docstrings", left_out) == []
    assert left_out == {"source holds the target": 1}


def method(body: str) -> str:
    return f'class A:\n    def f(self):\n        """It does very much\n        over lines."""\n{body}'


LOST = "string over several lines that would lose its margin"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ('        text = """first\n        second"""\n        return text + str(self)\n', LOST),
        ('        text = f"""{self}\n        second"""\n        return text + str(self)\n', LOST),
        ('        def g():\n            """Inside.\n\n            More."""\n        return g, self.everything\n', LOST),
        # Nothing is lost of strings whose lines have no margin, or that lie side by side.
        ('        text = """first\nsecond"""\n        return text + str(self.everything)\n', ""),
        ('        text = ("first"\n            "second")\n        return text + str(self.everything)\n', ""),
    ],
)
def test_no_string_loses_its_margin(body, reason):
    for name in CUTS:
        left_out = Counter()
        found = cut(method(body), name, left_out)
        assert list(left_out) == ([reason] if reason else []) and len(found) == (not reason)


def test_a_function_without_a_margin_keeps_its_strings():
    body = '    text = """a\n    b"""\n    return text + str(values)'
    ((_, (_, target)),) = cut(function('"""It does very much."""', body), "python_bodies")
    assert target == body


def test_a_body_ends_with_the_function():
    """What shares its last line is a statement of its own: Python has no other there."""
    text = function('"""It does much."""', BODY.rstrip() + "; import os") + "import sys\n"
    ((_, (_, target)),) = cut(text, "python_bodies")
    (made,) = ast.parse(text).body[:1]
    assert isinstance(made, ast.FunctionDef) and isinstance(made.body[-1], ast.Import)
    assert target == BODY.rstrip() + "; import os"


@pytest.mark.parametrize(
    ("says", "first"),
    [
        ("One. Two.", "One."),
        ("Uses f.read and e.g. this one", "Uses f.read and e.g. this one"),
        ("Title without end\n\nMore.", "Title without end"),
        ("Broken\n   over lines. Then more.", "Broken over lines."),
        ("Is it? Yes.", "Is it?"),
        ("Version 3.11 only! `x` is", "Version 3.11 only!"),
    ],
)
def test_first_sentences(says, first):
    assert first_sentence(says) == first


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_line_ends_and_wide_characters_do_not_shift_the_cut(ends):
    text = ("# ∑ 🙂 \f\n" + function('"""Grüße an alle hier."""', BODY.replace("total", "größe"))).replace("\n", ends)
    ((_, (source, target)),) = cut(text, "python_docstrings")
    assert target == "Grüße an alle hier." and "Gr" not in source
    assert source == "def f(values):\n" + BODY.replace("total", "größe").rstrip()


def test_corpora_of_pairs(monkeypatch):
    """Deterministic, from the files of corpus `python`, and whole: both sides together are the function."""

    def read():
        yield Document(source="python", version="3.11", file="a.py", content=FILE)
        yield Document(source="python", version="3.11", file="bad.py", content=None)

    monkeypatch.setattr(corpora, "python", lambda: Listing(path=None, fingerprint="f", read=read))
    assert listing("python_docstrings").fingerprint != listing("python_bodies").fingerprint
    for name in CUTS:
        found = list(listing(name).read())
        assert [document.file for document in found] == ["a.py:mean", "a.py:Table.rows", "a.py:conditional"]
        assert found == list(listing(name).read())
        assert all(document.source == "python" and isinstance(document.content, tuple) for document in found)
    for document in listing("python_bodies").read():
        ast.parse("\n".join(document.content))
    for document in listing("python_docstrings").read():
        ast.parse(document.content[0])
    with pytest.raises(ValueError, match="takes none"):
        listing("python_bodies", "/somewhere")


def test_the_manifest_counts_what_was_left_out(monkeypatch, tmp_path, cache):
    def read():
        yield Document(source="python", version="3.11", file="a.py", content=FILE)
        for number, body in enumerate(("    return None\n", "    return 1\n", "")):
            text = function('"""It does nothing."""', body)
            yield Document(source="python", version="3.11", file=f"{number}.py", content=text)

    monkeypatch.setenv("BITTERLAB_CACHE", str(tmp_path / "own"))
    monkeypatch.setattr(corpora, "python", lambda: Listing(path=None, fingerprint="f", read=read))
    counts = {"not_text": 0, "empty": 0, "duplicate": 0, "trivial body": 2, "no body": 1}
    described = describe("python_docstrings", held_out=0.3)
    assert described.summary["skipped"] == counts
    assert [source["name"] for source in described.summary["sources"]] == ["python"]
    assert describe_skipped(described.summary) == "2 trivial body, 1 no body"


def test_the_standard_library_has_pairs():
    text = inspect.getsource(statistics)
    short, long = (dict(cut(text, name)) for name in ("python_docstrings", "python_bodies"))
    assert len(short) > 30 and set(short) == set(long)
    assert short["geometric_mean"][1] == "Convert data to floats and compute the geometric mean."
    assert all(target not in source for source, target in [*short.values(), *long.values()])
