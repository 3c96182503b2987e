"""In the style of flax's own examples: Linen modules, a TrainState, one jitted step."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState

from peers.case import BETA1, BETA2, CLIP, DECAY, EPS, NORM_EPS, RATE, ROPE_BASE, Case, V


def rope(x):
    half = x.shape[-1] // 2
    angle = jnp.arange(x.shape[1])[:, None] * ROPE_BASE ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angle)[None, :, None], jnp.sin(angle)[None, :, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


class Block(nn.Module):
    N: int
    H: int
    F: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, mask):
        def heads(name):
            return nn.DenseGeneral((self.N, self.H), use_bias=False, dtype=self.dtype, name=name)

        norm = partial(nn.RMSNorm, epsilon=NORM_EPS, dtype=self.dtype)
        dense = partial(nn.Dense, use_bias=False, dtype=self.dtype)
        h = norm(name="attn_norm")(x)
        q, k = rope(norm(name="q_norm")(heads("q")(h))), rope(norm(name="k_norm")(heads("k")(h)))
        mixed = nn.dot_product_attention(q, k, heads("v")(h), mask=mask, dtype=self.dtype)
        x = x + nn.DenseGeneral(x.shape[-1], axis=(-2, -1), use_bias=False, dtype=self.dtype, name="o")(mixed)
        h = norm(name="mlp_norm")(x)
        h = nn.silu(dense(self.F, name="gate")(h)) * dense(self.F, name="up")(h)
        return x + dense(x.shape[-1], name="down")(h)


class Decoder(nn.Module):
    D: int
    L: int
    N: int
    H: int
    F: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(V, self.D, dtype=self.dtype, name="embed")
        x = embed(tokens) * self.D**0.5
        mask = nn.make_causal_mask(tokens)
        for i in range(self.L):
            x = Block(self.N, self.H, self.F, self.dtype, name=f"layer_{i}")(x, mask)
        x = nn.RMSNorm(epsilon=NORM_EPS, dtype=self.dtype, name="norm")(x)
        return embed.attend(x).astype(jnp.float32)


def renamed(tree, L):
    """The case's parameters under this model's names."""
    layers = tree["shared"]["layers"]
    out = {"embed": {"embedding": tree["embedding_VD"]}, "norm": {"scale": tree["shared"]["norm_D"]}}
    for i in range(L):
        p = jax.tree.map(lambda a, i=i: np.asarray(a)[i], layers)
        a, m = p["attn"], p["mlp"]
        kernels = {"q": a["q_DNH"], "k": a["k_DKH"], "v": a["v_DKH"], "o": a["o_NHD"], "gate": m["gate_DF"],
                   "up": m["up_DF"], "down": m["down_FD"]}  # fmt: skip
        scales = {"attn_norm": p["attn_norm_D"], "mlp_norm": p["mlp_norm_D"], "q_norm": a["q_norm_H"],
                  "k_norm": a["k_norm_H"]}  # fmt: skip
        out[f"layer_{i}"] = {**{k: {"kernel": v} for k, v in kernels.items()},
                             **{k: {"scale": v} for k, v in scales.items()}}  # fmt: skip
    return out


class Trainer:
    def __init__(self, case: Case):
        s = case.shape
        model = Decoder(s.D, s.L, s.N, s.H, s.F, {"f32": jnp.float32, "bf16": jnp.bfloat16}[case.precision])
        self.data = [tuple(parts) for parts in zip(*case.sequences, strict=True)]
        mask = partial(jax.tree_util.tree_map_with_path, lambda path, a: path[-1].key == "kernel")
        optimizer = optax.chain(
            optax.clip_by_global_norm(CLIP),
            optax.adamw(RATE, b1=BETA1, b2=BETA2, eps=EPS, weight_decay=DECAY, mask=mask),
        )
        params = jax.device_put(renamed(case.parameters, case.L))
        self.state = TrainState.create(apply_fn=model.apply, params=params, tx=optimizer)

        @partial(jax.jit, donate_argnums=0)
        def step(state, inputs, labels, weights):
            def loss(params):
                logits = state.apply_fn({"params": params}, inputs)
                each = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
                return jnp.sum(each * weights) / jnp.sum(weights)

            value, gradient = jax.value_and_grad(loss)(state.params)
            return state.apply_gradients(grads=gradient), value

        self.step, self.taken = step, 0

    def steps(self, count):
        value = None
        for _ in range(count):
            self.state, value = self.step(self.state, *self.data[self.taken % len(self.data)])
            self.taken += 1
        return float(value)
