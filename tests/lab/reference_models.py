"""Independent float64 numpy models: ordinary transformers on one concatenated sequence, and the two streams by definition.

Nothing here is shared with the lab but the parameter tree's names and what the options are called. Letters as in lab.transformer.
"""

import numpy as np

from lab.spec import Options

DEFAULT = Options()


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


def normalised(kind, x, scale):
    if kind == "layer":
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * scale
    return {"rms": norm, "scale": np.multiply}[kind](x, scale)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def mlp(p, x, kind="swiglu"):
    up = x @ p["up_DF"]
    if kind in ("swiglu", "geglu"):
        gate = x @ p["gate_DF"]
        inside = (gelu(gate) if kind == "geglu" else gate / (1 + np.exp(-gate))) * up
    else:
        assert "gate_DF" not in p
        inside = {"gelu": gelu, "relu": lambda x: np.maximum(x, 0), "relu2": lambda x: np.maximum(x, 0) ** 2}[kind](up)
    return inside @ p["down_FD"]


def residual(options, p, name, x, sublayer):
    """One sublayer with the norms of that name around it."""
    if options.norm_place == "post":
        return normalised(options.norm, x + sublayer(x), p[f"{name}_norm_D"])
    found = sublayer(normalised(options.norm, x, p[f"{name}_norm_D"]))
    if options.norm_place == "sandwich":
        found = normalised(options.norm, found, p[f"{name}_out_norm_D"])
    return x + found


def layer(options, p, x, sublayers):
    """sublayers: by the names of their norms. In a parallel block all of them are one."""
    if options.block == "parallel":
        branches = tuple(sublayers.values())
        return residual(options, p, "attn", x, lambda h: sum(branch(h) for branch in branches))
    for name, sublayer in sublayers.items():
        x = residual(options, p, name, x, sublayer)
    return x


def table_of(params, name):
    """V x D, whatever it is made of."""
    tables = {k: np.asarray(v, np.float64) for k, v in params.items() if k.rpartition("_")[0] == name}
    if not tables:
        return table_of(params, "embedding")
    return tables[f"{name}_VD"] if len(tables) == 1 else tables[f"{name}_VE"] @ tables[f"{name}_ED"]


def out(p, mixed):
    return np.einsum("tnh,nhd->td", mixed, p["o_NHD"])


def layer_of(stack, index):
    def pick(tree):
        return {k: pick(v) if isinstance(v, dict) else np.asarray(v, np.float64)[index if len(v) > 1 else 0]
                for k, v in tree.items() if v is not None}  # fmt: skip

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


def two_streams(structure, params, inputs_S, targets_T, *, options=DEFAULT, depths=None):
    """The definition of every structure, stream by stream: logits of the inputs' and of the targets' positions. depths: of
    both stacks, where their layers share weights."""
    table = table_of(params, "embedding")
    scale = np.sqrt(table.shape[1])
    x, y = table[inputs_S] * scale, table_of(params, "target_embedding")[targets_T] * scale
    S, T = len(x), len(y)
    at_x, at_y = np.arange(S), np.arange(T) + (0 if options.positions == "restart" else S)
    lower = np.tril(np.ones((T, T), bool))
    everything = np.ones((T, S), bool)
    both = np.concatenate([everything, lower], axis=1)
    seen_x = np.tril(np.ones((S, S), bool)) if structure.inputs == "causal" else np.ones((S, S), bool)
    xs, ys = (params["shared"],) * 2 if "shared" in params else (params["input"], params["target"])

    depth_x, depth_y = depths or (depth_of(xs), depth_of(ys))

    def top(stack, x):
        if options.norm_place == "post":
            assert "norm_D" not in stack
            return x
        return normalised(options.norm, x, np.asarray(stack["norm_D"], np.float64))

    def reading(projections, p_of_memory, memory_at, at, seen, h, own=True):
        """Attention of h over the memory, and over itself."""
        q = project(projections, h, at, "q")
        parts = [] if p_of_memory is None else [(p_of_memory, memory_at)]
        parts += [(h, at)] if own else []
        k, v = (np.concatenate([project(projections, *part, which) for part in parts]) for which in "kv")
        return out(projections, softmax_attention(q, k, v, seen))

    entering = []  # what enters each layer's input attention: the stream after that layer's norm, if one stands there
    for index in range(depth_x):
        p = layer_of(xs, index)
        entering.append(x if options.norm_place == "post" else normalised(options.norm, x, p["attn_norm_D"]))
        x = layer(options, p, x, {
            "attn": lambda h, p=p: reading(p["attn"], None, None, at_x, seen_x, h),
            "mlp": lambda h, p=p: mlp(p["mlp"], h, options.mlp),
        })  # fmt: skip
    top_x = top(xs, x)

    for index in range(depth_y):
        p = layer_of(ys, index)
        memory = top_x if structure.memory == "final" else entering[index]
        if structure.cross == "merged":
            attention = {"attn": lambda h, p=p, m=memory: reading(p["attn"], m, at_x, at_y, both, h)}
        else:
            reader = p["cross"] if structure.cross == "separate" else p["attn"]
            attention = {
                "attn": lambda h, p=p: reading(p["attn"], None, None, at_y, lower, h),
                "cross": lambda h, r=reader, m=memory: reading(r, m, at_x, at_y, everything, h, own=False),
            }
        y = layer(options, p, y, attention | {"mlp": lambda h, p=p: mlp(p["mlp"], h, options.mlp)})
    head, cap = table_of(params, "head"), options.logit_softcap
    logits = top_x @ head.T, top(ys, y) @ head.T
    return logits if cap is None else tuple(cap * np.tanh(part / cap) for part in logits)
