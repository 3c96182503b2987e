"""Techniques: each against its paper's formula written anew, a plain run where its settings do nothing, and what it is
charged."""

import contextlib
from dataclasses import replace
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab import calibrate, cost, generations, reference_times
from lab.compiled import compiled
from lab.data import describe
from lab.data.packed import causal_lm
from lab.ledger import Ledger, method_of
from lab.method import Method, Moment
from lab.optimizers import hyperparameters
from lab.program import loss_and_gradient, program, reported, token_losses, train_step
from lab.spec import Budget, Evaluation, Objective, Optimizer, Seed, from_json, to_json
from lab.structure import Structure
from lab.technique import TECHNIQUES, Technique
from lab.train import train
from runs import TINY, make_run, name_of
from technique_runs import DEEP, ONE, TWO, deep_run, some_batch, technique

# ---- settings ----------------------------------------------------------------------------------------------------------


def test_every_technique_has_settings_and_a_method():
    for name, entry in TECHNIQUES.items():
        assert issubclass(entry.method, Method)
        run = make_run(technique=Technique(name=name))
        assert from_json(to_json(run)) == run and run.run_id != make_run().run_id
        assert to_json(run)["technique"]["settings"] == {k: s.value for k, s in entry.settings.items()}
        assert make_run(technique=Technique(name=name, charged=False)).run_id != run.run_id


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: technique("staking"), "did you mean 'stacking'"),
        (lambda: technique("stacking", frist=0.1), r"unknown key technique\.settings\.frist: did you mean 'first'"),
        (lambda: technique("nothing", beta=1.0), "nothing has none"),
        (lambda: technique("stacking", doublings=1.5), "use a whole number"),
        (lambda: technique("stacking", first=0.4), "use rising shares"),
        (lambda: technique("layer_dropping", theta=1.5), r"settings\.theta = 1\.5: use a number in \[0, 1\]"),
        (lambda: technique("rho_loss", holdout_share=0.0), "give its training a share"),
        (lambda: Technique(name="ema", charged=1), "use true or false"),  # pyright: ignore[reportArgumentType]
        (lambda: Ledger(make_run(technique=technique("stacking")), 260), r"shape\.L = 2: .*use a multiple of 4"),
        (lambda: make_run(technique=technique("rho_loss"), optimizer=Optimizer(name="sophia_g", learning_rate=1e-3)),
         "extra pass comes at steps"),
        (lambda: make_run(technique=technique("selective_backprop"),
                          objective=Objective(name="prefix_lm", S=6, T=5, splits=(3, 6))), "examples of one form"),
        (lambda: program(make_run(technique=technique("layer_dropping")), ONE, pack=2), "what layer_dropping skips"),
    ],
)  # fmt: skip
def test_what_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---- the plain run is the same -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "of",
    [
        technique("nothing"), technique("stacking", doublings=0), technique("layer_dropping", theta=1.0),
        technique("rho_loss", mega_batch=1, holdout_share=0.0),
    ],
    ids=lambda of: of.name,
)  # fmt: skip
def test_settings_that_do_nothing_are_the_plain_program(of):
    plain, run = make_run(), make_run(technique=of)
    assert program(run, ONE) == program(plain, ONE)
    assert cost.planned(run, run.V) == cost.planned(plain, plain.V)
    ledger, other = Ledger(run, run.V), Ledger(plain, plain.V)
    while ledger.fits:
        assert ledger.share_in_step == other.share_in_step and not ledger.method.feed(ledger.moment)
        assert ledger.method.examples(ledger.steps) == other.method.examples(other.steps)
        ledger.charge()
        other.charge()
    assert not other.fits


