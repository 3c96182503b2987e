"""Random choices whose bytes never change: PCG64's uniform floats (which numpy keeps for ever), whole numbers, comparisons.

No logarithm, power or sum of floats enters what is drawn: mathematics libraries round them differently. Powers are taken
in decimal arithmetic of 40 digits and rounded to whole weights; the weights ARE the distribution, and probabilities
follow from them.
"""

import decimal
import functools

import numpy as np
from jaxtyping import Float, Int

SCALE = 2**40  # the weight of the commonest: weights are whole, and their sums stay far below 2^53


def generator(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(list(key)))


def below(rng: np.random.Generator, limit: int | np.ndarray, shape: int | tuple[int, ...]) -> np.ndarray:
    """int64, uniform in 0 .. limit - 1; `limit` broadcasts to `shape`."""
    return (rng.random(shape) * limit).astype(np.int64)


def choose(rng: np.random.Generator, weights_k: Int[np.ndarray, "k"], shape: int | tuple[int, ...]) -> np.ndarray:
    """int64 places, each with probability weight / sum of weights."""
    cumulative_k = np.cumsum(weights_k)
    return np.searchsorted(cumulative_k, below(rng, cumulative_k[-1], shape), side="right")


def choose_in_rows(
    rng: np.random.Generator, cumulative_rk: Int[np.ndarray, "r k"], rows_m: Int[np.ndarray, "m"]
) -> Int[np.ndarray, "m"]:
    """One place for each entry of `rows_m`, by the weights (summed up) of that row."""
    drawn_m = below(rng, cumulative_rk[rows_m, -1], len(rows_m))
    return (cumulative_rk[rows_m] <= drawn_m[:, None]).sum(axis=1)


def orders(rng: np.random.Generator, rows: int, k: int) -> Int[np.ndarray, "rows k"]:
    """In each row the numbers 0 .. k - 1 in a random order."""
    return np.argsort(rng.random((rows, k)), axis=1, kind="stable")


def skewed(seed: int, rows: int, k: int, *, squarings: int = 4) -> Int[np.ndarray, "rows k"]:
    """Whole weights of which a few in every row are large: 2^20 u^16 + 1 for uniform u, and u^(2^squarings)."""
    weights = np.random.Generator(np.random.PCG64(seed)).random((rows, k))
    for _ in range(squarings):
        weights = weights * weights
    return (weights * 2**20).astype(np.int64) + 1


@functools.lru_cache(maxsize=32)
def zipf_weights(count: int, exponent: float) -> Int[np.ndarray, "count"]:
    """floor(2^40 i^-(1 + exponent)), i = 1 .. count: at least 1, as count^(1 + exponent) may not pass 2^40."""
    # One power for each prime, products for the others. The millionth keeps whole values whole.
    powers = [decimal.Decimal(1)] * (count + 1)
    with decimal.localcontext(decimal.Context(prec=50)):
        rise = -(1 + decimal.Decimal(exponent))
        for i, factor in enumerate(_least_factors(count)):
            if i >= 2:
                powers[i] = decimal.Decimal(i) ** rise if factor == i else powers[factor] * powers[i // factor]
        return np.array([int(SCALE * power + decimal.Decimal("1e-6")) for power in powers[1:]], np.int64)


def _least_factors(count: int) -> list[int]:
    """The least prime factor of 0 .. count (itself for primes, and for 0 and 1)."""
    factors = np.arange(count + 1)
    for i in range(2, int(count**0.5) + 1):
        if factors[i] == i:
            multiples = factors[i * i :: i]
            multiples[multiples == np.arange(i * i, count + 1, i)] = i
    return factors.tolist()


def shares(weights_rk: Int[np.ndarray, "... k"]) -> Float[np.ndarray, "... k"]:
    """Probabilities of whole weights, along the last axis."""
    return weights_rk / weights_rk.sum(axis=-1, keepdims=True)


def entropy(p: Float[np.ndarray, "..."]) -> float:
    """-sum p ln p over all entries, in nats."""
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())
