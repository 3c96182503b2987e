from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from lab.optimizers.adam import adam
from lab.optimizers.descent import Hyperparameters, Rate, clipped, decayed_step
from lab.optimizers.matrices import axes, labels
from lab.optimizers.scales import Scales


class SoapState(NamedTuple):
    """taken: steps. mu: the gradient's moment. nu: the second moment in the eigenbasis. Of each parameter's matrices
    (M of them, r by c) `sides` has the gradients' moments by rows and columns, and `bases` their eigenvectors, in columns."""

    taken: Array
    mu: Any
    nu: Any
    sides: Any
    bases: Any


def soap(hyper: Hyperparameters, rate: Rate, scales: Scales | None = None) -> optax.GradientTransformation:
    """Vyas et al. 2024 (arXiv 2409.11321), algorithm 3.

    Adam in the eigenbasis of Shampoo's two matrices, which is brought up to date every `interval` steps by one power iteration
    and a QR. As the released code does, the first step only sets the basis, and a step is taken in the basis of the gradients
    before it. Token tables, heads and norms are AdamW's, with the same numbers.
    """
    assert scales is None
    return optax.chain(
        clipped(hyper),
        optax.partition({"matrix": _soap(hyper), "other": adam(hyper)}, labels, mask_compatible_extra_args=False),
        *decayed_step(hyper, rate),
    )


def _soap(hyper: Hyperparameters) -> optax.GradientTransformation:
    def squares(path: tuple[Any, ...], p: Array) -> dict[str, Array]:
        many, rows, columns = axes(path).view(p).shape
        # By the letters in the names a mesh cuts them (lab.mesh), as D and F are cut.
        return {
            "rows_DD": jnp.zeros((many, rows, rows), p.dtype),
            "columns_FF": jnp.zeros((many, columns, columns), p.dtype),
        }

    def init(params: Any) -> SoapState:
        mapped = jax.tree_util.tree_map_with_path
        zeros = jax.tree.map(jnp.zeros_like, params)
        return SoapState(jnp.zeros((), jnp.int32), zeros, jax.tree.map(jnp.zeros_like, params), mapped(squares, params),
                         mapped(squares, params))  # fmt: skip

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        leaves, tree = jax.tree_util.tree_flatten_with_path(updates)
        parts = [tree.flatten_up_to(part) for part in state[1:]]
        made = [
            _step(hyper, state.taken, axes(path).view, g, *of) for (path, g), *of in zip(leaves, *parts, strict=True)
        ]
        update, *moved = (tree.unflatten([part[i] for part in made]) for i in range(5))
        return update, SoapState(state.taken + 1, *moved)

    return optax.GradientTransformation(init, update)


def _step(hyper: Hyperparameters, t: Array, view: Any, g: Array, mu: Array, nu: Array, sides: Any, bases: Any):
    """Update, and state, of one parameter. t: steps before this one, the first of which only sets the basis."""
    beta1, beta2, first = hyper["beta1"], hyper["beta2"], t == 0
    g_Mrc, left, right = view(g), bases["rows_DD"], bases["columns_FF"]

    def rotate(x_Mrc: Array) -> Array:
        return left.swapaxes(1, 2) @ x_Mrc @ right

    new_mu = jnp.where(first, mu, beta1 * mu + (1 - beta1) * g)
    new_nu = jnp.where(first, nu, beta2 * nu + (1 - beta2) * jnp.square(rotate(g_Mrc)).reshape(g.shape))
    taken = jnp.maximum(t, 1).astype(jnp.float32)
    m_Mrc = rotate(view(new_mu)) / (1 - beta1**taken)
    v_Mrc = view(new_nu) / (1 - beta2**taken)
    stepped_Mrc = left @ (m_Mrc / (jnp.sqrt(v_Mrc) + hyper["eps"])) @ right.swapaxes(1, 2)
    update = jnp.where(first, 0.0, stepped_Mrc.reshape(g.shape))

    beta = hyper["shampoo_beta"]
    sides = {
        "rows_DD": beta * sides["rows_DD"] + (1 - beta) * g_Mrc @ g_Mrc.swapaxes(1, 2),
        "columns_FF": beta * sides["columns_FF"] + (1 - beta) * g_Mrc.swapaxes(1, 2) @ g_Mrc,
    }

    def begin(nu_Mrc: Array) -> tuple[Array, dict[str, Array]]:
        return nu_Mrc, {name: jnp.linalg.eigh(side)[1][:, :, ::-1] for name, side in sides.items()}

    def refresh(nu_Mrc: Array) -> tuple[Array, dict[str, Array]]:
        rows, by_row = _power_iteration(sides["rows_DD"], left)
        columns, by_column = _power_iteration(sides["columns_FF"], right)
        nu_Mrc = jnp.take_along_axis(nu_Mrc, by_row[:, :, None], axis=1)
        return jnp.take_along_axis(nu_Mrc, by_column[:, None, :], axis=2), {"rows_DD": rows, "columns_FF": columns}

    due = (t % jnp.int32(jnp.maximum(hyper["interval"], 1)) == 0) & ~first
    what = jnp.where(first, 1, jnp.where(due, 2, 0))
    nu_Mrc, bases = jax.lax.switch(what, [lambda nu: (nu, bases), begin, refresh], view(new_nu))
    return update, new_mu, nu_Mrc.reshape(g.shape), sides, bases


def _power_iteration(side_Mnn: Array, basis_Mnn: Array) -> tuple[Array, Array]:
    """The basis after one, in falling order of what were estimates of the eigenvalues before it; and that order [M, n]."""
    estimate_Mn = jnp.einsum("Mji,Mjk,Mki->Mi", basis_Mnn, side_Mnn, basis_Mnn)
    order_Mn = jnp.argsort(-estimate_Mn, axis=1)
    sorted_Mnn = jnp.take_along_axis(basis_Mnn, order_Mn[:, None, :], axis=2)
    return jnp.linalg.qr(side_Mnn @ sorted_Mnn)[0], order_Mn
