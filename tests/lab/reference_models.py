"""Independent float64 numpy models: ordinary transformers on one concatenated sequence, and the two streams by definition.

Nothing here is shared with the lab but the parameter tree's names. Letters as in lab.transformer.
"""

import numpy as np


def norm(x, scale):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale


def rope(x_nNH, positions):
    half = x_nNH.shape[-1] // 2
    out = np.empty_like(x_nNH)
    for i in range(half):
        angle = positions * 10_000.0 ** (-i / half)
        c, s = np.cos(angle)[:, None], np.sin(angle)[:, None]
        a, b = x_nNH[..., i], x_nNH[..., i + half]
        out[..., i], out[..., i + half] = a * c - b * s, b * c + a * s
    return out


def project(p, x, positions, which):
    """Heads of x under one projection of p; queries and keys are normalised and rotated."""
    heads = np.einsum("td,dnh->tnh", x, p[f"{which}_D{'N' if which == 'q' else 'K'}H"])
    if which == "v":
        return heads
    if p.get(f"{which}_norm_H") is not None:
        heads = norm(heads, p[f"{which}_norm_H"])
    return rope(heads, positions)


def softmax_attention(q, k, v, seen):
    """One head and one query at a time; `seen[i, j]`: query i may look at key j."""
    out = np.zeros_like(q)
    group = q.shape[1] // k.shape[1]
    for head in range(q.shape[1]):
        scores = q[:, head] @ k[:, head // group].T / np.sqrt(q.shape[-1])
        scores = np.where(seen, scores, -np.inf)
        weight = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[:, head] = weight / weight.sum(axis=1, keepdims=True) @ v[:, head // group]
    return out


def mlp(p, x):
    if "gate_DF" in p:
        gate = x @ p["gate_DF"]
        return gate / (1 + np.exp(-gate)) * (x @ p["up_DF"]) @ p["down_FD"]
    up = x @ p["up_DF"]
    return 0.5 * up * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3))) @ p["down_FD"]


def out(p, mixed):
    return np.einsum("tnh,nhd->td", mixed, p["o_NHD"])


def layer_of(stack, index):
    def pick(tree):
        return {k: pick(v) if isinstance(v, dict) else np.asarray(v, np.float64)[index] for k, v in tree.items()
                if v is not None}  # fmt: skip

    return pick(stack["layers"])


def depth_of(stack):
    return len(stack["layers"]["attn_norm_D"])


def concatenated(params, tokens_n, inputs: int, *, bidirectional_inputs: bool):
    """A textbook decoder (or prefix LM) over one sequence of tokens: logits of every position."""
    table = np.asarray(params["embedding_VD"], np.float64)
    n, D = len(tokens_n), table.shape[1]
    position = np.arange(n)
    seen = position[None, :] <= position[:, None]
    if bidirectional_inputs:
        seen = seen | ((position[:, None] < inputs) & (position[None, :] < inputs))
    x, stack = table[tokens_n] * np.sqrt(D), params["shared"]
    for index in range(depth_of(stack)):
        p = layer_of(stack, index)
        h = norm(x, p["attn_norm_D"])
        q, k, v = (project(p["attn"], h, position, which) for which in "qkv")
        x = x + out(p["attn"], softmax_attention(q, k, v, seen))
        x = x + mlp(p["mlp"], norm(x, p["mlp_norm_D"]))
    return norm(x, np.asarray(stack["norm_D"], np.float64)) @ table.T


def two_streams(structure, params, inputs_S, targets_T, *, restart=False):
    """The definition of every structure, stream by stream: logits of the inputs' and of the targets' positions."""
    tables = {k: np.asarray(v, np.float64) for k, v in params.items() if k.endswith("VD")}
    table = tables["embedding_VD"]
    scale = np.sqrt(table.shape[1])
    x, y = table[inputs_S] * scale, tables.get("target_embedding_VD", table)[targets_T] * scale
    S, T = len(x), len(y)
    at_x, at_y = np.arange(S), np.arange(T) + (0 if restart else S)
    lower = np.tril(np.ones((T, T), bool))
    everything = np.ones((T, S), bool)
    seen_x = np.tril(np.ones((S, S), bool)) if structure.inputs == "causal" else np.ones((S, S), bool)
    xs, ys = (params["shared"],) * 2 if "shared" in params else (params["input"], params["target"])
    norm_x, norm_y = (np.asarray(stack["norm_D"], np.float64) for stack in (xs, ys))

    entering = []  # the input stream as it enters each layer, after that layer's attention norm
    for index in range(depth_of(xs)):
        p = layer_of(xs, index)
        h = norm(x, p["attn_norm_D"])
        entering.append(h)
        q, k, v = (project(p["attn"], h, at_x, which) for which in "qkv")
        x = x + out(p["attn"], softmax_attention(q, k, v, seen_x))
        x = x + mlp(p["mlp"], norm(x, p["mlp_norm_D"]))
    top = norm(x, norm_x)

    for index in range(depth_of(ys)):
        p = layer_of(ys, index)
        memory = top if structure.memory == "final" else entering[index]
        h = norm(y, p["attn_norm_D"])
        q, k, v = (project(p["attn"], h, at_y, which) for which in "qkv")
        if structure.cross == "merged":
            k = np.concatenate([project(p["attn"], memory, at_x, "k"), k])
            v = np.concatenate([project(p["attn"], memory, at_x, "v"), v])
            y = y + out(p["attn"], softmax_attention(q, k, v, np.concatenate([everything, lower], axis=1)))
        else:
            y = y + out(p["attn"], softmax_attention(q, k, v, lower))
            reader = p["cross"] if structure.cross == "separate" else p["attn"]
            q = project(reader, norm(y, p["cross_norm_D"]), at_y, "q")
            k, v = (project(reader, memory, at_x, which) for which in "kv")
            y = y + out(reader, softmax_attention(q, k, v, everything))
        y = y + mlp(p["mlp"], norm(y, p["mlp_norm_D"]))
    head = tables.get("head_VD", table)
    return top @ head.T, norm(y, norm_y) @ head.T
