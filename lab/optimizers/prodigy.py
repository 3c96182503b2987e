from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from lab.optimizers.descent import Hyperparameters, Rate, clipped, decay_mask
from lab.optimizers.scales import Scales


class ProdigyState(NamedTuple):
    """taken: steps. ratio: the estimated distance to the solution, over d0. numerator: of that estimate. mu, nu: Adam's
    moments of d times the gradient. sums: of weighted gradients. start: the first parameters."""

    taken: Array
    ratio: Array
    numerator: Array
    mu: Any
    nu: Any
    sums: Any
    start: Any


def prodigy(hyper: Hyperparameters, rate: Rate, scales: Scales | None = None) -> optax.GradientTransformation:
    """Mishchenko and Defazio 2023 (arXiv 2306.06101), algorithm 4, with Adam's bias correction (the released code's
    `use_bias_correction`): the learning rate is times a distance d that is estimated as it goes, so that 1 is where to begin."""
    assert scales is None
    beta1, beta2, beta3, d0 = (hyper[name] for name in ("beta1", "beta2", "beta3", "d0"))

    def init(params: Any) -> ProdigyState:
        mu, nu, sums = (jax.tree.map(jnp.zeros_like, params) for _ in range(3))
        one = jnp.ones((), jnp.float32)
        return ProdigyState(jnp.zeros((), jnp.int32), one, 0 * one, mu, nu, sums, jax.tree.map(jnp.array, params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        count = state.taken + 1
        t = count.astype(jnp.float32)
        d = d0 * state.ratio
        step = d * rate * jnp.sqrt(1 - beta2**t) / (1 - beta1**t)
        along = jax.tree.map(lambda g, p0, p: jnp.sum(g * (p0 - p)), updates, state.start, params)
        numerator = beta3 * state.numerator + state.ratio * step * sum(jax.tree.leaves(along))
        sums = jax.tree.map(lambda s, g: beta3 * s + state.ratio * step * g, state.sums, updates)
        denominator = sum(jax.tree.leaves(jax.tree.map(lambda s: jnp.sum(jnp.abs(s)), sums)))
        estimate = jnp.where(denominator > 0, numerator / jnp.where(denominator > 0, denominator, 1.0), 0.0)
        ratio = jnp.maximum(state.ratio, hyper["d_coefficient"] * estimate / d0)
        mu = jax.tree.map(lambda m, g: beta1 * m + (1 - beta1) * d * g, state.mu, updates)
        nu = jax.tree.map(lambda v, g: beta2 * v + (1 - beta2) * jnp.square(d * g), state.nu, updates)

        def move(m: Array, v: Array, p: Array, decayed: bool) -> Array:
            decay = hyper["weight_decay"] * p if decayed else 0.0
            return -step * (m / (jnp.sqrt(v) + d0 * ratio * hyper["eps"]) + decay)

        moves = jax.tree.map(move, mu, nu, params, decay_mask(params))
        return moves, ProdigyState(count, ratio, numerator, mu, nu, sums, state.start)

    return optax.chain(clipped(hyper), optax.GradientTransformation(init, update))
