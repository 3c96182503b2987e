"""Frozen dataclasses <-> complete JSON: every field is there, and what is unknown, missing or ill-typed is an error that names
its key and the way out.

Fields are numbers, strings, booleans, Literals, `Numbers`, dataclasses, tuples, mappings from strings, and unions of these
with None; a union of several plain types takes each as it is.
"""

import dataclasses
import types
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lab.checks import check_choice, nearest, require
from lab.hyperparameters import Numbers


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


@cache
def _fields(kind: type) -> tuple[tuple[str, bool], ...]:
    """Name of each field, and whether it is declared a float."""
    hints = _hints(kind)
    return tuple((f.name, float in (hints[f.name], *get_args(hints[f.name]))) for f in dataclasses.fields(kind))


def encode(value: Any) -> dict[str, Any]:
    """Numbers are written in their declared type, so that 1 and 1.0 are one text."""
    encoded = {}
    for name, is_float in _fields(type(value)):
        content = getattr(value, name)
        if is_float:
            content = None if content is None else float(content)
        elif isinstance(content, Numbers):
            content = dict(content)
        elif dataclasses.is_dataclass(content):
            content = encode(content)
        encoded[name] = content
    return encoded


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reader:
    """what: the whole, in an error. complete: where a complete one is to be had, as an error about a missing key ends."""

    what: str
    complete: str

    def read(self, kind: Any, content: object, where: str = "") -> Any:
        """The dataclass `kind` that the content is of; raises ValueError. where: the content's key in the whole."""
        names = [item.name for item in dataclasses.fields(kind)]
        if not isinstance(content, dict):
            raise ValueError(f"{where or self.what} = {content!r}: use an object with {', '.join(names)}")
        prefix, hints = f"{where}." if where else "", _hints(kind)
        for name in content:
            if name not in names:
                raise ValueError(f"unknown key {prefix}{name}: {nearest(str(name), names)}")
        for name in names:
            if name not in content:
                self._miss(prefix + name)
        values = {name: self._value(hints[name], content[name], prefix + name) for name in names}
        made = kind(**values)
        for name in names:  # what was filled in was missing
            given, has = values[name], getattr(made, name)
            lacks = [f"{name}.{key}" for key in has if key not in given] if isinstance(has, Numbers) else []
            if lacks or (given is None and has is not None):
                self._miss(prefix + (lacks or [name])[0])
        return made

    def _miss(self, key: str) -> None:
        raise ValueError(f"missing key {key}: {self.complete}")

    def _value(self, hint: Any, value: Any, where: str) -> Any:
        origin, args = get_origin(hint), get_args(hint)
        if dataclasses.is_dataclass(hint):
            return self.read(hint, value, where)
        if hint is Numbers:
            require(isinstance(value, dict), where, value, "use an object of numbers")
            return Numbers(value)
        if origin is Literal:
            check_choice(where, value, hint)
            return value
        if origin is tuple:
            require(isinstance(value, list | tuple), where, value, "use a list")
            kinds = (args[0],) * len(value) if args[-1] is Ellipsis else args
            require(len(value) == len(kinds), where, value, f"use a list of {len(kinds)}")
            items = enumerate(zip(kinds, value, strict=True))
            return tuple(self._value(kind, item, f"{where}[{i}]") for i, (kind, item) in items)
        if isinstance(origin, type) and issubclass(origin, Mapping):
            require(isinstance(value, dict), where, value, "use an object")
            return {name: self._value(args[1], item, f"{where}.{name}") for name, item in value.items()}
        kinds = args if origin in (Union, types.UnionType) else (hint,)
        parts = [kind for kind in kinds if kind is not type(None)]
        deeper = get_origin(parts[0]) or parts[0] is Numbers or dataclasses.is_dataclass(parts[0])
        if len(parts) == 1 and deeper and value is not None:  # or None
            return self._value(parts[0], value, where)
        if type(value) is int and float in kinds and int not in kinds:
            value = float(value)
        expected = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
        require(type(value) in kinds, where, value, f"use {expected}")
        return value
