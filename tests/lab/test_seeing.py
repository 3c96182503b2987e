"""Every option of positions and of what attends to what: against its definition in numpy, its cost against the program, and
what is refused."""

import functools
import itertools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import flop_counter
import lab.layers
import reference_models as reference
from lab import cost, seen
from lab.attention import ROWS, attend, mix
from lab.forms import forms
from lab.objectives import Batch, build, pairs
from lab.positions import alibi, sinusoidal, slopes, t5
from lab.program import loss_and_gradient, program, shapes, token_losses
from lab.seen import Rule, band
from lab.spec import Evaluation, Objective, Options, Run, Shape
from lab.structure import STRUCTURES
from runs import EVERY_STRUCTURE, make_run
from test_cost import attended_pairs
from test_transformer import BYTES, UNROLLED, logits, perturbed, some_batch

SHAPE = Shape(D=8, F=12, N=6, K=2, H=2, L=2, L_input=2)  # heads that are no power of two, and grouped
MIXED = Options(mixing="dense", encoding="none", qk_norm=False)
OPTIONS = {
    "learned": Options(encoding="learned"),
    "sinusoidal, restart": Options(encoding="sinusoidal", positions="restart"),
    "alibi": Options(encoding="alibi"),
    "t5": Options(encoding="t5"),
    "none": Options(encoding="none"),
    "window": Options(window=4),
    "turn": Options(turn=4),
    "all at once": Options(encoding="t5", window=3, turn=4),
    "mixing": MIXED,
    "mixing, learned, window, turn": replace(MIXED, encoding="learned", window=4, turn=4),
}
# In the quick suite each option meets two structures, and each structure of the ladder two options or more.
QUICK = {
    "learned": ("encoder_decoder", "encoder_only"), "sinusoidal, restart": ("tied_cross", "prefix_lm"),
    "alibi": ("encoder_decoder", "decoder_only"), "t5": ("shared_stacks", "encoder_decoder"), "none": ("decoder_only",),
    "window": ("merged_cross", "decoder_only"), "turn": ("prefix_lm", "tied_cross"),
    "all at once": ("encoder_decoder", "prefix_lm"), "mixing": ("decoder_only", "encoder_only"),
    "mixing, learned, window, turn": ("prefix_lm",),
}  # fmt: skip


def made(structure, options, **parts) -> Run:
    return make_run(structure, shape=SHAPE, options=options, **parts)


def cases(quick):
    """Every structure with every option that it can have."""
    found = []
    for structure, (name, options) in itertools.product(EVERY_STRUCTURE, OPTIONS.items()):
        try:
            run = made(structure, options)
        except ValueError:
            continue
        marks = () if structure.name in quick[name] else pytest.mark.slow
        found.append(pytest.param(run, marks=marks, id=f"{structure.name}-{name}"))
    return found


def definition(run, params, inputs, targets):
    """Logits of the inputs' and of the targets' positions."""
    structure, options, depth = run.structure, run.options, run.shape.L
    if options.mixing == "dense":
        targets = np.zeros(0, int) if structure.encoder_only else targets
        both = reference.learned_mixing(structure, params, inputs, targets, options=options, depth=depth)
        return both[: len(inputs)], both[len(inputs) :]
    if structure.encoder_only:  # the inputs of any structure of one stack
        structure, params, targets = STRUCTURES["prefix_lm"], {**params, "shared": params["input"]}, np.zeros(0, int)
    depths = run.shape.L_input, depth
    return reference.two_streams(structure, params, inputs, targets, options=options, depths=depths)


@pytest.mark.first(6)
@pytest.mark.parametrize("run", cases(QUICK))
def test_every_option_is_its_definition(run):
    """Scanned with remat where inputs are bidirectional, unrolled where they are causal."""
    scan = run.structure.inputs == "bidirectional"
    params = perturbed(program(run, UNROLLED).model.init(0))
    _, batch = some_batch(run)
    ours = logits(run, params, batch, replace(UNROLLED, scan=scan, remat=scan))
    for row in range(2):
        of_inputs, of_targets = definition(run, params, batch.inputs[row], batch.targets[row])
        theirs = of_inputs[batch.targets[row]] if run.structure.encoder_only else of_targets
        np.testing.assert_allclose(ours[row], theirs, rtol=0, atol=5e-5)


