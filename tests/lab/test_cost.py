"""Counted cost against the parameter tree, a walk over the program, brute force over keys, and published figures."""

import functools
import math
from dataclasses import replace

import jax
import numpy as np
import pytest

import flop_counter
import lab.layers
from lab import cost, serving_cost
from lab.attention import attend
from lab.data.tokenizers import TOKENIZERS
from lab.execution import Execution
from lab.forms import forms
from lab.objectives import build
from lab.program import loss_and_gradient, program, shapes, token_losses
from lab.spec import Budget, Objective, Options, Run, Shape
from lab.structure import ALL_TWO_STREAM, LADDER, STRUCTURES, Structure
from runs import EVERY_STRUCTURE, TINY, legal, make_run

V = 260
REFERENCE = Execution(steps_per_dispatch=1, scan=False, attention="reference")
GROUPED = (Shape(D=12, F=20, N=4, K=2, H=6, L=3, L_input=3), Options(tied_embeddings=False))
SHAPES = {
    "multi-head": (TINY, Options()),
    "grouped-query, 3 layers": GROUPED,
    "multi-query, gelu, 1 layer": (Shape(D=8, F=16, N=3, K=1, H=4, L=1, L_input=1), Options(mlp="gelu", qk_norm=False)),
}


def grid() -> list[Run]:
    runs = []
    for structure in EVERY_STRUCTURE:
        for shape, options in SHAPES.values():
            for S, T in ((7, 4), (3, 9)) if shape == TINY else ((5, 6),):
                for loss in ("targets", "all") if shape.L > 1 and S >= T - 1 else ("targets",):
                    if not legal(structure, loss) or (structure.encoder_only and T > S):
                        continue
                    masked = "masked_lm" if structure.encoder_only else "lm"
                    objective = Objective(name=masked, S=S, T=T, loss=loss)
                    runs.append(make_run(structure, shape=shape, options=options, objective=objective))
    for structure in ALL_TWO_STREAM:
        if structure.stacks == "separate" and structure.memory == "final":
            runs.append(make_run(structure, shape=replace(TINY, L=1, L_input=3)))
    runs.append(make_run("encoder_only", shape=GROUPED[0], options=GROUPED[1]))
    return runs


def run_name(run: Run) -> str:
    o = run.objective
    return f"{run.structure.name}-{run.shape.N}{run.shape.K}-L{run.shape.L_input}{run.shape.L}-{o.S},{o.T}-{o.loss}"


@pytest.fixture(scope="module", params=grid(), ids=run_name)
def case(request) -> Run:
    return request.param


@pytest.fixture(params=[run for run in grid() if (run.shape == SHAPES["multi-head"][0] and run.objective.S == 7) or
                        run.shape.L_input != run.shape.L], ids=run_name)  # fmt: skip
def executed(request) -> Run:
    """A part of the grid, for the tests that run the model and do not only trace it."""
    return request.param


def of(run: Run):
    return run.structure, run.shape, run.options, run.objective, V


@pytest.mark.first(40)
@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_counts_equal_the_program(case: Run, scan: bool):
    if scan and case.shape.L < 3:
        pytest.skip("a scan's length shows where there are three layers")
    p = program(case, replace(REFERENCE, scan=scan))
    params = p.model.abstract()
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == cost.parameters(*of(case)).total
    batch = shapes(p.forms, (case.batch,))
    forward = flop_counter.count(lambda params, b: token_losses(p.model, p.forms[0], params, b), params, batch)
    assert forward == cost.forward(*of(case))["dense"] * case.batch
    training = flop_counter.count(lambda params, b: loss_and_gradient(p, params, b), params, batch)
    assert training == cost.train_step(case, V)["dense"]


@functools.cache
def attended_pairs(T: int, S: int, **rule) -> int:
    """Every key is perturbed in turn: the queries whose output changes attend to it."""
    rng = np.random.default_rng(0)
    q, k, v = (np.float32(rng.normal(size=(1, n, 1, 4))) for n in (T, S, S))
    out = attend(q, k, v, **rule)
    noticed = 0
    for j in range(S):
        moved_k, moved_v = k.copy(), v.copy()
        moved_k[:, j] += 0.5
        moved_v[:, j] += 1.0
        change = np.abs(attend(q, moved_k, moved_v, **rule) - out)
        noticed += int(np.any(change > 1e-4, axis=(0, 2, 3)).sum())
    return noticed


