"""What a parametrization (lab.parametrization) makes of each parameter's learning rate, weight decay and eps."""

from typing import Any, NamedTuple

import jax

from lab.spec import Options, Shape


class Scales(NamedTuple):
    """Trees of floats, like the parameters: times the run's."""

    rate: Any
    decay: Any
    eps: Any


def scales(options: Options, shape: Shape, params: Any) -> Scales | None:
    """None for the standard one, where all are 1."""
    how = options.parametrization
    if how.name == "standard":
        return None
    m = how.width(shape.D)

    def is_matrix(path: tuple[Any, ...]) -> bool:
        return _layered(path) and not str(path[-1].key).endswith(("norm_D", "norm_H"))

    def rate(path: tuple[Any, ...], leaf: Any) -> float:
        return 1 / m if is_matrix(path) else 1.0

    def decay(path: tuple[Any, ...], leaf: Any) -> float:
        return m if is_matrix(path) and how.name == "completep" else 1.0

    def eps(path: tuple[Any, ...], leaf: Any) -> float:
        if how.name != "completep":
            return 1.0
        return 1 / (m * how.depth(leaf.shape[0])) if _layered(path) else 1 / m

    return Scales(*(jax.tree_util.tree_map_with_path(of, params) for of in (rate, decay, eps)))


def _layered(path: tuple[Any, ...]) -> bool:
    """Of the layers: stacked, the depth first."""
    return "layers" in [str(entry.key) for entry in path]
