"""Checks of what users write: each error names the field, the value and the way out."""

import difflib
import math
from typing import get_args


def require(ok: bool, name: str, value: object, remedy: str) -> None:
    if not ok:
        raise ValueError(f"{name} = {value!r}: {remedy}")


def check_choice(name: str, value: object, allowed: object) -> None:
    choices = get_args(allowed)
    require(value in choices, name, value, f"use one of {', '.join(map(str, choices))}")


def check_integer(name: str, value: object, minimum: int) -> None:
    ok = isinstance(value, int) and not isinstance(value, bool) and value >= minimum
    require(ok, name, value, f"use a whole number of at least {minimum}")


def check_number(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> None:
    ok = False
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        ok = (low < value if open_low else low <= value) and value <= high
    require(ok, name, value, f"use a number in {'(' if open_low else '['}{low:g}, {high:g}]")


def nearest(name: str, known: list[str]) -> str:
    """'did you mean ...?' for a name close to a known one, else the known ones."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(known)}"
