"""Options of blocks and options of what is seen, together: what each promises alone holds for pairs of them."""

import functools
import math
from dataclasses import replace

import jax
import numpy as np
import pytest

import flop_counter
from lab import cost
from lab.program import loss_and_gradient, program, shapes, token_losses
from lab.serving import logits as cached_logits
from lab.serving import prefill
from lab.spec import Objective, Options
from lab.structure import ALL_TWO_STREAM, STRUCTURES
from test_seeing import MIXED, SHAPE, definition, made
from test_transformer import UNROLLED, perturbed, some_batch

PAIRS: dict[str, tuple[str, Options]] = {
    "parallel, alibi, window": ("tied_cross", Options(block="parallel", encoding="alibi", window=3)),
    "post, t5, shared layers": ("encoder_decoder", Options(norm_place="post", norm="layer", encoding="t5", share_layers=True)),
    "factors, learned": ("merged_cross", Options(embedding_width=3, tied_embeddings=False, encoding="learned")),
    "sandwich, turn": ("prefix_lm", Options(norm_place="sandwich", turn=4, logit_softcap=2.0)),
    "shared layers, mixing": ("decoder_only", replace(MIXED, share_layers=True, norm_place="sandwich", window=7)),
    "parallel, post, mixing, learned, factors": (
        "prefix_lm", replace(MIXED, block="parallel", norm_place="post", encoding="learned", embedding_width=3, turn=4)
    ),
    "geglu, sinusoidal, window": ("shared_stacks", Options(mlp="geglu", encoding="sinusoidal", window=4, positions="restart")),
    "parallel, t5, shared layers": (
        "separate-shared-same-causal", Options(block="parallel", norm_place="sandwich", encoding="t5", share_layers=True)
    ),
}  # fmt: skip
RUNS = {
    name: made(next(s for s in (*STRUCTURES.values(), *ALL_TWO_STREAM) if s.name == structure), options)
    for name, (structure, options) in PAIRS.items()
}


@pytest.mark.first(3)
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_pairs_are_their_definition_read_or_decoded(run):
    """Op by op: of whole examples, and of rows of unequal length from a cache."""
    model = program(run, UNROLLED).model
    params = perturbed(model.init(0))
    _, batch = some_batch(run)
    lengths = np.array([2, 6], np.int32)
    with jax.disable_jit():
        cache = prefill(model, params, batch.inputs[:2], lengths, room=run.objective.T)
        decoded = np.asarray(cached_logits(model, params, cache, batch.targets[:2]))
    ours = np.asarray(model(params, program(run, UNROLLED).forms[0], batch.inputs, batch.targets))
    for row, length in enumerate(lengths):
        whole = definition(run, params, batch.inputs[row], batch.targets[row])[1]
        np.testing.assert_allclose(ours[row], whole, rtol=0, atol=5e-5)
        short = definition(run, params, batch.inputs[row, :length], batch.targets[row])[1]
        np.testing.assert_allclose(decoded[row], short, rtol=0, atol=5e-5)


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_pairs_cost_what_their_programs_do(run):
    """Parameters, and FLOPs of forward and gradient, scanned and unrolled."""
    of = (run.structure, run.shape, run.options, run.objective, run.V)
    for scan in (False, True):
        p = program(run, replace(UNROLLED, attention="reference", scan=scan))
        params, batch = p.model.abstract(), shapes(p.forms, (run.batch,))
        assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == cost.parameters(*of).total
        forward = flop_counter.count(functools.partial(token_losses, p.model, p.forms[0]), params, batch)
        assert forward == run.batch * cost.forward(*of)["dense"]
        gradient = flop_counter.count(functools.partial(loss_and_gradient, p), params, batch)
        assert gradient == cost.train_step(run, run.V)["dense"]


@pytest.mark.first(1)
@pytest.mark.parametrize("name", ["shared layers, mixing", "post, t5, shared layers"])
def test_the_execution_changes_no_number_of_a_pair(name):
    """And what is counted as unused, and nothing else of the body, has no gradient."""
    run = RUNS[name]
    params = perturbed(program(run, UNROLLED).model.init(0))
    _, batch = some_batch(run)
    plain, other = (
        jax.jit(functools.partial(loss_and_gradient, program(run, e)))(params, batch)
        for e in (replace(UNROLLED, attention="reference"), replace(UNROLLED, scan=True, remat=True))
    )
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=5e-5, atol=5e-6)
    counted = cost.parameters(run.structure, run.shape, run.options, run.objective, run.V)
    mixing = plain[1][program(run, UNROLLED).model.stacks[-1]]["layers"]["attn"].get("mix_NAA")
    idle = 0 if mixing is None else int((np.asarray(mixing) == 0).sum())
    assert counted.unused == idle and counted.mixing == (0 if mixing is None else mixing.size)


@pytest.mark.parametrize(
    ("depth", "loss", "window"), [(1, "targets", 7), (1, "all", 7), (2, "all", None), (3, "targets", 3)]
)
def test_entries_that_no_depth_reads_are_idle(depth, loss, window):
    """Of one matrix for all depths, counted pair by pair: at the last depth inputs are read by targets alone, unless scored."""
    S, T, options = 6, 5, replace(MIXED, share_layers=True, window=window)
    shape = replace(SHAPE, L=depth, L_input=depth)
    of = (STRUCTURES["decoder_only"], shape, options, Objective(S=S, T=T, loss=loss), 24)
    before_last = depth > 1  # a row of each input is read there, by what targets make of it
    rows = range(S) if before_last else range(S - 1) if loss == "all" else ()
    read = {(i, j) for i in [*rows, *range(S, S + T)] for j in range(i + 1) if window is None or i - j < window}
    assert cost.parameters(*of).unused == shape.N * ((S + T) ** 2 - len(read))


def test_sharing_changes_no_count_of_uses():
    """6nd counts each use of a layer's matrices, and none of those that mix tokens."""
    for options in (MIXED, replace(MIXED, encoding="learned", embedding_width=3), Options(encoding="t5")):
        one, many = (
            cost.forward(
                STRUCTURES["decoder_only"], SHAPE, replace(options, share_layers=share), Objective(S=6, T=5), 24
            )
            for share in (True, False)
        )
        assert one == many


def test_rows_of_positions_are_as_wide_as_the_model():
    """Whatever the width of the token tables: their parameters are embedding, and no product is charged."""
    of = (STRUCTURES["decoder_only"], SHAPE)
    rest = (Objective(S=6, T=5), 24)
    for E in (None, 3):
        with_rows, without = (Options(embedding_width=E, encoding=encoding) for encoding in ("learned", "none"))
        more, less = (cost.parameters(*of, options, *rest) for options in (with_rows, without))
        assert more.embedding - less.embedding == 11 * SHAPE.D and more.body == less.body
        assert cost.forward(*of, with_rows, *rest) == cost.forward(*of, without, *rest)
