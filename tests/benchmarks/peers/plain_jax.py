"""A plain hand-written JAX loop: a dict of arrays, one jitted step with optax, layers in a Python loop."""

from functools import partial

import jax
import jax.numpy as jnp
import optax

from peers.case import BETA1, BETA2, CLIP, DECAY, EPS, NORM_EPS, RATE, ROPE_BASE, Case


def norm(x, scale):
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(x32**2, -1, keepdims=True) + NORM_EPS) * scale).astype(x.dtype)


def rope(x):
    half = x.shape[-1] // 2
    angle = jnp.arange(x.shape[1])[:, None] * ROPE_BASE ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angle)[None, :, None], jnp.sin(angle)[None, :, None]
    a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def attention(q, k, v):
    T = q.shape[1]
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k).astype(jnp.float32) * q.shape[-1] ** -0.5
    scores = jnp.where(jnp.tril(jnp.ones((T, T), bool)), scores, -jnp.inf)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores).astype(v.dtype), v)


def forward(params, tokens, dtype):
    D = params["embedding_VD"].shape[1]
    x = (params["embedding_VD"][tokens] * D**0.5).astype(dtype)
    stack = params["shared"]
    for i in range(stack["layers"]["attn_norm_D"].shape[0]):
        p = jax.tree.map(lambda a, i=i: a[i].astype(dtype), stack["layers"])
        h = norm(x, p["attn_norm_D"])
        q = rope(norm(jnp.einsum("btd,dnh->btnh", h, p["attn"]["q_DNH"]), p["attn"]["q_norm_H"]))
        k = rope(norm(jnp.einsum("btd,dnh->btnh", h, p["attn"]["k_DKH"]), p["attn"]["k_norm_H"]))
        v = jnp.einsum("btd,dnh->btnh", h, p["attn"]["v_DKH"])
        x = x + jnp.einsum("btnh,nhd->btd", attention(q, k, v), p["attn"]["o_NHD"])
        h = norm(x, p["mlp_norm_D"])
        x = x + (jax.nn.silu(h @ p["mlp"]["gate_DF"]) * (h @ p["mlp"]["up_DF"])) @ p["mlp"]["down_FD"]
    x = norm(x, stack["norm_D"])
    return (x @ params["embedding_VD"].astype(dtype).T).astype(jnp.float32)


class Trainer:
    def __init__(self, case: Case):
        self.data = [tuple(parts) for parts in zip(*case.sequences, strict=True)]
        dtype = {"f32": jnp.float32, "bf16": jnp.bfloat16}[case.precision]
        optimizer = optax.chain(
            optax.clip_by_global_norm(CLIP),
            optax.adamw(RATE, b1=BETA1, b2=BETA2, eps=EPS, weight_decay=DECAY,
                        mask=partial(jax.tree_util.tree_map_with_path, lambda path, _: _decays(path))),
        )  # fmt: skip

        def loss(params, inputs, labels, weights):
            each = optax.softmax_cross_entropy_with_integer_labels(forward(params, inputs, dtype), labels)
            return jnp.sum(each * weights) / jnp.sum(weights)

        @partial(jax.jit, donate_argnums=(0, 1))
        def step(params, state, inputs, labels, weights):
            value, gradient = jax.value_and_grad(loss)(params, inputs, labels, weights)
            update, state = optimizer.update(gradient, state, params)
            return optax.apply_updates(params, update), state, value

        self.step, self.params = step, jax.device_put(case.parameters)
        self.state, self.taken = optimizer.init(self.params), 0

    def steps(self, count):
        value = None
        for _ in range(count):
            self.params, self.state, value = self.step(self.params, self.state, *self.data[self.taken % len(self.data)])
            self.taken += 1
        return float(value)


def _decays(path):
    names = [entry.key for entry in path]
    return "layers" in names and not names[-1].endswith(("norm_D", "norm_H"))
