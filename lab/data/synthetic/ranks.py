"""Numbers whose frequency is a power of their rank, written as digits.

Number i - 1 (0 is the commonest) has p_i ~ i^-(1 + exponent), i = 1 .. count, and is written in base 64, the highest
digit first, so that a few thousand of them fit a vocabulary of bytes.
"""

import functools
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from lab.data.synthetic import draws
from lab.data.synthetic.task import FIRST, check_number

BASE = 64


def check_zipf(task: str, setting: str, count: int, exponent: float) -> None:
    """Raises ValueError where weights of at least 1 are not possible (draws.zipf_weights)."""
    check_number(task, setting, count, 2, 65_536)
    most = np.log(draws.SCALE) / np.log(count) - 1
    check_number(task, "exponent", exponent, 0.05, float(np.floor(100 * min(most, 3.0)) / 100))


@dataclass(frozen=True, kw_only=True)
class Zipf:
    count: int
    exponent: float

    @property
    def weights(self) -> Int[np.ndarray, "count"]:
        return draws.zipf_weights(self.count, self.exponent)

    @functools.cached_property
    def p(self) -> Float[np.ndarray, "count"]:
        return draws.shares(self.weights)

    @functools.cached_property
    def digits(self) -> int:
        return next(width for width in range(1, 9) if BASE**width >= self.count)

    def write(self, numbers_m: Int[np.ndarray, "m"]) -> Int[np.ndarray, "m digits"]:
        """Tokens."""
        return FIRST + numbers_m[:, None] // BASE ** np.arange(self.digits)[::-1] % BASE

    def read(self, tokens_Bd: Int[np.ndarray, "B digits"]) -> Int[np.ndarray, "B"]:
        """Numbers; -1 where the tokens are none below `count`."""
        digits_Bd = np.asarray(tokens_Bd, np.int64) - FIRST
        numbers_B = digits_Bd @ BASE ** np.arange(self.digits)[::-1]
        fits_B = ((digits_Bd >= 0) & (digits_Bd < BASE)).all(axis=1) & (numbers_B < self.count)
        return np.where(fits_B, numbers_B, -1)

    def nats(self, tokens_Bd: Int[np.ndarray, "B digits"]) -> Float[np.ndarray, "B digits"]:
        """-ln p of each digit given those before it."""
        digits_Bd = np.asarray(tokens_Bd, np.int64) - FIRST
        inside_Bd = np.logical_and.accumulate((digits_Bd >= 0) & (digits_Bd < BASE), axis=1)
        prefix_B, before_B, nats = np.zeros(len(digits_Bd), np.int64), np.ones(len(digits_Bd)), []
        for place, p_of_prefix in enumerate(self._prefixes):
            prefix_B = prefix_B * BASE + np.where(inside_Bd[:, place], digits_Bd[:, place], 0)
            after_B = np.where(prefix_B < len(p_of_prefix), p_of_prefix[np.minimum(prefix_B, len(p_of_prefix) - 1)], 0)
            with np.errstate(divide="ignore", invalid="ignore"):
                nats.append(np.where(after_B > 0, np.log(before_B) - np.log(after_B), np.inf))
            before_B = after_B
        return np.where(inside_Bd, np.stack(nats, axis=1), np.inf)

    def entropies(self) -> Float[np.ndarray, "digits"]:
        return np.diff([0.0] + [draws.entropy(p) for p in self._prefixes])

    @functools.cached_property
    def _prefixes(self) -> list[Float[np.ndarray, "prefixes"]]:
        """Probability of every number's first 1 .. digits digits."""
        padded = np.zeros(BASE**self.digits)
        padded[: self.count] = self.p
        return [padded.reshape(BASE**width, -1).sum(axis=1) for width in range(1, self.digits + 1)]

    # --- what a learner that stores numbers one by one has left ---

    def tail(self, stored: int | np.ndarray) -> Float[np.ndarray, "..."]:
        """Share of draws that are none of the `stored` commonest: about (stored + 1/2)^-exponent times a constant."""
        beyond = np.append(np.cumsum(self.p[::-1])[::-1], 0.0)
        return beyond[np.minimum(stored, self.count)]

    def unseen(self, seen: int | np.ndarray) -> Float[np.ndarray, "..."]:
        """Expected share of draws that `seen` independent draws before them had not: about seen^-(exponent / (1 +
        exponent)) times a constant."""
        seen = np.asarray(seen, float)
        return (self.p * np.exp(seen[..., None] * np.log1p(-self.p))).sum(axis=-1)
