"""Layers that joined at different times, and what each generation of them has of its own: the state of its optimizer.

A model's layers are one array by depth. After k doublings of the depth its first 1/2^k are the oldest, as many after them
joined at the first doubling, twice as many at the second, and so on. The oldest generation has all that is no layer beside it.

Optimizers count their steps, and correct by it for moments that began at zero: of all parameters that one count is right for
none that joined later (their first step by Adam would be 3.2 times too long at betas of 0.9 and 0.999).
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax


def split(tree: Any, doublings: int) -> list[Any]:
    """Of parameters, or a tree like them, one tree for each generation, the oldest first."""
    return [_generation(tree, g, doublings) for g in range(doublings + 1)]


def _generation(tree: Any, generation: int, doublings: int) -> Any:
    def bounds(depth: int) -> tuple[int, int]:
        end = depth // 2 ** (doublings - generation)
        return (end // 2 if generation else 0), end

    part = {}
    for name, branch in tree.items():
        if isinstance(branch, dict) and "layers" in branch:
            begin, end = bounds(jax.tree.leaves(branch["layers"])[0].shape[0])
            cut = jax.tree.map(lambda leaf, b=begin, e=end: leaf[b:e], branch["layers"])
            part[name] = {"layers": cut} if generation else {**branch, "layers": cut}
        elif not generation:
            part[name] = branch
    return part


def join(parts: list[Any]) -> Any:
    """What `split` took apart."""
    whole = {}
    for name, branch in parts[0].items():
        if isinstance(branch, dict) and "layers" in branch:
            layers = [part[name]["layers"] for part in parts]
            branch = {**branch, "layers": jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *layers)}
        whole[name] = branch
    return whole


def twice(params: Any) -> Any:
    """Each stack of layers, and a copy of it on top."""
    return join([params, params])


def clipped(gradient: Any, clip: Any) -> Any:
    """All generations together, to this norm: each optimizer clips what it is given by itself, and then finds nothing to do."""
    empty = optax.EmptyState()
    return optax.clip_by_global_norm(clip).update(gradient, empty)[0]
