"""Objectives of several forms: which step takes which, what that costs, and what is refused."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flop_counter
from lab import cost
from lab.execution import Execution
from lab.forms import UL2_DENOISERS, Course, evaluated, forms, noised
from lab.ledger import Ledger
from lab.objectives import corrupted
from lab.program import loss_and_gradient, program, shapes, token_losses
from lab.spec import Budget, Evaluation, Objective, from_json, to_json
from lab.structure import STRUCTURES
from runs import make_run

SEVERAL = {
    "prefix_lm": Objective(name="prefix_lm", S=6, T=10, splits=(2, 4, 8, 14)),
    "prefix_lm, all": Objective(name="prefix_lm", S=6, T=10, splits=(4, 12), loss="all"),
    "ul2": Objective(name="ul2", S=20, T=20),
    "pairs": Objective(name="pairs", S=12, T=9, buckets=((6, 5, 3), (12, 5, 2), (12, 9, 1))),
}
ONE = {
    "lm": Objective(S=6, T=5),
    "span_corruption": corrupted(40),
    "causal_lm": Objective(name="causal_lm", S=0, T=12, attended=50),
}
REFERENCE = Execution(steps_per_dispatch=1, scan=False, attention="reference")


def run_of(objective, **parts):
    return make_run("decoder_only", objective=objective, **parts)


@pytest.mark.parametrize("objective", SEVERAL.values(), ids=SEVERAL)
def test_a_cycle_takes_each_form_as_often_as_its_share(objective):
    course = Course(objective, seed=3)
    taken = [course.form(step) for step in range(5 * course.cycle)]
    for cycle in np.reshape(taken, (5, course.cycle)):
        np.testing.assert_array_equal(np.bincount(cycle), course.shares)
    assert len({tuple(cycle) for cycle in np.reshape(taken, (5, course.cycle))}) > 1, "cycles are in one order"
    assert taken != [Course(objective, seed=4).form(step) for step in range(len(taken))]
    for steps in range(len(taken)):
        assert course.counts(steps) == np.bincount(taken[:steps], minlength=len(course.forms)).tolist()


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(SEVERAL) + sorted(ONE)),
    st.floats(0.6, 90.0),
    st.sampled_from(["flops", "tokens", "steps"]),
    st.integers(0, 5),
)
def test_what_is_planned_is_what_a_run_step_by_step_spends(name, amount, unit, seed):
    run = run_of((SEVERAL | ONE)[name])
    run = replace(run, seed=replace(run.seed, data=seed))
    price = cost.train_step(run, run.V)["exact" if unit == "flops" else unit]
    run = replace(run, budget=Budget(unit=unit, amount=amount * price))
    try:
        planned = cost.planned(run, run.V)
    except ValueError:
        return  # less than half of the first step's form
    ledger = Ledger(run, run.V)
    while ledger.fits:
        ledger.charge()
    assert ledger.spent == planned and ledger.steps == cost.steps(run, run.V)


@pytest.mark.first(5)
@pytest.mark.parametrize("structure", ["decoder_only", "prefix_lm", "encoder_decoder"])
@pytest.mark.parametrize("name", sorted(SEVERAL) + sorted(ONE))
def test_each_form_costs_what_its_program_executes(name, structure):
    objective = (SEVERAL | ONE)[name]
    if structure != "decoder_only" and (objective.loss == "all" or name == "causal_lm"):
        pytest.skip("not a legal run")
    run = make_run(structure, objective=objective)
    p = program(run, REFERENCE)
    params = p.model.abstract()
    for form, price in zip(p.forms, cost.prices(run, run.V), strict=True):
        batch = shapes([form], (run.batch,))
        step = flop_counter.count(lambda params, b, f=form: loss_and_gradient(p, params, b, f), params, batch)
        assert step == price["dense"]
        assert price["tokens"] == run.batch * form.length
    for form in p.evaluated:
        counted = flop_counter.count(
            lambda params, b, f=form: token_losses(p.model, f, params, b), params, shapes([form], (1,))
        )
        assert counted == cost.forward(run.structure, run.shape, run.options, form, run.V)["dense"]


def test_ul2_is_the_published_mixture():
    """Seven denoisers alike (Tay et al. 2022, table 1), at the paper's length of 512."""
    found = forms(Objective(name="ul2", S=256, T=256))
    assert len(found) == 7 and all(form.share == 1 and form.length == 512 for form in found)
    targets = {name: form.T for name, form in zip(UL2_DENOISERS, found, strict=True)}
    # noise + spans + the end: 15% of 512 is 77, 50% is 256; mean spans of 3, 8 and 64
    assert targets == {"R3": 77 + 26 + 1, "R8": 77 + 10 + 1, "S": 128, "X3": 256 + 85 + 1, "X8": 256 + 32 + 1,
                       "X64": 77 + 1 + 1, "X64h": 256 + 4 + 1}  # fmt: skip
    assert [form.mode for form in found] == [0, 0, 1, 2, 2, 2, 2]


