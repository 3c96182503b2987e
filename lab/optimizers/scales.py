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
        """Whose inputs grow with the width: not norms, and not matrices over places."""
        return _layered(path) and not str(path[-1].key).endswith(("norm_D", "norm_H", "_NAA"))

    def rate(path: tuple[Any, ...], leaf: Any) -> float:
        return 1 / m if is_matrix(path) else 1.0

    def decay(path: tuple[Any, ...], leaf: Any) -> float:
        return m if is_matrix(path) and how.name == "completep" else 1.0

    def sharers(path: tuple[Any, ...]) -> float:
        """Against the base, how many more of a parameter's kind share what the stream passes back: its gradients are as much
        smaller."""
        name = str(path[-1].key)
        if name.endswith(("_NAA", "_NR")):  # one each for a head
            assert how.base_H is not None
            return m * how.base_H / shape.H
        return 1.0 if name.endswith("_VE") else m

    def eps(path: tuple[Any, ...], leaf: Any) -> float:
        if how.name != "completep":
            return 1.0
        return 1 / (sharers(path) * (how.depth(leaf.shape[0]) if _layered(path) else 1))

    return Scales(*(jax.tree_util.tree_map_with_path(of, params) for of in (rate, decay, eps)))


def _layered(path: tuple[Any, ...]) -> bool:
    """Of the layers: stacked, the depth first."""
    return "layers" in [str(entry.key) for entry in path]
