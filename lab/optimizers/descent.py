"""What optimizers share: the gradient is clipped, a direction made of it, matrices decay, the learning rate scales the step."""

from typing import Any

import jax
import optax
from jax import Array

from lab.optimizers.scales import Scales

Hyperparameters = dict[str, Any]  # float32 scalars by name (lab.hyperparameters)
Rate = Array | float


def decays(path: tuple[Any, ...]) -> bool:
    """Weight decay acts on the matrices of the layers: not on token tables, not on norms."""
    names = [str(entry.key) for entry in path]
    return "layers" in names and not names[-1].endswith(("norm_D", "norm_H"))


def decay_mask(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: decays(path), params)


def clipped(hyper: Hyperparameters) -> optax.GradientTransformation:
    """All of the gradient together, to this norm."""
    return optax.clip_by_global_norm(hyper["clip"])


def decayed_step(hyper: Hyperparameters, rate: Rate) -> tuple[optax.GradientTransformation, ...]:
    """Minus the rate times (direction + weight decay * parameter): decay is scaled by the learning rate alone."""
    return (
        optax.add_decayed_weights(hyper["weight_decay"], mask=decay_mask),
        optax.scale_by_learning_rate(rate, flip_sign=True),
    )


def descend(
    hyper: Hyperparameters, rate: Rate, direction: optax.GradientTransformation, scales: Scales | None = None
) -> optax.GradientTransformation:
    """scales: of a parametrization, for directions that do not change where gradient and eps are multiplied alike."""
    if scales is None:
        return optax.chain(clipped(hyper), direction, *decayed_step(hyper, rate))
    s = scales

    def step(direction: Any, params: Any) -> Any:
        return jax.tree.map(
            lambda u, p, of_rate, of_decay, decayed: -rate * of_rate * (u + decayed * of_decay * hyper["weight_decay"] * p),
            direction, params, s.rate, s.decay, decay_mask(params),
        )  # fmt: skip

    # An eps of s * eps is one of eps where the gradient is divided by s.
    of_eps = optax.stateless(lambda gradient, _: jax.tree.map(lambda g, scale: g / scale, gradient, s.eps))
    return optax.chain(clipped(hyper), of_eps, direction, optax.stateless(step))
