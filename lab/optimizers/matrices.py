"""Which parameters are matrices, and which axes are the layers', the inputs' and the outputs'.

A parameter's name ends in its shape (lab.layers): q_DNH maps D to the N H of all heads, o_NHD those to D, and of the layers'
parameters an axis of depth leads. What begins or ends with D is a matrix between D and the rest.
"""

import math
from typing import Any, NamedTuple

import jax
from jax import Array


class Axes(NamedTuple):
    """How many axes of a parameter number its matrices (or vectors), and how many of the others are a matrix' rows: its inputs.
    rows = 0: no matrix."""

    many: int
    rows: int

    def view(self, x: Array) -> Array:
        """[matrices, rows, columns]."""
        many, end = self.many, self.many + self.rows
        parts = x.shape[:many], x.shape[many:end], x.shape[end:]
        return x.reshape(*(math.prod(part) for part in parts))


def axes(path: tuple[Any, ...]) -> Axes:
    names = [str(entry.key) for entry in path]
    letters, depth = names[-1].rpartition("_")[2], int("layers" in names)
    if letters.isupper() and letters.startswith("E") and depth:  # experts: a matrix each
        letters, depth = letters[1:], depth + 1
    if not (letters.isupper() and len(letters) > 1):
        return Axes(depth, 0)
    if letters.startswith("D"):
        return Axes(depth, 1)
    return Axes(depth, len(letters) - 1) if letters.endswith("D") else Axes(depth, 0)


def is_layers_matrix(path: tuple[Any, ...]) -> bool:
    """Not a token table, its factors or a head: those map from or to a vocabulary, and are treated as lists of vectors. Nor what
    mixes tokens in attention's place, most of which a causal model never reads: a list of numbers."""
    return axes(path).rows > 0 and "layers" in [str(entry.key) for entry in path]


def labels(params: Any) -> Any:
    """'matrix' or 'other', for optax.partition."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "matrix" if is_layers_matrix(path) else "other", params)


def of_each(reduce: Any, x: Array, path: tuple[Any, ...]) -> Array:
    """`reduce` over each matrix or vector of a parameter, the axes kept."""
    return reduce(x, axis=tuple(range(axes(path).many, x.ndim)), keepdims=True)
