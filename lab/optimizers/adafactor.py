from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from lab.optimizers.adam import by_own_size
from lab.optimizers.descent import Hyperparameters, Rate, descend
from lab.optimizers.matrices import axes
from lab.optimizers.scales import Scales


class FactoredState(NamedTuple):
    """Of a matrix the means over its columns and its rows, of all else every square."""

    taken: Array
    squares: Any


def adafactor(hyper: Hyperparameters, rate: Rate, scales: Scales | None = None) -> optax.GradientTransformation:
    """Shazeer and Stern 2018 (arXiv 1804.04235), algorithms 4 and 5 without momentum.

    Second moments of a matrix are kept by row and column, beta2 at step t is 1 - t^-decay_exponent, no matrix' update is
    longer than `clip_update` (root mean square), and steps are relative to the parameter's size. Each layer's matrices are
    factored by themselves, attention's over D and N H, token tables too, and however small.
    """
    assert scales is None
    return descend(hyper, rate, optax.chain(_factored(hyper), by_own_size(hyper)))


def _factored(hyper: Hyperparameters) -> optax.GradientTransformation:
    def start(path: tuple[Any, ...], p: Array) -> dict[str, Array]:
        at = axes(path)
        if not at.rows:
            return {"all": jnp.zeros_like(p)}
        many, rows, columns = at.view(p).shape
        return {"by_row": jnp.zeros((many, rows), p.dtype), "by_column": jnp.zeros((many, columns), p.dtype)}

    def init(params: Any) -> FactoredState:
        return FactoredState(jnp.zeros((), jnp.int32), jax.tree_util.tree_map_with_path(start, params))

    def one(path: tuple[Any, ...], g: Array, squares: dict[str, Array], beta: Array) -> tuple[Array, dict[str, Array]]:
        at = axes(path)
        if not at.rows:
            squares = {"all": beta * squares["all"] + (1 - beta) * (jnp.square(g) + hyper["eps"])}
            u = g * jax.lax.rsqrt(squares["all"])
            vectors = tuple(range(at.many, g.ndim))
            return u / jnp.maximum(1.0, _rms(u, vectors) / hyper["clip_update"]), squares
        view = at.view(g)
        square = jnp.square(view) + hyper["eps"]
        row = beta * squares["by_row"] + (1 - beta) * jnp.mean(square, axis=2)
        column = beta * squares["by_column"] + (1 - beta) * jnp.mean(square, axis=1)
        by_row = jax.lax.rsqrt(row / jnp.mean(row, axis=1, keepdims=True))[:, :, None]
        u = view * by_row * jax.lax.rsqrt(column)[:, None, :]
        u = u / jnp.maximum(1.0, _rms(u, (1, 2)) / hyper["clip_update"])
        return u.reshape(g.shape), {"by_row": row, "by_column": column}

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        count = state.taken + 1
        beta = 1 - count.astype(jnp.float32) ** -hyper["decay_exponent"]
        leaves, tree = jax.tree_util.tree_flatten_with_path(updates)
        squares = tree.flatten_up_to(state.squares)
        made = [one(path, g, s, beta) for (path, g), s in zip(leaves, squares, strict=True)]
        return tree.unflatten([u for u, _ in made]), FactoredState(count, tree.unflatten([s for _, s in made]))

    return optax.GradientTransformation(init, update)


def _rms(x: Array, over: tuple[int, ...]) -> Array:
    return jnp.sqrt(jnp.mean(jnp.square(x), axis=over, keepdims=True))
