"""Each optimizer's update, written out a second time from its source: numpy, float64, one matrix or vector at a time.

A reference takes (h, t, rate, blocks, gradients, states, kinds) and returns the new blocks; t counts from 1, `states` are dicts
of its own, one for each block, and kinds are "matrix" (of a layer: decays), "table" (token tables) and "vector". Gradients are
clipped already.
"""

import math

import numpy as np


def each(one):
    """A reference from the update of one block."""

    def all_of_them(h, t, rate, blocks, gradients, states, kinds):
        return [one(h, t, rate, *block) for block in zip(blocks, gradients, states, kinds, strict=True)]

    return all_of_them


def decay(h, p, kind):
    return h["weight_decay"] * p if kind == "matrix" else 0.0


def moments(s, g, beta1, beta2):
    s["m"] = beta1 * s.get("m", 0.0) + (1 - beta1) * g
    s["v"] = beta2 * s.get("v", 0.0) + (1 - beta2) * g**2
    return s["m"], s["v"]


def adam_direction(h, t, g, s, beta1="beta1", beta2="beta2", eps="eps"):
    m, v = moments(s, g, h[beta1], h[beta2])
    return m / (1 - h[beta1] ** t) / (np.sqrt(v / (1 - h[beta2] ** t)) + h[eps])


def rms(x):
    return math.sqrt(float(np.mean(x**2)))


@each
def adamw(h, t, rate, p, g, s, kind):
    return p - rate * (adam_direction(h, t, g, s) + decay(h, p, kind))


@each
def nadamw(h, t, rate, p, g, s, kind):
    m, v = moments(s, g, h["beta1"], h["beta2"])
    ahead = h["beta1"] * m / (1 - h["beta1"] ** (t + 1)) + (1 - h["beta1"]) * g / (1 - h["beta1"] ** t)
    return p - rate * (ahead / (np.sqrt(v / (1 - h["beta2"] ** t)) + h["eps"]) + decay(h, p, kind))


@each
def cautious_adamw(h, t, rate, p, g, s, kind):
    u = adam_direction(h, t, g, s)
    mask = np.where(np.sign(u) == np.sign(g), 1.0, 0.0)
    return p - rate * (u * mask / max(mask.mean(), h["least_share"]) + decay(h, p, kind))


@each
def adamw_scale(h, t, rate, p, g, s, kind):
    return p - rate * (max(rms(p), h["least_rms"]) * adam_direction(h, t, g, s) + decay(h, p, kind))


@each
def adafactor(h, t, rate, p, g, s, kind):
    beta = 1 - t ** -h["decay_exponent"]
    square = g**2 + h["eps"]
    if kind == "vector":
        s["v"] = beta * s.get("v", 0.0) + (1 - beta) * square
        v = s["v"]
    else:  # algorithm 4: sums, where the code has means
        s["r"] = beta * s.get("r", 0.0) + (1 - beta) * square.sum(axis=1)
        s["c"] = beta * s.get("c", 0.0) + (1 - beta) * square.sum(axis=0)
        v = np.outer(s["r"], s["c"]) / s["r"].sum()
    u = g / np.sqrt(v)
    u = u / max(1.0, rms(u) / h["clip_update"])
    return p - rate * (max(h["least_rms"], rms(p)) * u + decay(h, p, kind))


@each
def lion(h, t, rate, p, g, s, kind):
    m = s.get("m", np.zeros_like(p))
    direction = np.sign(h["beta1"] * m + (1 - h["beta1"]) * g)
    s["m"] = h["beta2"] * m + (1 - h["beta2"]) * g
    return p - rate * (direction + decay(h, p, kind))


def estimated_diagonal(p):
    """What the tests hand to Sophia as the Hessian's diagonal: of both signs, and some nearly 0."""
    return np.linspace(-0.3, 2.0, p.size).reshape(p.shape)


@each
def sophia(h, t, rate, p, g, s, kind):
    s["m"] = h["beta1"] * s.get("m", 0.0) + (1 - h["beta1"]) * g
    if (t - 1) % h["interval"] == 0:
        s["h"] = h["beta2"] * s.get("h", 0.0) + (1 - h["beta2"]) * s["diagonal"]
    p = p - rate * decay(h, p, kind)
    return p - rate * np.clip(s["m"] / np.maximum(h["gamma"] * s["h"], h["eps"]), -1, 1)


@each
def muon(h, t, rate, p, g, s, kind):
    if kind != "matrix":
        return p - h["adam_rate"] * rate * adam_direction(h, t, g, s, "adam_beta1", "adam_beta2", "adam_eps")
    s["m"] = h["beta1"] * s.get("m", 0.0) + (1 - h["beta1"]) * g
    x = (1 - h["beta1"]) * g + h["beta1"] * s["m"]
    # The polynomial acts on singular values alone, so it is taken of them.
    left, values, right = np.linalg.svd(x / (np.linalg.norm(x) + h["eps"]), full_matrices=False)
    for _ in range(int(h["iterations"])):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return p - rate * (h["rms"] * math.sqrt(max(p.shape)) * (left * values) @ right + decay(h, p, kind))


