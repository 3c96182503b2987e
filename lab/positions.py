"""How positions enter: one function and one dict line each. "none" is in no dict: a causal model tells positions by what it
may see (Kazemnejad et al. 2023, arXiv 2305.19466), a bidirectional one sees a bag of tokens.

    ROTARY     queries and keys are turned by their positions
    ABSOLUTE   each position has a row that is added to the token's embedding
    RELATIVE   each distance between query and key has a number that is added to their score

Letters: B batch, T positions, N query heads, H head width, D model width, A positions in a table, R relative distances.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from lab.seen import BUCKETS

BASE = 10_000.0
# The host's, [T], or a program's, [T] or [B, T].
Positions = np.ndarray | Array
TURNS = 512  # positions of a program are below its square
FARTHEST = 128  # distances beyond share T5's last bucket (Raffel et al. 2020, section 2.1)


def rotate(x_BTNH: Float[Array, "B T N H"], positions: Positions) -> Float[Array, "B T N H"]:
    """Rotary positions (Su et al. 2021): channel i turns with channel i + H/2.

    Where positions are the host's, cosines are constants: a compiler that fuses them computes them for every number.
    """
    cosine, sine = _turns(positions, x_BTNH.shape[-1])
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return turned.astype(x_BTNH.dtype)


def _turns(positions: Positions, width: int) -> tuple[Any, Any]:
    """Float32 cosines and sines, [1 or B, T, 1, width / 2], of each position's angles.

    A float32 angle of position 10,000 would be off by 1e-3: a program looks up the turn of 512 times a and that of b, which
    the host knows, and puts them together.
    """

    if isinstance(positions, np.ndarray):
        cosine_TH, sine_TH = _known_turns(positions, width)
        return cosine_TH[None, :, None, :], sine_TH[None, :, None, :]
    rows = positions if positions.ndim == 2 else positions[None]
    coarse, fine = _known_turns(np.arange(TURNS) * TURNS, width), _known_turns(np.arange(TURNS), width)
    coarse_c, coarse_s = (jnp.asarray(table)[rows // TURNS][:, :, None] for table in coarse)
    fine_c, fine_s = (jnp.asarray(table)[rows % TURNS][:, :, None] for table in fine)
    return coarse_c * fine_c - coarse_s * fine_s, coarse_s * fine_c + coarse_c * fine_s


def _known_turns(positions_T: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    angle_TH = np.outer(positions_T, BASE ** (-2 * np.arange((width + 1) // 2) / width))
    return np.cos(angle_TH).astype(np.float32), np.sin(angle_TH).astype(np.float32)


ROTARY: dict[str, Callable[[Array, Positions], Array]] = {"rope": rotate}


# ---- absolute ----------------------------------------------------------------------------------------------------------


def learned(table_AD: Float[Array, "A D"], positions: Positions, D: int) -> Array:
    """Rows of a table that is trained as the tokens' is (Devlin et al. 2019), drawn and scaled as theirs."""
    rows = table_AD[positions]
    return rows if rows.ndim == 3 else rows[None]


def sinusoidal(table_AD: Any, positions: Positions, D: int) -> Array:
    """Vaswani et al. 2017, section 3.5: channels 2i and 2i+1 are the sine and the cosine of position / 10000^(2i/D). There is
    no table: every position has a row."""
    cosine, sine = (part[:, :, 0] for part in _turns(positions, D))
    both = jnp.stack([sine, cosine], axis=-1)
    return both.reshape(*both.shape[:2], 2 * both.shape[2])[..., :D]


ABSOLUTE: dict[str, Callable[[Any, Positions, int], Array]] = {"learned": learned, "sinusoidal": sinusoidal}


# ---- relative ----------------------------------------------------------------------------------------------------------


def alibi(distance: Any, N: int, table_NR: Any, *, ahead: bool) -> Array:
    """Press et al. 2022 (arXiv 2108.12409): each head's slope times the distance, subtracted. Where keys lie ahead their distance
    counts alike, |i - j|: the paper's rule is causal, and this is its symmetric form."""
    slopes_N = np.array(slopes(N), np.float32)
    return -jnp.asarray(slopes_N).reshape(N, *[1] * distance.ndim) * abs(distance)[None]


def slopes(N: int) -> list[float]:
    """Of N heads, a power of two: 2^(-8/N), 2^(-16/N) .. 2^-8. Of others, as in the authors' code, those of the power of two
    below, and then every other one of twice that."""
    power = 1 << (N.bit_length() - 1)
    found = [2.0 ** (-8 * (head + 1) / power) for head in range(power)]
    return found if power == N else found + slopes(2 * power)[0::2][: N - power]


def t5(distance: Any, N: int, table_NR: Float[Array, "N R"], *, ahead: bool) -> Array:
    """Raffel et al. 2020: a learned number for each head and bucket of distances. ahead: keys may lie ahead, and half of the
    buckets are theirs; else all are of keys behind. Scores are scaled by H^-0.5 as everywhere here, which T5's are not."""
    count = BUCKETS // 2 if ahead else BUCKETS
    behind = jnp.asarray(_buckets(count))[jnp.clip(distance, 0, FARTHEST)]
    if not ahead:
        return table_NR[:, behind]
    before = jnp.asarray(_buckets(count))[jnp.clip(-distance, 0, FARTHEST)]
    return table_NR[:, jnp.where(distance < 0, count + before, behind)]


def _buckets(count: int) -> np.ndarray:
    """Of the distances 0 .. FARTHEST: half of the buckets are of one distance, the others grow with its logarithm."""
    exact, distance = count // 2, np.arange(FARTHEST + 1)
    share = np.log2(np.maximum(distance, exact) / exact) / np.log2(FARTHEST / exact)
    return np.where(distance < exact, distance, np.minimum(exact + (share * (count - exact)).astype(int), count - 1))


# Whose numbers cross-attention of its own softmax adds too; T5's has none.
CROSS = ("alibi",)
# (distances of query and key, heads, the stack's table, whether keys may lie ahead) -> [N, ...] float32, for each distance.
RELATIVE: dict[str, Callable[..., Array]] = {"alibi": alibi, "t5": t5}
