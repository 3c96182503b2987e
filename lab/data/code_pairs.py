"""Pairs with natural asymmetry, cut from Python source: functions and what their docstrings say.

    docstrings   the code of a function without its docstring -> the docstring's first sentence    long -> short
    bodies       signature and docstring -> the statements that follow                             short -> long

A pair is an outermost function or a method: functions inside functions are part of their outer one, so that no text is in
two pairs. `python tests/benchmarks/code_pairs.py` counts what is taken and what is left out, and how long both sides are.
"""

import ast
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

LONGEST = 4096  # characters of either side: the rest are tables and generated code
SENTENCE = (10, 400)  # characters that a docstring's first sentence may have
CODE = 40  # the least characters of code: `pass`, `return x` and `raise NotImplementedError` are no body
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z`\"'(:*])|\n\s*\n")

Pair = tuple[str, str]
Function = ast.FunctionDef | ast.AsyncFunctionDef
File = TypeVar("File")


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A documented function's source, dedented: its head up to the docstring, the docstring as it is written, and the
    statements after it; what the docstring says; and the name of the function in its file."""

    name: str
    head: str
    docstring: str
    body: str
    says: str


def docstring_of(cut: Cut) -> Pair | str:
    """(code without the docstring, first sentence), or the reason why there is none."""
    sentence = first_sentence(cut.says)
    if not SENTENCE[0] <= len(sentence) <= SENTENCE[1]:
        return "first sentence too short or too long"
    return _checked(cut.head + cut.body, sentence, cut.body)


def body_of(cut: Cut) -> Pair | str:
    """(signature and docstring, body), or the reason why there is none."""
    return _checked(cut.head + cut.docstring, cut.body, cut.body)


CUTS: dict[str, Callable[[Cut], Pair | str]] = {"python_docstrings": docstring_of, "python_bodies": body_of}


def pairs(
    files: Iterable[tuple[File, str]], cut: Callable[[Cut], Pair | str], left_out: Counter[str] | None = None
) -> Iterator[tuple[File, str, Pair]]:
    """(file, function's name, pair) in the order of the files (anything that stands for one, and its source) and of the
    functions in them.

    `left_out` counts, by reason, the files and documented functions of which no pair is made. A source that came before
    is left out too: one text with two answers.
    """
    counted, seen = Counter[str]() if left_out is None else left_out, set()
    for file, text in files:
        try:
            # Old source warns of its escapes; that is not this program's concern.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(text)
        except (SyntaxError, ValueError, RecursionError):
            counted["file that does not parse"] += 1
            continue
        for found in functions(tree, text):
            if isinstance(found, str):
                counted[found] += 1
                continue
            pair = cut(found)
            if isinstance(pair, str):
                counted[pair] += 1
            elif pair[0] in seen:
                counted["source seen before"] += 1
            else:
                seen.add(pair[0])
                yield file, found.name, pair


def functions(tree: ast.Module, text: str) -> Iterator[Cut | str]:
    """Every documented function that is not inside another, in the order of the source; a reason where it can not be
    cut."""
    lines = text.encode().splitlines(keepends=True)
    for name, node in _outermost(tree, ""):
        first = node.body[0]
        says = ast.get_docstring(node)
        if says is None or not isinstance(first, ast.Expr):
            continue
        yield "no body" if len(node.body) == 1 else _cut(lines, name, node, first, says)


def first_sentence(says: str) -> str:
    """Up to the first sentence's end or blank line, on one line."""
    return " ".join(_SENTENCE_END.split(says.strip(), maxsplit=1)[0].split())


def _outermost(node: ast.AST, prefix: str) -> Iterator[tuple[str, Function]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function):
            yield prefix + child.name, child
        elif isinstance(child, ast.ClassDef):
            yield from _outermost(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.stmt | ast.excepthandler):
            yield from _outermost(child, prefix)


def _cut(lines: list[bytes], name: str, node: Function, first: ast.Expr, says: str) -> Cut | str:
    begin = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
    start, end = first.lineno - 1, first.end_lineno or first.lineno
    after = node.body[1].lineno - 1
    # The docstring must have its lines for itself.
    alone = not lines[start][: first.col_offset].strip() and not lines[end - 1][first.end_col_offset :].strip()
    if not alone or after < end or start <= begin:
        return "docstring shares its line"
    parts = (lines[begin:start], lines[start:end], lines[end : node.end_lineno])
    margin = lines[begin][: len(lines[begin]) - len(lines[begin].lstrip())]
    head, docstring, body = (b"".join(line.removeprefix(margin) for line in part).decode() for part in parts)
    if margin and _broken_strings(node) and not _means(node, head + docstring + body):
        return "string over several lines that would lose its margin"
    return Cut(name=name, head=head, docstring=docstring, body=body, says=says)


def _broken_strings(node: Function) -> bool:
    """Whether a string other than the docstring goes over lines."""
    parts = (part for other in _besides_docstring(node) for part in ast.walk(other))
    strings = (part for part in parts if isinstance(part, ast.Constant | ast.JoinedStr))
    return any(part.end_lineno != part.lineno for part in strings)


def _means(node: Function, source: str) -> bool:
    """Whether the source, once dedented, is still the function: the docstring aside, which is dedented wherever it is read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            (again,) = ast.parse(source).body
    except (SyntaxError, ValueError):
        return False
    if not isinstance(again, Function):
        return False
    return [ast.dump(a) for a in _besides_docstring(again)] == [ast.dump(a) for a in _besides_docstring(node)]


def _besides_docstring(node: Function) -> list[ast.AST]:
    return [*node.decorator_list, node.args, *node.body[1:]]


def _checked(source: str, target: str, body: str) -> Pair | str:
    source, target = (text.replace("\r\n", "\n").strip("\n").rstrip() for text in (source, target))
    if len(body.strip()) < CODE:
        return "trivial body"
    if len(source) > LONGEST or len(target) > LONGEST:
        return f"longer than {LONGEST:,} characters"
    # Also where the source breaks it over lines.
    if target in source or target in " ".join(source.split()):
        return "source holds the target"
    return source, target
