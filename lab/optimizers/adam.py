"""Adam and what is made of it."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from lab.optimizers.descent import Hyperparameters, Rate, descend
from lab.optimizers.matrices import of_each
from lab.optimizers.scales import Scales


def adam(hyper: Hyperparameters, *, nesterov: bool = False) -> optax.GradientTransformation:
    return optax.scale_by_adam(
        b1=hyper["beta1"], b2=hyper["beta2"], eps=hyper["eps"], eps_root=0.0, mu_dtype=None, nesterov=nesterov
    )


def adamw(hyper: Hyperparameters, rate: Rate, scales: Scales | None = None) -> optax.GradientTransformation:
    """Loshchilov and Hutter 2019, after clipping the global gradient norm; decay is scaled by the learning rate."""
    return descend(hyper, rate, adam(hyper), scales)


def nadamw(hyper: Hyperparameters, rate: Rate, scales: Scales | None = None) -> optax.GradientTransformation:
    """Dozat 2016: Adam whose first moment looks one step ahead."""
    return descend(hyper, rate, adam(hyper, nesterov=True), scales)


def cautious_adamw(hyper: Hyperparameters, rate: Rate, scales: Scales | None = None) -> optax.GradientTransformation:
    """Liang et al. 2024 (arXiv 2411.16085), algorithm 2: entries whose sign is not the gradient's are left out, and the others of
    the same matrix or vector made larger by their share."""

    def cautious(updates: Any, direction: Any) -> Any:
        def one(path: tuple[Any, ...], g: Array, u: Array) -> Array:
            agrees = (u * g > 0).astype(u.dtype)
            return u * agrees / jnp.maximum(of_each(jnp.mean, agrees, path), hyper["least_share"])

        return jax.tree_util.tree_map_with_path(one, updates, direction)

    inner = adam(hyper)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        direction, state = inner.update(updates, state, params)
        return cautious(updates, direction), state

    return descend(hyper, rate, optax.GradientTransformation(inner.init, update), scales)


def adamw_scale(hyper: Hyperparameters, rate: Rate, scales: Scales | None = None) -> optax.GradientTransformation:
    """AdamW whose steps are relative to the parameters, as Adafactor's: each matrix or vector moves by the rate times the root
    mean square of its own entries, but no less than `least_rms` (nanoT5's AdamWScale). Decay is not scaled so."""
    assert scales is None
    return descend(hyper, rate, optax.chain(adam(hyper), by_own_size(hyper)))


def by_own_size(hyper: Hyperparameters) -> optax.GradientTransformation:
    def one(path: tuple[Any, ...], u: Array, p: Array) -> Array:
        return u * jnp.maximum(jnp.sqrt(of_each(jnp.mean, jnp.square(p), path)), hyper["least_rms"])

    return optax.stateless(lambda direction, params: jax.tree_util.tree_map_with_path(one, direction, params))


def ademamix(hyper: Hyperparameters, rate: Rate, scales: Scales | None = None) -> optax.GradientTransformation:
    """Pagliardini et al. 2024 (arXiv 2409.03137), algorithm 1: Adam with a second, much slower first moment, alpha times. Over
    the first `slow_warmup` of the run's steps alpha rises from 0 and beta3 from beta1, so that its half-life rises evenly
    (appendix A.1)."""
    beta1, beta3, alpha = hyper["beta1"], hyper["beta3"], hyper["alpha"]

    def share(count: Any) -> Array:
        return jnp.minimum((count + 1) / (hyper["slow_warmup"] * hyper["steps"]), 1.0)

    def slow_beta(count: Any) -> Any:
        low, high, at = jnp.log(jnp.maximum(beta1, 1e-8)), jnp.log(beta3), share(count)
        return jnp.minimum(jnp.exp(low * high / ((1 - at) * high + at * low)), beta3)

    direction = optax.contrib.scale_by_ademamix(
        b1=beta1, b2=hyper["beta2"], b3=slow_beta, alpha=lambda count: alpha * share(count),
        eps=hyper["eps"], eps_root=0.0, mu_dtype=None,
    )  # fmt: skip
    return descend(hyper, rate, direction, scales)