@pytest.mark.parametrize("run", cases({name: (*quick, "shared_stacks") for name, quick in QUICK.items()}))
def test_what_is_counted_is_what_there_is_and_what_is_computed(run, monkeypatch):
    """Parameters are the tree's, `dense` the program's products, `exact` less by every pair that no perturbed key shows."""
    calls = []

    def watched(q, k, v, *, causal, turn=1, window=None, **rest):
        calls.append((q.shape[1], k.shape[1], dict(causal=causal, turn=turn, window=window)))
        return attend(q, k, v, causal=causal, turn=turn, window=window, **rest)

    def watched_mix(mix_NTS, v, *, causal, turn=1, window=None, **rest):
        calls.append((*mix_NTS.shape[1:], dict(causal=causal, turn=turn, window=window)))
        return mix(mix_NTS, v, causal=causal, turn=turn, window=window, **rest)

    p = program(run, replace(UNROLLED, attention="reference"))
    V, of = run.V, (run.structure, run.shape, run.options, run.objective, run.V)
    params, batch = p.model.abstract(), shapes(p.forms, (run.batch,))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == cost.parameters(*of).total
    assert (
        flop_counter.count(functools.partial(loss_and_gradient, p), params, batch) == cost.train_step(run, V)["dense"]
    )
    monkeypatch.setattr(lab.layers, "attend", watched)
    monkeypatch.setattr(lab.layers, "mix", watched_mix)
    forward = flop_counter.count(functools.partial(token_losses, p.model, p.forms[0]), params, batch)
    assert forward == run.batch * cost.forward(*of)["dense"]
    pair = (4 if run.options.mixing == "attention" else 2) * SHAPE.N * SHAPE.H
    unattended = sum(T * S - attended_pairs(T, S, **rule) for T, S, rule in calls)
    assert cost.forward(*of)["exact"] == cost.forward(*of)["dense"] - pair * unattended


# ---- rules -------------------------------------------------------------------------------------------------------------

sizes = st.integers(1, 40)