@pytest.mark.parametrize(
    "of",
    [
        pytest.param(technique("ema", decay=0.0), marks=pytest.mark.slow, id="ema"),
        pytest.param(technique("lawa", window=1), marks=pytest.mark.slow, id="lawa"),
        pytest.param(technique("selective_backprop", beta=0.0), id="selective_backprop"),
    ],
)
def test_settings_that_do_nothing_end_in_the_same_bits(of, tmp_path):
    """A program of their own, and the same numbers."""
    plain = train(deep_run(), tmp_path / "plain", execution=TWO)["outcome"]
    ended = train(deep_run(technique=of), tmp_path / "other", execution=TWO)["outcome"]
    assert ended["parameter_hash"] == plain["parameter_hash"] and ended["loss"] == plain["loss"]


# ---- what is charged ---------------------------------------------------------------------------------------------------

CHARGED = {
    "stacking": technique("stacking"),
    "layer_dropping": technique("layer_dropping", gamma=20.0),
    "rho_loss": technique("rho_loss"),
    "ema": technique("ema"),
    "lawa": technique("lawa"),
}


@given(st.sampled_from(sorted(CHARGED)), st.sampled_from(["flops", "tokens", "steps"]), st.floats(8, 60), st.booleans(),
       st.sampled_from(["decoder_only", "encoder_decoder"]), st.integers(0, 5))  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_what_is_planned_is_spent(name, unit, amount, charged, structure, seed):
    run = make_run(structure, shape=DEEP, technique=replace(CHARGED[name], charged=charged))
    run = replace(run, seed=replace(run.seed, data=seed))
    price = cost.prices(run, run.V)[0]["exact" if unit == "flops" else unit]
    run = replace(run, budget=Budget(unit=unit, amount=amount * price))
    ledger, most_of_step = Ledger(run, run.V), 0.0
    while ledger.fits:
        most_of_step = max(most_of_step, ledger.price[ledger.unit])
        ledger.charge()
    assert ledger.spent == cost.planned(run, run.V) and ledger.steps == cost.steps(run, run.V)
    assert abs(ledger.spent[ledger.unit] - run.budget.amount) <= 0.5 * most_of_step + 1e-9 * run.budget.amount


def test_without_a_charge_each_update_is_a_plain_one():
    price = cost.prices(deep_run(), 260)[0]["exact"]
    for of in (*CHARGED.values(), technique("selective_backprop")):
        run = deep_run(technique=replace(of, charged=False), budget=Budget(amount=40.0 * price))
        assert cost.planned(run, run.V)["exact"] == 40 * price and cost.planned(run, run.V)["steps"] == 40


def test_every_operation_of_a_run_is_among_those_that_are_calibrated():
    for of in (None, *CHARGED.values(), technique("selective_backprop")):
        for structure in ("decoder_only", "encoder_decoder"):
            run = deep_run(structure, technique=of, budget=Budget(unit="steps", amount=60))
            ledger = Ledger(run, run.V)
            known = {(stage, o.kind, o.examples, o.active and (o.active.targets, o.active.all_inputs))
                     for stage, o in ledger.method.every()}  # fmt: skip
            full = (DEEP.L, DEEP.L_input)
            while ledger.fits:
                at = ledger.moment
                for o in (*ledger.method.charges(at), *ledger.method.settled(at)):
                    layers = o.active and (o.active.targets, o.active.all_inputs)
                    layers = None if layers == full else layers
                    assert any((k[1], k[2], k[3]) == (o.kind, o.examples, layers) for k in known)
                ledger.charge()
                ledger.settle(True)


