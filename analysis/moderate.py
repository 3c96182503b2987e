"""Variances of few degrees of freedom each, moderated by all of them (Smyth 2004, Stat. Appl. Genet. Mol. Biol. 3, article 3).

Three seeds tell little of one comparison's variance, and a zoo has many comparisons. If variances are scaled inverse
chi-squared draws about s0^2 with d0 degrees of freedom, that of each given its own s^2 is (d0 s0^2 + d s^2) / (d0 + d), with
d0 + d degrees of freedom for Student's t. d0 and s0 come from how far the s^2 scatter: as far as chi-squared alone would
leaves d0 infinite, which is the pooled variance; further leaves each its own.

Letters: c comparisons.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

_FEW = 3  # variances, below which how far they scatter is unknown


@dataclass(frozen=True, kw_only=True)
class Moderated:
    """Each comparison's variance and its degrees of freedom; `prior_sd` and `prior_dof` are s0 and d0."""

    variance_c: np.ndarray
    dof_c: np.ndarray
    prior_sd: float
    prior_dof: float


def moderate(variance: Sequence[float], dof: Sequence[int]) -> Moderated:
    """Of variances above 0; fewer than three are left as they are."""
    s2_c, d_c = np.asarray(variance, float), np.asarray(dof, float)
    if len(s2_c) and not (np.isfinite(s2_c).all() and (s2_c > 0).all() and (d_c >= 1).all()):
        raise ValueError(f"variance = {list(variance)}, dof = {list(dof)}: use positive variances of at least 1 degree")
    if len(s2_c) < _FEW:
        return Moderated(variance_c=s2_c, dof_c=d_c, prior_sd=math.nan, prior_dof=0.0)
    # log s^2 less what its chi-squared makes of it on average; its variance is trigamma(d/2) + trigamma(d0/2).
    e_c = np.log(s2_c) - special.digamma(d_c / 2) + np.log(d_c / 2)
    excess = float(e_c.var(ddof=1) - special.polygamma(1, d_c / 2).mean())
    if excess <= 0:
        pooled = float((s2_c * d_c).sum() / d_c.sum())
        total = np.full(len(s2_c), d_c.sum())
        return Moderated(
            variance_c=np.full(len(s2_c), pooled), dof_c=total, prior_sd=math.sqrt(pooled), prior_dof=math.inf
        )
    d0 = 2 * _trigamma_inverse(excess)
    s02 = math.exp(float(e_c.mean()) + special.digamma(d0 / 2) - math.log(d0 / 2))
    # No more than all comparisons have together, which is what a pooled variance would have.
    total = np.minimum(d0 + d_c, d_c.sum())
    return Moderated(
        variance_c=(d0 * s02 + d_c * s2_c) / (d0 + d_c), dof_c=total, prior_sd=math.sqrt(s02), prior_dof=d0
    )


def _trigamma_inverse(value: float) -> float:
    """x with trigamma(x) = value > 0, by Newton's steps on 1 / trigamma, which is convex and nearly linear (Smyth 2004)."""
    x = 0.5 + 1 / value
    for _ in range(50):
        trigamma = float(special.polygamma(1, x))
        step = trigamma * (1 - trigamma / value) / float(special.polygamma(2, x))
        x += step
        if -step / x < 1e-10:
            break
    return x
