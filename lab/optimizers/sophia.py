from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from lab.optimizers.descent import Hyperparameters, Rate, descend
from lab.optimizers.scales import Scales


class SophiaState(NamedTuple):
    """taken: steps. mu: the gradient's moment. nu: that of the Hessian's diagonal."""

    taken: Array
    mu: Any
    nu: Any


def sophia(hyper: Hyperparameters, rate: Rate, scales: Scales | None = None) -> optax.GradientTransformation:
    """Liu et al. 2023 (arXiv 2305.14342), algorithm 3: each entry of the momentum over `gamma` times that of the Hessian's
    diagonal, and no longer than 1. `update` takes curvature(key), which estimates that diagonal (lab.curvature) and is called
    every `interval` steps from the first on."""
    assert scales is None
    beta1, beta2 = hyper["beta1"], hyper["beta2"]

    def init(params: Any) -> SophiaState:
        return SophiaState(jnp.zeros((), jnp.int32), *(jax.tree.map(jnp.zeros_like, params) for _ in range(2)))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        def refreshed() -> Any:
            key = jax.random.fold_in(jax.random.key(jnp.int32(hyper["seed"])), state.taken)
            return jax.tree.map(lambda h, new: beta2 * h + (1 - beta2) * new, state.nu, extra["curvature"](key))

        due = state.taken % jnp.int32(jnp.maximum(hyper["interval"], 1)) == 0
        nu = jax.lax.cond(due, refreshed, lambda: state.nu)
        mu = jax.tree.map(lambda m, g: beta1 * m + (1 - beta1) * g, state.mu, updates)

        def direction(m: Array, h: Array) -> Array:
            return jnp.clip(m / jnp.maximum(hyper["gamma"] * h, hyper["eps"]), -1.0, 1.0)

        return jax.tree.map(direction, mu, nu), SophiaState(state.taken + 1, mu, nu)

    return descend(hyper, rate, optax.GradientTransformationExtraArgs(init, update))