# ---- stacking ----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 3), st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_generations_are_taken_apart_and_put_together(doublings, base):
    depth = base * 2**doublings
    tree = {"embedding_VD": np.ones(3), "shared": {"layers": {"a": np.arange(depth)}, "norm_D": np.ones(2)}}
    parts = generations.split(tree, doublings)
    sizes = [len(part["shared"]["layers"]["a"]) for part in parts]
    assert sizes == [base, *(base * 2**i for i in range(doublings))]
    assert ["embedding_VD" in part for part in parts] == [True] + [False] * doublings
    whole = generations.join(parts)
    assert np.array_equal(whole["shared"]["layers"]["a"], tree["shared"]["layers"]["a"]) and whole.keys() == tree.keys()


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
def test_layers_that_join_are_copies_and_take_a_first_step(optimizer):
    """Of the layers that joined the update is that of an optimizer that has just begun; of the others that of one that has
    gone on. Both optimizers are run here by themselves, on the same gradient."""
    run = make_run(technique=technique("stacking", doublings=1), shape=DEEP,
                   optimizer=Optimizer(name=optimizer, learning_rate=0.01, clip=0.5))  # fmt: skip
    small, large = (program(run, ONE, stage=stage) for stage in (0, 1))
    hyper, rate = hyperparameters(run.optimizer, steps=9, seed=0), jnp.float32(0.01)
    state = compiled(small).init(0)
    assert np.array_equal(np.asarray(state["params"]["shared"]["layers"]["attn"]["q_DNH"]),
                          program(make_run(shape=DEEP), ONE).model.init(0)["shared"]["layers"]["attn"]["q_DNH"][:2])  # fmt: skip
    step = jax.jit(lambda state, batch: train_step(small, state, batch, hyper, rate)[0])
    for i in range(3):
        state = step(state, some_batch(run, 4, i))
    grown = compiled(large).enter(state, 0)
    for leaf, of in zip(*(jax.tree.leaves(s["params"]["shared"]["layers"]) for s in (grown, state)), strict=True):
        assert np.array_equal(leaf, np.concatenate([of, of]))
    batch = some_batch(run, 4, 9)
    after, _, norm = jax.jit(lambda s, b: train_step(large, s, b, hyper, rate))(grown, batch)
    _, gradient = jax.jit(lambda params, b: loss_and_gradient(large, params, b))(grown["params"], batch)
    assert float(norm) > 0.5
    gradient = jax.tree.map(lambda g: g * 0.5 / norm, gradient)  # clipped as one

    @jax.jit
    def alone(params, gradient, inner):
        from lab.optimizers import OPTIMIZERS

        made = OPTIMIZERS[optimizer]({**hyper, "clip": np.float32(1e9)}, rate, None)
        update, _ = made.update(gradient, made.init(params) if inner is None else inner, params)
        return jax.tree.map(jnp.add, params, update)

    old, new = (
        alone(p, g, inner)
        for p, g, inner in zip(generations.split(grown["params"], 1), generations.split(gradient, 1),
                               (state["optimizer"], None), strict=True)
    )  # fmt: skip
    for wanted, got in zip((old, new), generations.split(after["params"], 1), strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-7), wanted, got)
    if optimizer == "adamw":  # by hand: entries of a first step by Adam are the rate's size, where decay is taken out
        moved = (
            after["params"]["shared"]["layers"]["mlp_norm_D"][2:]
            - grown["params"]["shared"]["layers"]["mlp_norm_D"][2:]
        )
        large_g = np.abs(np.asarray(gradient["shared"]["layers"]["mlp_norm_D"][2:])) > 1e-6
        np.testing.assert_allclose(np.abs(np.asarray(moved))[large_g], 0.01, rtol=0.02)
    assert jax.tree.structure(after) == jax.tree.structure(compiled(large).state)


def test_depth_doubles_at_its_shares_of_what_is_spent():
    price = cost.prices(deep_run(), 260)[0]["exact"]
    run = deep_run(technique=technique("stacking"), budget=Budget(amount=100.0 * price))
    ledger, at = Ledger(run, run.V), []
    while ledger.fits:
        at.append((ledger.stage, ledger.share))
        ledger.charge()
    assert [min(share for stage, share in at if stage == s) for s in (0, 1, 2)] == pytest.approx(
        [0, 0.125, 0.3], abs=0.01
    )
    assert max(share for stage, share in at if stage == 0) < 0.125 < 0.3 <= min(s for stage, s in at if stage == 2)


