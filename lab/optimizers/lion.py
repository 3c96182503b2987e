import optax

from lab.optimizers.descent import Hyperparameters, Rate, descend
from lab.optimizers.scales import Scales


def lion(hyper: Hyperparameters, rate: Rate, scales: Scales | None = None) -> optax.GradientTransformation:
    """Chen et al. 2023 (arXiv 2302.06675): the sign of a mean of gradient and momentum. One moment."""
    assert scales is None
    direction = optax.scale_by_lion(b1=hyper["beta1"], b2=hyper["beta2"], mu_dtype=None, mode="hard", smooth_beta=1.0)
    return descend(hyper, rate, direction)
