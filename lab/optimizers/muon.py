from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from lab.optimizers.descent import Hyperparameters, Rate, clipped, decayed_step
from lab.optimizers.matrices import axes, labels
from lab.optimizers.scales import Scales

# Jordan et al. 2024: an odd polynomial that sends every singular value from (0, 1] near 1, the steepest at 0.
QUINTIC = (3.4445, -4.7750, 2.0315)


def muon(hyper: Hyperparameters, rate: Rate, scales: Scales | None = None) -> optax.GradientTransformation:
    """Jordan et al. 2024, scaled and decayed as Liu et al. 2025 (arXiv 2502.16982) do.

    Nesterov momentum of each layer's matrices is made nearly orthogonal, then multiplied by `rms` sqrt(max(rows, columns)),
    so that its entries' root mean square is about `rms`. Token tables, heads and norms are AdamW's, at `adam_rate` times the
    rate. beta1 is the momentum; eps keeps its norm from 0.
    """
    assert scales is None
    others = optax.scale_by_adam(
        b1=hyper["adam_beta1"], b2=hyper["adam_beta2"], eps=hyper["adam_eps"], eps_root=0.0, mu_dtype=None, nesterov=False
    )  # fmt: skip
    return optax.chain(
        clipped(hyper),
        optax.partition(
            {
                "matrix": optax.chain(_orthogonal_momentum(hyper), *decayed_step(hyper, rate)),
                "other": optax.chain(others, *decayed_step(hyper, rate * hyper["adam_rate"])),
            },
            labels,
            mask_compatible_extra_args=False,
        ),
    )


def _orthogonal_momentum(hyper: Hyperparameters) -> optax.GradientTransformation:
    """State: the momentum."""

    def one(path: tuple[Any, ...], g: Array, m: Array) -> Array:
        ahead = axes(path).view(hyper["beta1"] * m + (1 - hyper["beta1"]) * g)
        size = hyper["rms"] * max(ahead.shape[1:]) ** 0.5
        return (size * orthogonalized(ahead, hyper["iterations"], hyper["eps"])).reshape(g.shape)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        state = jax.tree.map(lambda g, m: hyper["beta1"] * m + (1 - hyper["beta1"]) * g, updates, state)
        return jax.tree_util.tree_map_with_path(one, updates, state), state

    return optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), update)


def orthogonalized(x_Mrc: Array, iterations: Array | int, eps: Array | float) -> Array:
    """Of each of M matrices, about the nearest with orthogonal rows or columns: singular values come to lie within 0.7 to 1.2."""
    a, b, c = QUINTIC
    wide = x_Mrc if x_Mrc.shape[1] <= x_Mrc.shape[2] else x_Mrc.swapaxes(1, 2)
    norm_M11 = jnp.sqrt(jnp.sum(jnp.square(wide), axis=(1, 2), keepdims=True))

    def turn(_: Any, x: Array) -> Array:
        gram = x @ x.swapaxes(1, 2)
        return a * x + (b * gram + c * gram @ gram) @ x

    wide = jax.lax.fori_loop(0, jnp.int32(iterations), turn, wide / (norm_M11 + eps))
    return wide if x_Mrc.shape[1] <= x_Mrc.shape[2] else wide.swapaxes(1, 2)