@given(sizes, st.booleans(), st.integers(1, 9), st.none() | sizes)
def test_pairs_are_those_that_a_loop_finds(n, causal, turn, window):
    rule = Rule(causal=causal, turn=turn, window=window)
    looped = reference.may_see(range(n), range(n), turn if causal else None, window)
    assert rule.pairs(n) == looped.sum()
    np.testing.assert_array_equal(rule.mask(np.arange(n), np.arange(n)), looped)
    low, high = rule.reach(n // 3, n // 2, n)
    assert not looped[n // 3 : n // 2 + 1, :low].any() and not looped[n // 3 : n // 2 + 1, high:].any()


@given(sizes, sizes, st.none() | sizes)
def test_pairs_of_targets_are_those_that_a_loop_finds(S, T, window):
    options, behind = Options(window=window), range(S, S + T)
    for name in ("decoder_only", "tied_cross"):
        merged = STRUCTURES[name].cross == "merged"
        memory = reference.may_see(behind, range(S), 1, window).sum() if merged else S * T
        own = reference.may_see(behind, behind, 1, window).sum()
        assert cost.target_pairs(STRUCTURES[name], options, S, T) == memory + own


RULES = {
    "window": dict(causal=True, window=70),
    "window on both sides": dict(causal=False, window=9),
    "turns": dict(causal=True, turn=37),
    "turns and window": dict(causal=True, turn=100, window=45),
}


@pytest.mark.parametrize("T", [2 * ROWS + 5, ROWS + 9], ids=["square", "targets over memory and targets"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_blocks_compute_what_the_reference_does(rule, T):
    """Outputs and gradients, those of what is added to the scores among them."""
    if T <= 2 * ROWS and not rule["causal"]:
        pytest.skip("only inputs see ahead, and are square")
    S, rng = 2 * ROWS + 5, np.random.default_rng(0)
    q, k, v, along = (np.float32(rng.normal(size=(2, n, heads, 4))) for n, heads in ((T, 4), (S, 2), (S, 2), (T, 4)))
    relative_NR = np.float32(rng.normal(size=(4, 2 * S - 1)))

    def both(how):
        def projected(q, k, v, relative_NR):
            out = attend(q, k, v, how=how, relative_NR=relative_NR, **rule)
            return jnp.vdot(out, along), out

        (_, out), gradient = jax.jit(jax.value_and_grad(projected, argnums=(0, 1, 2, 3), has_aux=True))(
            q, k, v, relative_NR
        )
        return out, *gradient

    for ours, theirs in zip(both("blocked"), both("reference"), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-5)


def test_what_is_added_to_scores_is_by_distance():
    """Against a loop; `first` moves the queries along."""
    rng, N, T, S = np.random.default_rng(1), 2, 5, 7
    q, k, v = (np.float32(rng.normal(size=(1, n, N, 4))) for n in (T, S, S))
    relative_NR = np.float32(rng.normal(size=(N, 2 * 13 - 1)))
    for first in (None, S):
        start = S - T if first is None else first
        bias = np.array(
            [[[relative_NR[head, start + i - j + 12] for j in range(S)] for i in range(T)] for head in range(N)]
        )
        for how in ("reference", "blocked"):
            ours = attend(q, k, v, causal=False, how=how, relative_NR=relative_NR, first=first)
            theirs = reference.softmax_attention(q[0], k[0], v[0], np.ones((T, S), bool), bias)
            np.testing.assert_allclose(ours[0], theirs, rtol=0, atol=2e-6)


@pytest.mark.parametrize("rule", [dict(causal=True), dict(causal=False)], ids=["causal", "both sides"])
def test_blocks_outside_of_a_window_are_skipped(rule):
    """FLOPs of a window of one block grow with the length and not with its square."""
    n, window = 16 * ROWS, ROWS
    arrays = [jax.ShapeDtypeStruct((1, n, 1, 8), jnp.float32)] * 3
    whole = flop_counter.count(functools.partial(attend, how="reference", window=window, **rule), *arrays)
    cut = flop_counter.count(functools.partial(attend, how="blocked", window=window, **rule), *arrays)
    blocks = 2 if rule["causal"] else 3  # its own, the one before, the one behind
    assert whole == 4 * 8 * n * n
    assert 0.9 * blocks * ROWS * n <= cut / (4 * 8) <= blocks * ROWS * n


@pytest.mark.parametrize(
    "rule", [dict(causal=True, turn=3), dict(causal=False, window=3), dict(causal=True, relative_NR=1)]
)
def test_the_fused_kernel_is_not_asked_for_what_it_has_not(rule, monkeypatch):
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *_, **__: pytest.fail("cuDNN was called"))
    q, k, v = (jnp.asarray(np.random.default_rng(0).normal(size=(1, 6, 2, 8)), jnp.bfloat16) for _ in range(3))
    if "relative_NR" in rule:
        rule = {**rule, "relative_NR": jnp.ones((2, 11))}
    np.testing.assert_array_equal(*(attend(q, k, v, how=how, **rule) for how in ("fused", "blocked")))


def test_the_fused_kernel_has_a_causal_window(monkeypatch):
    asked = []
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda q, k, v, **given: asked.append(given) or q)
    q = jnp.zeros((1, 6, 2, 8), jnp.bfloat16)
    attend(q, q, q, causal=True, window=4, how="fused")
    # jax.nn counts the keys behind a query, we count the query too.
    assert asked == [dict(is_causal=True, implementation="cudnn", local_window_size=(3, 0))]


# ---- positions ---------------------------------------------------------------------------------------------------------


def test_slopes_are_the_papers():
    assert slopes(8) == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]  # section 3
    for heads in range(1, 40):
        np.testing.assert_allclose(slopes(heads), reference.alibi_slopes(heads), rtol=1e-12)
    distance = np.arange(-3, 4)
    np.testing.assert_allclose(alibi(distance, 8, None, ahead=True)[2], -np.abs(distance) / 8)


@pytest.mark.parametrize("ahead", [False, True])
def test_buckets_are_the_published_formula(ahead):
    distance = np.arange(-300, 301)
    table_NR = np.arange(2 * 32, dtype=np.float32).reshape(2, 32)
    expected = np.array([reference.t5_bucket(-d, ahead) for d in distance.tolist()])
    np.testing.assert_array_equal(t5(distance, 2, table_NR, ahead=ahead)[1], 32 + expected)
    assert len(set(expected.tolist())) == (32 if not ahead else 31)  # of 16 that lie ahead, distance 0 is not one


@pytest.mark.parametrize("D", [6, 7])
def test_sinusoids_are_the_papers(D):
    positions = np.array([0, 1, 7, 600, 5000])
    expected = reference.sinusoids(positions.tolist(), D)
    np.testing.assert_allclose(sinusoidal(None, positions, D)[0], expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(jax.jit(lambda at: sinusoidal(None, at, D))(positions)[0], expected, rtol=0, atol=2e-6)


# ---- gradients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "option"), [("encoder_decoder", "t5"), ("prefix_lm", "mixing, learned, window, turn")]
)
def test_the_execution_changes_no_number(name, option):
    run = made(name, OPTIONS[option])
    params = perturbed(program(run, UNROLLED).model.init(0))
    _, batch = some_batch(run)
    plain, other = (
        jax.jit(functools.partial(loss_and_gradient, program(run, e)))(params, batch)
        for e in (
            replace(UNROLLED, attention="reference"),
            replace(UNROLLED, scan=True, unroll=2, remat=True),
        )
    )
    for path, a in jax.tree_util.tree_leaves_with_path(plain):
        b = functools.reduce(lambda tree, key: tree[getattr(key, "key", getattr(key, "idx", None))], path, other)
        np.testing.assert_allclose(a, b, rtol=3e-5, atol=3e-6, err_msg=str(path))


@pytest.mark.parametrize("loss", ["targets", "all"])
def test_idle_entries_of_a_matrix_are_counted(loss):
    run = made("decoder_only", replace(MIXED, window=7), objective=Objective(S=6, T=5, loss=loss))
    params = perturbed(program(run, UNROLLED).model.init(0))
    gradient = jax.jit(functools.partial(loss_and_gradient, program(run, UNROLLED)))(params, some_batch(run)[1])[1]
    idle = int((np.asarray(gradient["shared"]["layers"]["attn"]["mix_NAA"]) == 0).sum())
    counted = cost.parameters(run.structure, run.shape, run.options, run.objective, run.V)
    assert counted.mixing == SHAPE.L * SHAPE.N * 11**2 and counted.unused == idle
    without = 6 * (counted.body - counted.mixing) * run.objective.length
    assert 3 * cost.forward(run.structure, run.shape, run.options, run.objective, run.V)["6nd"] == without


@pytest.mark.slow
@pytest.mark.parametrize("L", [2, 12])
def test_learned_mixing_trains_at_any_depth(L):
    """Targets repeat the inputs place by place, which is what a matrix can say: no loss is left."""
    shape = Shape(D=32, F=64, N=4, K=4, H=8, L=L, L_input=L)
    run = make_run(shape=shape, options=replace(MIXED, encoding="learned"), objective=Objective(S=16, T=16), batch=32)
    p = program(run, replace(UNROLLED, scan=True))
    params = p.model.init(0)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-3, b2=0.95))

    @jax.jit
    def step(params, state, batch):
        loss, gradient = loss_and_gradient(p, params, batch)
        update, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, update), state, loss

    state, rng, loss = optimizer.init(params), np.random.default_rng(0), np.inf
    for _ in range(200):
        half = rng.integers(0, 16, (32, 16)).astype(np.int32)
        batch = build(p.forms[0], np.concatenate([half, half], axis=1), BYTES, seed=0, first=0)
        params, state, loss = step(params, state, batch)
    assert loss < 0.1  # of log 16 = 2.8