def test_exact_is_dense_less_the_pairs_that_are_not_attended(case: Run, monkeypatch):
    """The attentions that the model makes are noted while it is traced, and each one's pairs are counted by force."""
    calls = []

    def watched(q, k, v, *, causal, how, segments, turn=1, window=None, **rest):
        assert segments is None
        calls.append((q.shape[1], k.shape[1], dict(causal=causal, turn=turn, window=window)))
        return attend(q, k, v, causal=causal, how=how, turn=turn, window=window, **rest)

    monkeypatch.setattr(lab.layers, "attend", watched)
    p = program(case, REFERENCE)
    jax.eval_shape(functools.partial(token_losses, p.model, p.forms[0]), p.model.abstract(), shapes(p.forms, (1,)))
    unattended = sum(T * S - attended_pairs(T, S, **rule) for T, S, rule in calls)
    counted, pair = cost.forward(*of(case)), 4 * case.shape.N * case.shape.H
    assert counted["exact"] == counted["dense"] - pair * unattended
    assert cost.train_step(case, V)["exact"] == cost.train_step(case, V)["dense"] - 3 * case.batch * pair * unattended


@pytest.mark.first(5)
def test_unused_parameters_get_no_gradient(executed: Run):
    case = executed
    if case.structure.name not in LADDER and not (
        case.structure.stacks == "separate" and case.structure.memory == "same"
    ):
        pytest.skip("all of this structure's parameters are used, as the ladder's are")
    p = program(case, REFERENCE)
    tokens = np.random.default_rng(0).integers(0, 256, (case.batch, case.objective.length)).astype(np.int32)
    batch = build(forms(case.objective)[0], tokens, TOKENIZERS["bytes"], seed=0, first=0)
    gradient = jax.jit(functools.partial(loss_and_gradient, p))(p.model.init(1), batch)[1]
    body = {name: part for name, part in gradient.items() if name in p.model.stacks}
    idle = 0
    for leaf in map(np.asarray, jax.tree.leaves(body)):
        layers = leaf.reshape(len(leaf), -1) if leaf.ndim > 1 else leaf[None]
        idle += sum(layer.size for layer in layers if not layer.any())
    assert idle == cost.parameters(*of(case)).unused


def test_textbook_formulas_of_decoder_prefix_and_encoder_decoder():
    """structure formulas written out: L[2nW + 4Hk pairs] + head."""
    shape, options = Shape(D=16, F=24, N=4, K=2, H=4, L=3, L_input=3), Options()
    S, T = 10, 6
    n, W, kv, qo = S + T, 16 * 16 * 2 + 2 * 16 * 8 + 3 * 16 * 24, 2 * 16 * 8, 2 * 16 * 16
    head, tri = 2 * T * 16 * V, lambda a: a * (a + 1) // 2
    objective = Objective(S=S, T=T)

    def textbook(name):
        return cost.forward(STRUCTURES[name], shape, options, objective, V)["textbook"]

    assert textbook("decoder_only") == 3 * (2 * n * W + 64 * tri(n)) + head
    assert textbook("prefix_lm") == 3 * (2 * n * W + 64 * (S * S + S * T + tri(T))) + head
    assert textbook("encoder_decoder") == (
        3 * (2 * S * W + 64 * S * S) + 3 * (2 * T * W + 64 * tri(T) + 2 * T * qo + 2 * S * kv + 64 * S * T) + head
    )


def test_published_parameters_of_the_bigscience_encoder_decoder():
    """Wang et al. 2022, enc_dec_xxl.gin: 11,003,736,064, of which 4,096 are T5's relative position tables, not ours."""
    shape = Shape(D=4096, F=10240, N=64, K=64, H=64, L=24, L_input=24)
    counted = cost.parameters(
        STRUCTURES["encoder_decoder"], shape, Options(qk_norm=False), Objective(S=626, T=626), 32128
    )
    assert counted.total + 2 * 32 * 64 == 11_003_736_064


