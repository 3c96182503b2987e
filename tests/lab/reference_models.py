"""Independent float64 numpy models: ordinary transformers on one concatenated sequence, and the two streams by definition.

Nothing here is shared with the lab but the parameter tree's names. Letters as in lab.transformer.
"""

import math

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


def two_streams(structure, params, inputs_S, targets_T, *, restart=False, encoding="rope", window=None, turn=None):
    """The definition of every structure, stream by stream: logits of the inputs' and of the targets' positions."""
    tables = {k: np.asarray(v, np.float64) for k, v in params.items() if k.endswith(("VD", "AD"))}
    table = tables["embedding_VD"]
    scale = np.sqrt(table.shape[1])
    x, y = table[inputs_S] * scale, tables.get("target_embedding_VD", table)[targets_T] * scale
    S, T = len(x), len(y)
    at_x, at_y = np.arange(S), np.arange(T) + (0 if restart else S)
    if encoding == "learned":
        x, y = x + tables["place_AD"][at_x] * scale, y + tables["place_AD"][at_y] * scale
    elif encoding == "sinusoidal":
        x, y = x + sinusoids(at_x, x.shape[1]), y + sinusoids(at_y, x.shape[1])
    behind = np.arange(S, S + T)  # where targets stand, wherever their positions start
    lower = may_see(behind, behind, 1, window)
    everything = np.ones((T, S), bool) if structure.cross != "merged" else may_see(behind, at_x, 1, window)
    seen_x = may_see(at_x, at_x, 1 if structure.inputs == "causal" else turn, window)
    xs, ys = (params["shared"],) * 2 if "shared" in params else (params["input"], params["target"])
    norm_x, norm_y = (np.asarray(stack["norm_D"], np.float64) for stack in (xs, ys))

    N, ahead = ys["layers"]["attn"]["q_DNH"].shape[2], structure.inputs == "bidirectional"
    bias_x = added(encoding, xs.get("relative_NR"), at_x, at_x, N, ahead)
    of_y = (encoding, ys.get("relative_NR"))
    ahead = ahead and xs is ys
    bias_y, to_x = added(*of_y, behind, behind, N, ahead), added(*of_y, behind, at_x, N, ahead)
    cross = to_x if encoding == "alibi" else None

    entering = []  # the input stream as it enters each layer, after that layer's attention norm
    for index in range(depth_of(xs)):
        p = layer_of(xs, index)
        h = norm(x, p["attn_norm_D"])
        entering.append(h)
        q, k, v = (project(p["attn"], h, at_x, which, encoding) for which in "qkv")
        x = x + out(p["attn"], softmax_attention(q, k, v, seen_x, bias_x))
        x = x + mlp(p["mlp"], norm(x, p["mlp_norm_D"]))
    top = norm(x, norm_x)

    for index in range(depth_of(ys)):
        p = layer_of(ys, index)
        memory = top if structure.memory == "final" else entering[index]
        h = norm(y, p["attn_norm_D"])
        q, k, v = (project(p["attn"], h, at_y, which, encoding) for which in "qkv")
        if structure.cross == "merged":
            k = np.concatenate([project(p["attn"], memory, at_x, "k", encoding), k])
            v = np.concatenate([project(p["attn"], memory, at_x, "v"), v])
            seen, bias = np.concatenate([everything, lower], axis=1), np.concatenate([to_x, bias_y], axis=2)
            y = y + out(p["attn"], softmax_attention(q, k, v, seen, bias))
        else:
            y = y + out(p["attn"], softmax_attention(q, k, v, lower, bias_y))
            reader = p["cross"] if structure.cross == "separate" else p["attn"]
            q = project(reader, norm(y, p["cross_norm_D"]), at_y, "q", encoding)
            k, v = (project(reader, memory, at_x, which, encoding) for which in "kv")
            y = y + out(reader, softmax_attention(q, k, v, everything, cross))
        y = y + mlp(p["mlp"], norm(y, p["mlp_norm_D"]))
    head = tables.get("head_VD", table)
    return top @ head.T, norm(y, norm_y) @ head.T


def learned_mixing(structure, params, inputs_S, targets_T=(), *, window=None, turn=None):
    """One sequence whose tokens a matrix mixes in attention's place; logits of every position. Encoder-only has inputs alone."""
    table = np.asarray(params["embedding_VD"], np.float64)
    tokens, S = [*inputs_S, *targets_T], len(inputs_S)
    n, D = len(tokens), table.shape[1]
    seen = may_see(np.arange(n), np.arange(n), 1, window)
    if structure.inputs == "bidirectional":
        seen[:S, :S] = may_see(np.arange(S), np.arange(S), turn, window)
    z, stack = table[tokens] * np.sqrt(D), params["input" if structure.encoder_only else "shared"]
    if "place_AD" in params:
        z = z + np.asarray(params["place_AD"], np.float64)[:n] * np.sqrt(D)
    for index in range(depth_of(stack)):
        p = layer_of(stack, index)
        v = np.einsum("td,dkh->tkh", norm(z, p["attn_norm_D"]), p["attn"]["v_DKH"])
        weights = p["attn"]["mix_NAA"][:, :n, :n] * seen
        v = np.repeat(v, len(weights) // v.shape[1], axis=1)
        z = z + out(p["attn"], np.einsum("nts,snh->tnh", weights, v))
        z = z + mlp(p["mlp"], norm(z, p["mlp_norm_D"]))
    return norm(z, np.asarray(stack["norm_D"], np.float64)) @ table.T