# ---- padding and documents -----------------------------------------------------------------------------------------------

PADDED = Objective(name="pairs", S=7, T=6, buckets=((7, 6, 1),))


@pytest.mark.parametrize(
    ("name", "options"),
    [("encoder_decoder", OPTIONS["learned"]), ("prefix_lm", Options(encoding="t5", window=3)),
     ("tied_cross", OPTIONS["alibi"])],
)  # fmt: skip
def test_no_option_sees_padding(name, options):
    run = made(name, options, objective=PADDED)
    params = perturbed(program(run, UNROLLED).model.init(0))
    rng = np.random.default_rng(2)
    sources, targets = ([rng.integers(0, 256, n) for n in lengths] for lengths in ((7, 4, 1), (5, 2, 0)))
    ours = logits(run, params, pairs(forms(run.objective)[0], sources, targets, BYTES))
    for row, (source, target) in enumerate(zip(sources, targets, strict=True)):
        theirs = definition(run, params, source, np.array([BYTES.sep, *target]))[1]
        np.testing.assert_allclose(ours[row, -6:][: len(target) + 1], theirs, rtol=0, atol=5e-5)


@pytest.mark.parametrize("encoding", ["learned", "sinusoidal", "alibi", "t5", "none"])
def test_packed_documents_are_as_if_alone(encoding):
    run = made(
        "decoder_only", Options(encoding=encoding), objective=Objective(name="causal_lm", S=0, T=17, attended=40)
    )
    params = perturbed(program(run, UNROLLED).model.init(0))
    texts = [np.arange(10, 10 + n) for n in (5, 1, 7)]
    entering = np.concatenate([[BYTES.sep, *text] for text in texts] + [[BYTES.sep]]).astype(np.int32)[None]
    ours = logits(run, params, Batch(np.zeros((1, 0), np.int32), entering, entering))[0]
    alone = [definition(run, params, np.zeros(0, int), np.array([BYTES.sep, *text]))[1] for text in [*texts, []]]
    np.testing.assert_allclose(ours, np.concatenate(alone), rtol=0, atol=5e-5)