def test_published_ratio_of_encoder_decoder_to_decoder():
    """Forward cost at d=512, L=8, S=T=512, V=32k, gated: 1.141 mask-aware and 1.051 dense for step 0."""
    shape, objective = Shape(D=512, F=1365, N=8, K=8, H=64, L=8, L_input=8), Objective(S=512, T=512)
    more, less = (
        cost.forward(STRUCTURES[name], shape, Options(), objective, 32000)
        for name in ("encoder_decoder", "decoder_only")
    )
    assert more["textbook"] / less["textbook"] == pytest.approx(1.141, abs=0.002)


def test_conversations_cost_what_was_published():
    """Prefill (and total) relative to decoder-only over R turns of 128 + 256 tokens at d=1024, L=24."""

    def relative(structure: Structure, R: int, L: int = 24):
        def spent(structure, L):
            shape = Shape(D=1024, F=2731, N=16, K=16, H=64, L=L, L_input=L)
            turns = serving_cost.conversation(structure, shape, Options(), 32000, turns=R, user=128, reply=256)
            prefill, decode = sum(t.prefill for t in turns), sum(t.decode for t in turns)
            return prefill, prefill + decode, turns[-1].cache_bytes

        ours, decoder = spent(structure, L), spent(STRUCTURES["decoder_only"], 24)
        return ours[0] / decoder[0], ours[1] / decoder[1], ours[2] / 2**20

    prefix, encdec = STRUCTURES["prefix_lm"], STRUCTURES["encoder_decoder"]
    assert relative(prefix, 2)[:2] == pytest.approx((2.6, 1.5), abs=0.05)
    assert relative(prefix, 5)[:2] == pytest.approx((7.4, 3.0), abs=0.05)
    assert relative(prefix, 10)[:2] == pytest.approx((15.8, 5.6), abs=0.05)
    assert relative(prefix, 20)[:2] == pytest.approx((33.6, 11.3), abs=0.06)
    assert relative(encdec, 10) == pytest.approx((17.7, 6.3, 360), abs=0.05)
    assert relative(encdec, 10, L=12) == pytest.approx((8.8, 3.2, 180), abs=0.05)
    assert relative(replace(encdec, inputs="causal"), 10)[:2] == pytest.approx((3.2, 1.75), abs=0.05)


def test_a_budget_below_one_step_is_refused():
    run = make_run(budget=Budget(amount=10.0))
    with pytest.raises(ValueError, match=r"budget\.amount = 10 exact is less than one step"):
        cost.steps(run, V)


@pytest.mark.parametrize("unit", ["flops", "tokens", "steps"])
def test_planned_is_the_nearest_whole_number_of_steps(unit: str):
    run = make_run()
    price = cost.train_step(run, V)["exact" if unit == "flops" else unit]
    for steps, amount in ((3, 3.0 * price), (3, 3.4 * price), (4, 3.6 * price)):
        assert cost.planned(replace(run, budget=Budget(unit=unit, amount=amount)), V)["steps"] == steps


def test_cost_is_exact_far_beyond_64_bits():
    """6 N D of a large run overflows int64: ours are whole numbers of any size."""
    run = make_run(shape=Shape(D=65536, F=262144, N=512, K=512, H=128, L=200, L_input=200), batch=2**20,
                   objective=Objective(S=2**16, T=2**16), budget=Budget(unit="steps", amount=1e6))  # fmt: skip
    spent = cost.planned(run, V)
    assert spent["6nd"] == 6 * cost.parameters(*of(run)).body * spent["tokens"]
    assert spent["6nd"] > 2**63


def test_predicted_positions_name_the_labels(case: Run):
    tokens = np.zeros((2, case.objective.length), np.int32)
    assert build(forms(case.objective)[0], tokens, TOKENIZERS["bytes"], seed=0, first=0).labels.shape == (
        2,
        forms(case.objective)[0].scored,
    )
