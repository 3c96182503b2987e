"""Estimates of the diagonal of the loss' Hessian, by an extra pass over a part of the batch: Liu et al. 2023 (arXiv 2305.14342).

gauss_newton   algorithm 2: B times the square of the gradient of the mean loss on labels that the model itself draws, B being
               the scored positions. One forward and one backward pass.
hutchinson     algorithm 1: u times the Hessian's product with u, of a standard normal u. A backward pass through a training
               step: of a product with a matrix 8 products instead of 3, of one of two activations 9 (and 7 of
               a token table's second factor: lab.cost).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from lab.mesh import by_batch
from lab.objectives import Batch
from lab.transformer import Params

# (parameters, examples, key) -> the sum of the losses, on drawn labels where there is a key.
Total = Callable[[Params, Batch, Array | None], Array]


def gauss_newton(total: Total, params: Params, batch: Batch, scored: Any, key: Array, parts: int) -> Params:
    """batch: the examples that are read, `scored` positions of them; `parts`: so many at a time."""

    def gradient(part: Batch, key: Array) -> Params:
        return jax.grad(total)(params, part, key)

    summed = _summed(gradient, params, batch, key, parts)
    return jax.tree.map(lambda g: scored * jnp.square(g / scored), summed)


def hutchinson(total: Total, params: Params, batch: Batch, scored: Any, key: Array, parts: int) -> Params:
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    u = tree.unflatten([jax.random.normal(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)])

    def product(part: Batch, _: Array) -> Params:
        def along(params: Params) -> Array:
            gradient = jax.grad(total)(params, part, None)
            return sum(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.sum(a * b), gradient, u)), jnp.zeros(()))

        return jax.grad(along)(params)

    return jax.tree.map(lambda u, hu: u * hu / scored, u, _summed(product, params, batch, key, parts))


ESTIMATES: dict[str, Callable[..., Params]] = {"gauss_newton": gauss_newton, "hutchinson": hutchinson}


def _summed(of: Callable[[Batch, Array], Params], params: Params, batch: Batch, key: Array, parts: int) -> Params:
    """`of` each part, added up."""
    if parts == 1:
        return of(batch, key)
    cut = jax.tree.map(lambda a: by_batch(a.reshape(parts, a.shape[0] // parts, *a.shape[1:]), axis=1), batch)
    zero = jax.tree.map(jnp.zeros_like, params)

    def add(sums: Params, part: tuple[Batch, Array]) -> tuple[Params, None]:
        return jax.tree.map(jnp.add, sums, of(*part)), None

    return jax.lax.scan(add, zero, (cut, jax.random.split(key, parts)))[0]