# ---- what is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("structure", "options", "parts", "message"),
    [
        ("decoder_only", dict(turn=3), {}, r"options\.turn = 3: turns are within bidirectional inputs"),
        ("prefix_lm", dict(turn=3), dict(objective=PADDED), r"options\.turn = 3: pairs are padded"),
        ("prefix_lm", dict(turn=1), {}, r"options\.turn = 1: use a whole number of at least 2"),
        ("decoder_only", dict(window=0), {}, r"options\.window = 0: use a whole number of at least 1"),
        ("decoder_only", dict(window=3), dict(objective=Objective(name="causal_lm", S=0, T=9, attended=9)),
         r"options\.window = 3: objective\.attended counts whole documents"),
        ("decoder_only", dict(encoding="alibi", positions="restart"), {}, "encoding 'alibi' knows no positions that could start"),
        ("decoder_only", dict(encoding="absolute"), {}, "use one of rope, learned, sinusoidal, alibi, t5, none"),
        ("prefix_lm", dict(encoding="learned", positions="restart"), dict(evaluation=Evaluation(examples=16, splits=(2, 9))),
         "a stream of 9 tokens has more positions than the 6 that are learned"),
        ("encoder_decoder", vars(MIXED), {}, r"structure encoder_decoder has tokens of one stream read another's"),
        ("shared_stacks", vars(MIXED), {}, "a matrix mixes one sequence"),
        ("decoder_only", vars(MIXED), dict(objective=PADDED), "pairs has rows of several lengths"),
        ("decoder_only", vars(MIXED) | dict(encoding="rope"), {}, "has no queries and keys, its matrices know positions"),
        ("decoder_only", vars(MIXED) | dict(qk_norm=True), {}, r"options\.qk_norm = True: mixing='dense' has no queries"),
        ("decoder_only", vars(MIXED), dict(evaluation=Evaluation(examples=16, splits=(4,))), "was trained with 6 inputs"),
    ],
)  # fmt: skip
def test_what_can_not_be_is_refused_with_the_reason(structure, options, parts, message):
    with pytest.raises(ValueError, match=message):
        made(structure, Options(**options), **parts)


def test_every_option_fits_most_structures():
    """Turns are for the 13 with bidirectional inputs, matrices for the three of one sequence; all else for all 25."""
    fitting = {name: 0 for name in OPTIONS}
    for name, options in OPTIONS.items():
        for structure in EVERY_STRUCTURE:
            try:
                fitting[name] += bool(made(structure, options))
            except ValueError:
                continue
    bidirectional = sum(s.inputs == "bidirectional" for s in EVERY_STRUCTURE)
    assert [fitting[name] for name in OPTIONS] == [25] * 6 + [bidirectional] * 2 + [3, 2] and bidirectional == 13


def test_places_are_those_of_the_longest_form():
    objective = Objective(name="prefix_lm", S=4, T=6, splits=(2, 7))
    assert seen.places(objective, Options()) == 10 and seen.places(objective, Options(positions="restart")) == 8
    assert seen.places(forms(objective)[1], Options()) == 10 and band(4, 2) == 7