@each
def soap(h, t, rate, p, g, s, kind):
    if kind != "matrix":
        return p - rate * adam_direction(h, t, g, s)
    beta, sides = h["shampoo_beta"], (g @ g.T, g.T @ g)
    update = 0.0
    if t > 1:  # in the basis of the gradients before this one
        s["m"] = h["beta1"] * s["m"] + (1 - h["beta1"]) * g
        left, right = s["bases"]
        s["v"] = h["beta2"] * s["v"] + (1 - h["beta2"]) * (left.T @ g @ right) ** 2
        m = left.T @ s["m"] @ right / (1 - h["beta1"] ** (t - 1))
        v = s["v"] / (1 - h["beta2"] ** (t - 1))
        update = left @ (m / (np.sqrt(v) + h["eps"])) @ right.T
        s["sides"] = [beta * old + (1 - beta) * new for old, new in zip(s["sides"], sides, strict=True)]
        if (t - 1) % h["interval"] == 0:
            orders = []
            for i, (side, basis) in enumerate(zip(s["sides"], s["bases"], strict=True)):
                order = np.argsort(-np.diag(basis.T @ side @ basis))
                s["bases"][i] = np.linalg.qr(side @ basis[:, order])[0]
                orders.append(order)
            s["v"] = s["v"][np.ix_(*orders)]
    else:
        s["m"], s["v"], s["sides"] = np.zeros_like(p), np.zeros_like(p), [(1 - beta) * side for side in sides]
        s["bases"] = [np.linalg.eigh(side)[1][:, ::-1] for side in s["sides"]]
    return p - rate * (update + decay(h, p, kind))


@each
def schedule_free_adamw(h, t, rate, p, g, s, kind):
    """p is y; x, which the code does not keep, is kept here."""
    x, z = s.get("x", p), s.get("z", p)
    s["v"] = h["beta2"] * s.get("v", 0.0) + (1 - h["beta2"]) * g**2
    u = g / (np.sqrt(s["v"] / (1 - h["beta2"] ** t)) + h["eps"]) + decay(h, p, kind)
    s["highest"] = max(s.get("highest", 0.0), rate)
    s["total"] = s.get("total", 0.0) + s["highest"] ** h["weight_power"]
    share = s["highest"] ** h["weight_power"] / s["total"]
    s["z"] = z - rate * u
    s["x"] = (1 - share) * x + share * s["z"]
    return h["beta1"] * s["x"] + (1 - h["beta1"]) * s["z"]


@each
def ademamix(h, t, rate, p, g, s, kind):
    m, v = moments(s, g, h["beta1"], h["beta2"])
    risen = min(1.0, t / (h["slow_warmup"] * h["steps"]))
    # Half-lives rise evenly: of a beta, ln 0.5 / ln beta.
    low, high = (math.log(0.5) / math.log(h[name]) for name in ("beta1", "beta3"))
    beta3 = min(0.5 ** (1 / ((1 - risen) * low + risen * high)), h["beta3"])
    s["slow"] = beta3 * s.get("slow", 0.0) + (1 - beta3) * g
    top = m / (1 - h["beta1"] ** t) + risen * h["alpha"] * s["slow"]
    return p - rate * (top / (np.sqrt(v / (1 - h["beta2"] ** t)) + h["eps"]) + decay(h, p, kind))


def prodigy(h, t, rate, blocks, gradients, states, kinds):
    whole = states[0]  # what belongs to all of them
    d, d0 = whole.get("d", h["d0"]), h["d0"]
    step = d * rate * math.sqrt(1 - h["beta2"] ** t) / (1 - h["beta1"] ** t)
    along = 0.0
    for p, g, s in zip(blocks, gradients, states, strict=True):
        along += float((g * (s.setdefault("start", p) - p)).sum())
        s["sums"] = h["beta3"] * s.get("sums", 0.0) + d / d0 * step * g
        moments(s, d * g, h["beta1"], h["beta2"])
    whole["numerator"] = h["beta3"] * whole.get("numerator", 0.0) + d / d0 * step * along
    estimate = whole["numerator"] / sum(float(np.abs(s["sums"]).sum()) for s in states)
    whole["d"] = max(d, h["d_coefficient"] * estimate)
    return [
        p - step * (s["m"] / (np.sqrt(s["v"]) + whole["d"] * h["eps"]) + decay(h, p, kind))
        for p, s, kind in zip(blocks, states, kinds, strict=True)
    ]


REFERENCES = {
    "adamw": adamw, "nadamw": nadamw, "cautious_adamw": cautious_adamw, "adamw_scale": adamw_scale, "adafactor": adafactor,
    "lion": lion, "sophia_g": sophia, "sophia_h": sophia, "muon": muon, "soap": soap,
    "schedule_free_adamw": schedule_free_adamw, "ademamix": ademamix, "prodigy": prodigy,
}  # fmt: skip
