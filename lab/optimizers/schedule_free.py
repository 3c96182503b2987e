from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from lab.optimizers.descent import Hyperparameters, Rate, clipped, decay_mask
from lab.optimizers.scales import Scales


class ScheduleFreeState(NamedTuple):
    """taken: steps. weight: of the average so far. highest: learning rate. nu: the second moment. z: where plain steps are
    taken. The parameters are y, where gradients are taken: beta1 of the way from z to the average x."""

    taken: Array
    weight: Array
    highest: Array
    nu: Any
    z: Any


def schedule_free_adamw(
    hyper: Hyperparameters, rate: Rate, scales: Scales | None = None
) -> optax.GradientTransformation:
    """Defazio et al. 2024 (arXiv 2405.15682), algorithm 1: AdamW without a first moment moves z, and x is the mean of all z, each
    weighted by the highest rate so far to `weight_power`. Decay is at y. As much state as AdamW has: x is found from y and z."""
    assert scales is None
    beta1, beta2 = hyper["beta1"], hyper["beta2"]

    def init(params: Any) -> ScheduleFreeState:
        zero = jnp.zeros((), jnp.float32)
        return ScheduleFreeState(jnp.zeros((), jnp.int32), zero, zero, jax.tree.map(jnp.zeros_like, params),
                                 jax.tree.map(jnp.array, params))  # fmt: skip

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        count = state.taken + 1
        highest = jnp.maximum(state.highest, rate)
        weight = highest ** hyper["weight_power"]
        total = state.weight + weight
        share = jnp.where(total > 0, weight / jnp.where(total > 0, total, 1.0), 0.0)
        nu = jax.tree.map(lambda v, g: beta2 * v + (1 - beta2) * jnp.square(g), state.nu, updates)
        correction = 1 - beta2 ** count.astype(jnp.float32)

        def direction(g: Array, v: Array, y: Array, decayed: bool) -> Array:
            return g / (jnp.sqrt(v / correction) + hyper["eps"]) + (hyper["weight_decay"] * y if decayed else 0.0)

        u = jax.tree.map(direction, updates, nu, params, decay_mask(params))
        move = jax.tree.map(lambda u, y, z: share * (z - y) - rate * (1 - beta1 * (1 - share)) * u, u, params, state.z)
        z = jax.tree.map(lambda u, z: z - rate * u, u, state.z)
        return move, ScheduleFreeState(count, total, highest, nu, z)

    return optax.chain(clipped(hyper), optax.GradientTransformation(init, update))


def averaged(hyper: Hyperparameters, params: Any, state: Any) -> Any:
    """x, of the parameters y and a state of schedule_free_adamw."""
    return jax.tree.map(lambda y, z: z + (y - z) / hyper["beta1"], params, state[1].z)