class Killed(BaseException):
    """Stands for a process that is gone."""


def killed_after(step):
    def progress(done, steps, loss, speed):
        if done >= step:
            raise Killed

    return progress


@pytest.mark.parametrize(
    "name",
    ["stacking", *(pytest.param(name, marks=pytest.mark.slow) for name in ("selective_backprop", "rho_loss"))],
)
def test_killed_and_resumed_ends_in_the_same_bits(name, tmp_path):
    """Before a boundary, at it, and behind it: stacking's lie at steps 2 and 4 of 8 here; schedule-free averages cross it too.
    Each stage is compiled under the lock."""
    locked: list[str] = []

    def lock(key):
        locked.append(key)
        return contextlib.nullcontext()

    optimizer = Optimizer(name="schedule_free_adamw", learning_rate=3e-3, schedule="constant")
    of = technique(name, **({"first": 0.2, "second": 0.4} if name == "stacking" else {}))
    run = deep_run(technique=of, evaluation=Evaluation(examples=16, times=2),
                   optimizer=optimizer if name == "stacking" else Optimizer(learning_rate=3e-3))  # fmt: skip
    whole = train(run, tmp_path / "whole", execution=TWO, compile_lock=lock)
    assert locked == [program(run, TWO, stage=stage).key for stage in range(len(method_of(run).stages))]
    for step in (1, 2, 5):
        with contextlib.suppress(Killed):
            train(run, tmp_path / "killed", execution=TWO, checkpoint_seconds=0, on_progress=killed_after(step))
    again = train(run, tmp_path / "killed", execution=TWO)
    assert again["outcome"] == whole["outcome"] and again["measured"]["attempts"] >= 2
    assert whole["status"] == "done" and (name == "selective_backprop" or whole["outcome"]["spent"] == whole["planned"])


@pytest.mark.slow
@pytest.mark.parametrize("name", list(TECHNIQUES))
def test_packed_documents_have_no_inputs_and_their_checkpoints_are_read_back(name, tmp_path):
    """A technique's state follows the batch, of which one array has no numbers here; checkpoints refuse such."""
    base = make_run("decoder_only", shape=DEEP)
    run = replace(base, data=describe("markov").data, objective=causal_lm(describe("markov").data, 16),
                  evaluation=Evaluation(examples=16), technique=technique(name))  # fmt: skip
    whole = train(run, tmp_path / "whole", execution=TWO)
    with contextlib.suppress(Killed):
        train(run, tmp_path / "killed", execution=TWO, checkpoint_seconds=0, on_progress=killed_after(3))
    assert train(run, tmp_path / "killed", execution=TWO)["outcome"] == whole["outcome"] and whole["status"] == "done"


# ---- layer dropping ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("depth", "mean"), [(16, 11.75), (12, 8.75)])
def test_mean_active_layers(depth, mean):
    """Published, once p_max is at 0.5."""
    method = method_of(make_run(shape=replace(TINY, L=depth, L_input=depth), technique=technique("layer_dropping")))
    kept = np.array([method.kept(Moment(step, 0, 0, 1.0))["targets"] for step in range(20_000)])  # pyright: ignore
    assert kept.sum(axis=1).mean() == pytest.approx(mean, abs=0.05)
    np.testing.assert_allclose(kept.mean(axis=0), 1 - 0.5 * np.arange(1, depth + 1) / depth, atol=0.015)
    assert method.most(0.0) == 0.0 and method.most(0.05) == pytest.approx(0.5 * (1 - np.exp(-5)))  # pyright: ignore


SEPARATE = Structure(cross="merged", stacks="separate", memory="same", inputs="bidirectional")


