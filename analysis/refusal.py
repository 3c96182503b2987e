"""What can not be said, and why. A refusal is an answer: a report prints it where the number would have been."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


class Refusal(ValueError):
    """Raised where the data do not carry the number that was asked for."""


@dataclass(frozen=True, kw_only=True)
class Refused:
    """Stands in a result's place; `reason` is a sentence without a full stop, with the way out."""

    reason: str


def attempt(make: Callable[[], T]) -> T | Refused:
    """`make()`, or the reason why it refused. Any other error is a fault and passes through."""
    try:
        return make()
    except Refusal as refusal:
        return Refused(reason=str(refusal))
