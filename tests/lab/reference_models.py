"""Independent float64 numpy models: ordinary transformers on one concatenated sequence, and the two streams by definition.

Nothing here is shared with the lab but the parameter tree's names and what the options are called. Letters as in lab.transformer.
"""

import math

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


def project(p, x, positions, which, encoding="rope"):
    """Heads of x under one projection of p; queries and keys are normalised and rotated."""
    heads = np.einsum("td,dnh->tnh", x, p[f"{which}_D{'N' if which == 'q' else 'K'}H"])
    if which == "v":
        return heads
    if p.get(f"{which}_norm_H") is not None:
        heads = norm(heads, p[f"{which}_norm_H"])
    return rope(heads, positions) if encoding == "rope" else heads


def sinusoids(positions, D):
    """Vaswani et al. 2017: PE(pos, 2i) = sin(pos / 10000^(2i/D)), PE(pos, 2i+1) = cos(pos / 10000^(2i/D))."""
    return np.array([[(math.cos if c % 2 else math.sin)(p / 10_000.0 ** (2 * (c // 2) / D)) for c in range(D)]
                     for p in positions]).reshape(len(positions), D)  # fmt: skip


def alibi_slopes(heads):
    """As the authors' code has them (ofirpress/attention_with_linear_biases, get_slopes)."""

    def power_of_2(n):
        start = 2 ** (-(2 ** -(math.log2(n) - 3)))
        return [start * start**i for i in range(n)]

    if math.log2(heads).is_integer():
        return power_of_2(heads)
    closest = 2 ** math.floor(math.log2(heads))
    return power_of_2(closest) + alibi_slopes(2 * closest)[0::2][: heads - closest]


def t5_bucket(relative_position, bidirectional, num_buckets=32, max_distance=128):
    """mesh_tensorflow's _relative_position_bucket, for one pair; relative_position is the key's less the query's."""
    bucket, n = 0, -relative_position
    if bidirectional:
        num_buckets //= 2
        bucket += num_buckets if n < 0 else 0
        n = abs(n)
    else:
        n = max(n, 0)
    max_exact = num_buckets // 2
    if n < max_exact:
        return bucket + n
    large = max_exact + int(math.log(n / max_exact) / math.log(max_distance / max_exact) * (num_buckets - max_exact))
    return bucket + min(large, num_buckets - 1)


def added(encoding, table_NR, at_q, at_k, heads, bidirectional):
    """[N, T, S]: what is added to scores, pair by pair."""
    out = np.zeros((heads, len(at_q), len(at_k)))
    if encoding in ("alibi", "t5"):
        slopes = alibi_slopes(heads)
        for i, at_i in enumerate(at_q):
            for j, at_j in enumerate(at_k):
                if encoding == "alibi":
                    out[:, i, j] = [-slope * abs(at_i - at_j) for slope in slopes]
                else:
                    out[:, i, j] = table_NR[:, t5_bucket(at_j - at_i, bidirectional)]
    return out


def may_see(at_q, at_k, turn=None, window=None):
    """Pair by pair. turn: None where all see all, 1 where keys ahead are unseen."""
    return np.array(
        [
            [(turn is None or j // turn <= i // turn) and (window is None or abs(i - j) < window) for j in at_k]
            for i in at_q
        ],
        bool,
    ).reshape(len(at_q), len(at_k))


def softmax_attention(q, k, v, seen, bias=None):
    """One head and one query at a time; `seen[i, j]`: query i may look at key j; bias [N, T, S] is added to the scores."""
    out = np.zeros_like(q)
    if not len(q):
        return out
    group = q.shape[1] // k.shape[1]
    for head in range(q.shape[1]):
        scores = q[:, head] @ k[:, head // group].T / np.sqrt(q.shape[-1]) + (0 if bias is None else bias[head])
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


def top(options, stack, x):
    """What a stack hands on."""
    if options.norm_place == "post":
        assert "norm_D" not in stack
        return x
    return normalised(options.norm, x, np.asarray(stack["norm_D"], np.float64))


def capped(options, logits):
    return logits if options.logit_softcap is None else options.logit_softcap * np.tanh(logits / options.logit_softcap)


def entering(options, params, name, tokens, at):
    """A stream before its first layer: rows of tokens, and of positions, which are of width D whatever tables are made of."""
    table = table_of(params, name)
    D = table.shape[1]
    x = table[tokens] * np.sqrt(D)
    if options.encoding == "learned":
        return x + np.asarray(params["place_AD"], np.float64)[at] * np.sqrt(D)
    return x + sinusoids(at, D) if options.encoding == "sinusoidal" else x


def two_streams(structure, params, inputs_S, targets_T, *, options=DEFAULT, depths=None):
    """The definition of every structure, stream by stream: logits of the inputs' and of the targets' positions. depths: of
    both stacks, where their layers share weights."""
    S, T, encoding, window = len(inputs_S), len(targets_T), options.encoding, options.window
    at_x, at_y = np.arange(S), np.arange(T) + (0 if options.positions == "restart" else S)
    x = entering(options, params, "embedding", inputs_S, at_x)
    y = entering(options, params, "target_embedding", targets_T, at_y)
    behind = np.arange(S, S + T)  # where targets stand, wherever their positions start
    lower = may_see(behind, behind, 1, window)
    everything = np.ones((T, S), bool) if structure.cross != "merged" else may_see(behind, at_x, 1, window)
    seen_x = may_see(at_x, at_x, 1 if structure.inputs == "causal" else options.turn, window)
    both = np.concatenate([everything, lower], axis=1)
    xs, ys = (params["shared"],) * 2 if "shared" in params else (params["input"], params["target"])
    depth_x, depth_y = depths or (depth_of(xs), depth_of(ys))

    N, ahead = ys["layers"]["attn"]["q_DNH"].shape[2], structure.inputs == "bidirectional"
    bias_x = added(encoding, xs.get("relative_NR"), at_x, at_x, N, ahead)
    of_y = (encoding, ys.get("relative_NR"))
    ahead = ahead and xs is ys
    bias_y, to_x = added(*of_y, behind, behind, N, ahead), added(*of_y, behind, at_x, N, ahead)
    cross, bias_both = to_x if encoding == "alibi" else None, np.concatenate([to_x, bias_y], axis=2)

    def reading(projections, p_of_memory, memory_at, at, seen, bias, h, own=True):
        """Attention of h over the memory, and over itself."""
        q = project(projections, h, at, "q", encoding)
        parts = [] if p_of_memory is None else [(p_of_memory, memory_at)]
        parts += [(h, at)] if own else []
        k, v = (np.concatenate([project(projections, *part, which, encoding) for part in parts]) for which in "kv")
        return out(projections, softmax_attention(q, k, v, seen, bias))

    into = []  # what enters each layer's input attention: the stream after that layer's norm, if one stands there
    for index in range(depth_x):
        p = layer_of(xs, index)
        into.append(x if options.norm_place == "post" else normalised(options.norm, x, p["attn_norm_D"]))
        x = layer(options, p, x, {
            "attn": lambda h, p=p: reading(p["attn"], None, None, at_x, seen_x, bias_x, h),
            "mlp": lambda h, p=p: mlp(p["mlp"], h, options.mlp),
        })  # fmt: skip
    top_x = top(options, xs, x)

    for index in range(depth_y):
        p = layer_of(ys, index)
        memory = top_x if structure.memory == "final" else into[index]
        if structure.cross == "merged":
            attention = {"attn": lambda h, p=p, m=memory: reading(p["attn"], m, at_x, at_y, both, bias_both, h)}
        else:
            reader = p["cross"] if structure.cross == "separate" else p["attn"]
            attention = {
                "attn": lambda h, p=p: reading(p["attn"], None, None, at_y, lower, bias_y, h),
                "cross": lambda h, r=reader, m=memory: reading(r, m, at_x, at_y, everything, cross, h, own=False),
            }
        y = layer(options, p, y, attention | {"mlp": lambda h, p=p: mlp(p["mlp"], h, options.mlp)})
    head = table_of(params, "head")
    return capped(options, top_x @ head.T), capped(options, top(options, ys, y) @ head.T)


def learned_mixing(structure, params, inputs_S, targets_T, *, options, depth):
    """One sequence whose tokens a matrix mixes in attention's place; logits of every position. Encoder-only has inputs alone."""
    S, n = len(inputs_S), len(inputs_S) + len(targets_T)
    at = np.arange(n)
    seen = may_see(at, at, 1, options.window)
    if structure.inputs == "bidirectional":
        seen[:S, :S] = may_see(at[:S], at[:S], options.turn, options.window)
    z = np.concatenate([entering(options, params, "embedding", inputs_S, at[:S]),
                        entering(options, params, "target_embedding", targets_T, at[S:])])  # fmt: skip
    stack = params["input" if structure.encoder_only else "shared"]

    def mixing(p, h):
        v = np.einsum("td,dkh->tkh", h, p["v_DKH"])
        weights = p["mix_NAA"][:, :n, :n] * seen
        v = np.repeat(v, len(weights) // v.shape[1], axis=1)
        return out(p, np.einsum("nts,snh->tnh", weights, v))

    for index in range(depth):
        p = layer_of(stack, index)
        z = layer(options, p, z, {
            "attn": lambda h, p=p: mixing(p["attn"], h),
            "mlp": lambda h, p=p: mlp(p["mlp"], h, options.mlp),
        })  # fmt: skip
    return capped(options, top(options, stack, z) @ table_of(params, "head").T)