@pytest.mark.parametrize(
    ("structure", "loss", "scan"),
    [
        ("decoder_only", "targets", True),
        pytest.param("decoder_only", "all", False, marks=pytest.mark.slow),
        pytest.param("encoder_decoder", "targets", False, marks=pytest.mark.slow),
        pytest.param(SEPARATE, "targets", True, marks=pytest.mark.slow),
    ],
    ids=name_of,
)
def test_a_skipped_layer_is_not_there(structure, loss, scan):
    """Losses and gradients are those of the model that has the other layers only, of which the last is here always one."""
    run = make_run(structure, shape=DEEP, technique=technique("layer_dropping"))
    run = replace(run, objective=replace(run.objective, loss=loss))
    p = program(run, replace(ONE, scan=scan))
    small = program(replace(run, technique=None, shape=replace(DEEP, L=2, L_input=2)), replace(ONE, scan=scan))
    params, kept = p.model.init(0), np.array([False, True, False, True])
    stacks = [name for name, branch in params.items() if isinstance(branch, dict)]
    cut = {name: {**branch, "layers": jax.tree.map(lambda leaf: leaf[kept], branch["layers"])} if name in stacks else branch
           for name, branch in params.items()}  # fmt: skip
    batch, keep = some_batch(run, 4), {"inputs": jnp.array(kept), "targets": jnp.array(kept)}
    loss_of, gradient = jax.jit(lambda q: loss_and_gradient(p, q, batch, keep=keep))(params)
    wanted, of_small = jax.jit(lambda q: loss_and_gradient(small, q, batch))(cut)
    assert float(loss_of) == pytest.approx(float(wanted), rel=1e-6)
    for name in stacks:
        for g, w in zip(
            jax.tree.leaves(gradient[name]["layers"]), jax.tree.leaves(of_small[name]["layers"]), strict=True
        ):
            np.testing.assert_allclose(g[kept], w, rtol=2e-4, atol=1e-6)
            assert not np.asarray(g)[~kept].any()
    priced = cost.forward(run.structure, run.shape, run.options, run.objective, run.V, cost.Active(2, 1, True))
    smaller = small.model.shape
    assert priced == cost.forward(run.structure, smaller, run.options, run.objective, run.V)


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scan"])
def test_the_skip_is_a_branch(scan):
    """In the program every layer's products are in a branch of a conditional, the other of which has none."""
    run = make_run(shape=DEEP, technique=technique("layer_dropping"))
    p = program(run, replace(ONE, scan=scan))

    def of(params, keep):
        form = p.forms[0]
        return token_losses(p.model, form, {**params, "keep": {"inputs": keep, "targets": keep}}, some_batch(run, 4))

    def count(jaxpr, inside=False):
        """Products in no conditional; conditionals with an empty branch."""
        products, empty = 0, 0
        for e in jaxpr.eqns:
            products += e.primitive.name == "dot_general" and not inside
            if e.primitive.name == "cond":
                branches = [sum("dot_general" in str(q) for q in branch.jaxpr.eqns) for branch in e.params["branches"]]
                empty += min(branches) == 0 < max(branches)
                continue
            for value in jax.tree.leaves(e.params, is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    more, there = count(inner)
                    products, empty = products + more, empty + there
        return products, empty

    products, empty = count(jax.make_jaxpr(of)(p.model.init(0), jnp.ones(4, bool)).jaxpr)
    assert products == 1 and empty == (2 if scan else 4)  # the head's; of a scan one body, and the last layer


# ---- averages ----------------------------------------------------------------------------------------------------------


def averaged_by(of: Technique, steps: int, amount: int):
    """The states' parameters step by step, and what is reported after each."""
    run = make_run(technique=of, budget=Budget(unit="steps", amount=amount))
    p, ledger = program(run, ONE), Ledger(run, run.V)
    hyper, built = hyperparameters(run.optimizer, steps=steps, seed=0), compiled(p)
    state, batch = built.init(0), jax.tree.map(lambda a: a[None], some_batch(run, 4))
    seen, shown = [], []
    for _ in range(steps):
        fed = {name: np.asarray(value)[None] for name, value in ledger.method.feed(ledger.moment).items()}
        state, *_ = built.advance(state, batch, hyper, np.full(1, 1e-2, np.float32), np.int32(1), None, fed)
        ledger.charge()
        seen.append(np.asarray(state["params"]["embedding_VD"], np.float64))
        shown.append(np.asarray(reported(p, run, state)["embedding_VD"], np.float64))
    return built.init(0)["params"]["embedding_VD"], seen, shown


def test_ema_is_the_moving_average():
    start, seen, shown = averaged_by(technique("ema", decay=0.3), 6, 6)
    average = np.asarray(start, np.float64)
    for n, (params, reports) in enumerate(zip(seen, shown, strict=True)):
        decay = min(0.3, (1 + n) / (10 + n))
        average = decay * average + (1 - decay) * params
        np.testing.assert_allclose(reports, average, atol=1e-6)


def test_lawa_is_the_mean_of_the_last_checkpoints():
    """Taken at each quarter of 8 steps, and at the end; before the first what is trained is shown."""
    _, seen, shown = averaged_by(technique("lawa", window=3, every=0.25), 8, 8)
    np.testing.assert_array_equal(shown[0], seen[0])
    for step, taken in ((1, [1]), (2, [1]), (3, [1, 3]), (5, [1, 3, 5]), (7, [3, 5, 7])):
        np.testing.assert_allclose(shown[step], np.mean([seen[i] for i in taken], axis=0), atol=1e-6)
    assert np.abs(shown[7] - seen[7]).max() > 1e-4


@pytest.mark.parametrize("unit", ["flops", "reference_seconds"])
def test_lawa_misses_no_share_where_steps_cost_unequally(unit, tmp_path):
    """Steps of several forms; and of reference times, where the average costs a quarter of a step besides. Counted anew from what
    each step spent."""
    lawa = technique("lawa", window=3, every=0.03)
    several = Objective(name="prefix_lm", S=6, T=10, splits=(2, 4, 8, 14))
    for seed in range(5):
        run = make_run(technique=lawa, objective=several, seed=Seed(data=seed))
        if unit == "reference_seconds":
            entries = {
                key: {"seconds": {"train": 1.0, "average": 0.3}.get(key.split("/")[1], 0.0)}
                for key in calibrate.wanted([run])
            }
            table = reference_times.write(tmp_path / "table.json", entries, machine={}, source="")
            budget = reference_times.budget(table, 50.0 + seed / 3)
        else:
            plain = cost.planned(replace(run, technique=None, budget=Budget(unit="steps", amount=40)), run.V)
            budget = Budget(unit="flops", amount=plain["exact"] * (1 + seed / 200))
        ledger, taken, shares = Ledger(replace(run, budget=budget), run.V), [], [0.0]
        while ledger.fits:
            taken.append(bool(ledger.method.feed(ledger.moment)["taken"]))
            ledger.charge()
            shares.append(ledger.share)
        expected = [after // 0.03 > before // 0.03 for before, after in pairwise(shares)]
        assert taken == [*expected[:-1], True] and 25 < sum(taken) < 36


@pytest.mark.slow
def test_structures_with_a_technique_train(tmp_path):
    """Encoder-only, whose one stack is an input's, and two stacks of different depths."""
    shape = replace(DEEP, L_input=2)
    for i, run in enumerate((
        deep_run("encoder_only", technique=technique("layer_dropping", gamma=1000.0)),
        deep_run("encoder_decoder", shape=shape, technique=technique("layer_dropping", gamma=1000.0)),
    )):  # fmt: skip
        result = train(run, tmp_path / str(i), execution=TWO)
        assert result["status"] == "done" and result["outcome"]["spent"] == result["planned"]
        assert result["planned"]["exact"] < cost.planned(replace(run, technique=None), run.V)["exact"]