def test_t5s_own_lengths():
    """T5 (random_spans_helper): 568 tokens of text give 512 inputs and 114 targets, each with its end, where ours have an end
    among the targets alone."""
    o = corrupted(568)
    assert (o.S, o.T, o.spans, o.length) == (511, 114, 28, 568)
    assert noised(568, 3.0, 0.15) == (85, 28)


@pytest.mark.parametrize("objective", [*SEVERAL.values(), *ONE.values()], ids=[*SEVERAL, *ONE])
def test_json_keeps_every_objective(objective):
    run = run_of(objective)
    again = from_json(json.loads(json.dumps(to_json(run))))
    assert again == run and again.run_id == run.run_id and from_json(to_json(run)) == run


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"name": "prefix_lm", "S": 6, "T": 5}, r"objective\.splits = \(\): prefix_lm needs them"),
        ({"name": "prefix_lm", "S": 6, "T": 5, "splits": (11,)}, r"1 to 16 different input lengths from 1 to 10"),
        ({"name": "prefix_lm", "S": 6, "T": 5, "splits": (3, 3)}, r"different"),
        ({"name": "prefix_lm", "S": 20, "T": 20, "splits": tuple(range(1, 18))}, r"1 to 16"),
        ({"S": 6, "T": 5, "splits": (3,)}, r"objective\.splits = \(3,\): lm needs none"),
        ({"name": "span_corruption", "S": 6, "T": 5}, r"objective\.spans = 0: span_corruption needs them"),
        (
            {"name": "span_corruption", "S": 6, "T": 5, "spans": 4},
            r"objective\.spans = 4: .* lab\.objectives\.corrupted",
        ),
        ({"name": "ul2", "S": 6, "T": 5, "loss": "all"}, r"ul2 scores its targets"),
        ({"name": "causal_lm", "S": 3, "T": 5, "attended": 9}, r"objective\.S = 3: causal_lm has no inputs"),
        ({"name": "causal_lm", "S": 0, "T": 5}, r"objective\.attended = 0: .* 5 to 15"),
        ({"S": 0, "T": 5}, r"objective\.S = 0"),
        ({"name": "pairs", "S": 6, "T": 5}, r"objective\.buckets = \(\): pairs needs them"),
        ({"name": "pairs", "S": 6, "T": 5, "buckets": ((6, 4, 1),)}, r"use the largest buckets', \(6, 4\)"),
        ({"name": "pairs", "S": 6, "T": 5, "buckets": ((6, 5),)}, r"\(S, T, share of the steps\)"),
    ],
)
def test_objectives_that_are_wrong_say_how(parts, message):
    with pytest.raises(ValueError, match=message):
        Objective(**parts)


def test_only_a_decoder_packs_documents():
    with pytest.raises(ValueError, match="'causal_lm' does not fit structure encoder_decoder"):
        make_run("encoder_decoder", objective=ONE["causal_lm"])


def test_losses_are_of_one_measure_where_the_same_targets_follow_the_same_inputs():
    def measure(objective, splits=()):
        return run_of(objective, evaluation=Evaluation(splits=splits)).measure

    lm = measure(Objective(S=6, T=10))
    assert lm == measure(Objective(S=6, T=10, loss="all"))
    assert lm == measure(SEVERAL["prefix_lm"], (6,)) == measure(Objective(name="ul2", S=8, T=8), (6,))
    assert measure(SEVERAL["prefix_lm"]) == measure(Objective(S=6, T=10), (2, 4, 8, 14))
    apart = [*SEVERAL.values(), *ONE.values(), Objective(S=6, T=10)]
    del apart[1]  # the other prefix_lm, of other splits
    assert len({measure(o) for o in apart}) == len(apart)
    with pytest.raises(ValueError, match=r"evaluation\.splits = \(6,\)"):
        measure(ONE["causal_lm"], (6,))


def test_ul2_is_asked_in_its_sequential_mode():
    (form,) = evaluated(SEVERAL["ul2"], (30,))
    assert (form.name, form.S, form.T, form.mode) == ("lm", 31, 10, 1)


def test_runs_of_several_forms_do_not_train_side_by_side():
    with pytest.raises(ValueError, match="pack = 2"):
        program(run_of(SEVERAL["ul2"]), REFERENCE, pack=2)


def test_memory_and_programs_are_of_the_largest_form():
    run = run_of(SEVERAL["pairs"])
    batch = shapes(program(run, REFERENCE).forms, (2,))
    assert [leaf.shape for leaf in jax.tree.leaves(batch)] == [(2, 12), (2, 9), (2, 9)]
    assert STRUCTURES["decoder_only"] == run.structure
