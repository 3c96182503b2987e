"""Plans: matched or refused, equal to what the program costs, made without a device."""

import importlib
import math
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import jax
import pytest

import flop_counter
import sweeps
from lab import cost
from lab.data import describe
from lab.execution import Execution
from lab.forms import Course
from lab.memory import predict
from lab.parametrization import Parametrization
from lab.program import loss_and_gradient, program, program_key, shapes
from lab.spec import Evaluation, Objective, Options, from_json
from lab.structure import STRUCTURES
from runs import make_run
from sweeps import ladder, match
from sweeps.plan import describe_arm
from sweeps.study import shipped
from sweeps.tune.trials import grid_trials
from sweeps.tune.tuning import TUNINGS
from sweeps.tune.tuning import load as load_tuning

V = 260
MINE = """
from sweeps import Study, arm, corpus
from sweeps.ladder import ladder

def study(preset="small"):
    data = corpus("markov")
    return Study(
        name="mine", question="?", baseline="decoder_only", budgets=(1e9, 2e9), batch=4, window=2, learning_rate=0.01,
        arms={name: arm(name, data, S=8, T=8) for name in ("prefix_lm", "decoder_only")},
        sizes=ladder(8, 16, 24, depth=2, head_width=8),
    )
"""


@pytest.fixture
def mine(tmp_path) -> sweeps.Study:
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return sweeps.load(str(path))


def shipped_plans():
    for name in shipped():
        yield name, sweeps.plan(sweeps.load(name))


@pytest.mark.parametrize("end", [min, pytest.param(max, marks=pytest.mark.slow)], ids=["smallest", "largest"])
def test_every_shipped_study_plans_what_the_program_costs(end):
    """To the last digit, on the reference path, for the smallest program of each arm of every shipped study, and for the
    largest."""
    for name, plan in shipped_plans():
        seen, sizes = {}, {}
        for row in plan.runs:
            sizes.setdefault(row.arm, set()).add(row.planned["exact"] / row.planned["steps"])
        for row in plan.runs:
            assert abs(row.residual) <= 0.01, (name, row.run_id)
            # Whose steps do not cost alike: tests/lab/test_techniques.py, test_curvature.py.
            if row.run.technique or row.run.optimizer.curvature:
                continue
            size = row.planned["exact"] / row.planned["steps"]
            if size != end(sizes[row.arm]):
                continue
            p = program(row.run, Execution(steps_per_dispatch=1, scan=True, attention="reference"))
            if p.key not in seen:
                seen[p.key] = [
                    flop_counter.count(
                        lambda params, b, p=p, form=form: loss_and_gradient(p, params, b, form),
                        p.model.abstract(),
                        shapes([form], (row.run.batch,)),
                    )
                    for form in p.forms
                ]
                parts = (row.run.structure, row.run.shape, row.run.options, row.run.objective, row.run.V)
                counted = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(p.model.abstract()))
                assert counted == cost.parameters(*parts).total
            steps, course = row.planned["steps"], Course(row.run.objective, row.run.seed.data)
            counts = [steps] if len(p.forms) == 1 else course.counts(steps)
            assert row.planned["dense"] == sum(n * one for n, one in zip(counts, seen[p.key], strict=True))


def test_arms_of_a_cell_spend_alike_and_share_what_must_be_shared(mine):
    plan = sweeps.plan(mine)
    assert len(plan.runs) == 2 * 2 * 2
    for row in plan.runs:
        assert row.planned["exact"] == pytest.approx(row.budget, rel=0.01)
        assert row.run.batch == 4 and row.run.seed == plan.runs[0].run.seed
        assert from_json(plan.to_json()["runs"][0]["run"]) == plan.runs[0].run


def test_what_can_not_be_matched_is_refused_with_its_residual(mine):
    row = sweeps.plan(mine).runs[0]
    one_and_a_half = 1.5 * row.planned["exact"] / row.planned["steps"]
    with pytest.raises(
        ValueError, match=r"can not be matched within 1.0% .*prefix_lm rung 0 \(D=8\) at [\d.e+]+: \+33"
    ):
        sweeps.plan(replace(mine, budgets=(one_and_a_half,)))
    with pytest.raises(ValueError, match="less than one step"):
        sweeps.plan(replace(mine, budgets=(1e3,)))


def test_parameters_are_matched_by_feed_forward_width(mine):
    arms = {**mine.arms, "encoder_decoder": replace(mine.arms["prefix_lm"], structure=STRUCTURES["encoder_decoder"])}
    sizes = {name: ladder.ladder(64, 96, depth=4) for name in mine.arms}
    study = replace(
        mine, arms=arms, budgets=(1e6,), match=sweeps.Match(quantity="parameters"),
        sizes={**sizes, "encoder_decoder": ladder.ladder(64, 96, depth=2)},
    )  # fmt: skip
    plan = sweeps.plan(study)
    for rung in (0, 1):
        bodies = {
            r.arm: cost.parameters(r.run.structure, r.run.shape, r.run.options, r.run.objective, V).body
            for r in plan.runs
            if r.rung == rung
        }
        assert max(bodies.values()) / min(bodies.values()) < 1.01
        assert len({r.planned["tokens"] for r in plan.runs}) == 1
    with pytest.raises(ValueError, match="no feed-forward width"):
        match.with_parameters(make_run("encoder_decoder"), 100, V, 0.01)


def test_arms_that_can_not_be_compared_are_refused(mine):
    other = mine.arms["prefix_lm"]
    for change, message in (
        ({"objective": Objective(S=9, T=7)}, "the held-out loss of arm .* targets after 9"),
        ({"evaluation": Evaluation(examples=7)}, "evaluation"),
        ({"precision": "bf16"}, "precision"),
    ):
        with pytest.raises(ValueError, match=message):
            sweeps.plan(replace(mine, arms={**mine.arms, "prefix_lm": replace(other, **change)}))


def test_too_little_held_out_text_is_refused_before_anything_is_trained(mine):
    arms = {name: replace(a, evaluation=Evaluation(examples=10**6)) for name, a in mine.arms.items()}
    with pytest.raises(ValueError, match=r"evaluation\.examples = 1000000: .* examples of 16 tokens"):
        sweeps.plan(replace(mine, arms=arms))


def test_more_than_four_epochs_are_refused_unless_allowed(mine):
    study = replace(mine, budgets=(4e13,))
    with pytest.raises(ValueError, match="allow_repeat"):
        sweeps.plan(study)
    arms = {name: replace(a, data=replace(a.data, allow_repeat=True)) for name, a in mine.arms.items()}
    assert any("epochs" in said for said in sweeps.plan(replace(study, arms=arms)).warnings)


def test_arms_that_are_one_function_are_named(mine):
    plan = sweeps.plan(replace(mine, sizes=ladder.ladder(8, 16, 24, depth=1, head_width=8)))
    assert "prefix_lm and decoder_only are the same function at rung 0 (1 layers)" in plan.warnings


def test_a_published_rule_warns_outside_its_range():
    run = make_run()
    size = ladder.Size.of(run, V)
    with pytest.warns(UserWarning, match="extrapolation"):
        assert ladder.LEARNING_RATES["porian"]("porian", size) > 0.05
    inside = replace(size, body_flops=1e4, tokens=1e6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ladder.LEARNING_RATES["lab"]("lab", inside)
    with pytest.warns(UserWarning, match=r"fitted on tokens from 8\.8e\+04 to 6\.43e\+06 and is asked at 1e\+09"):
        ladder.LEARNING_RATES["lab"]("lab", replace(inside, tokens=1e9))
    fitted = replace(size, body_parameters=108_000_000)
    assert ladder.LEARNING_RATES["porian"]("porian", fitted) == pytest.approx(0.0047)
    law = ladder.LEARNING_RATES["step_law"]("step_law", replace(size, body_parameters=10**9, tokens=1e11))
    assert law == pytest.approx(1.80 * 1e9**-0.713 * 1e11**0.307)
    with pytest.warns(UserWarning, match=r"fitted on tokens from 4e\+09 to 1e\+11 and is asked at 1e\+08"):
        ladder.LEARNING_RATES["step_law"]("step_law", replace(size, body_parameters=10**9, tokens=1e8))
    with pytest.raises(ValueError, match="did you mean 'porian'"):
        ladder.learning_rate("porain", run, V)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def study(preset): raise KeyError('budgets')", "KeyError: 'budgets'"),
        ("x = 1", "defines no function"),
        ("def study(preset): return 3", "returned int"),
        ("import nonesuch", "ModuleNotFoundError"),
        ("def study(preset:", "SyntaxError"),
        (MINE.replace('baseline="decoder_only"', 'baseline="decoder"'), "did you mean 'decoder_only'"),
        (MINE.replace("S=8", "S=0"), r"objective\.S = 0: use a whole number of at least 1"),
        (MINE.replace("1e9, 2e9", "2e9, 1e9"), "ascending"),
        (MINE.replace("ladder(8,", "ladder(7,"), "L_input|head|even"),
        (MINE.replace("prefix_lm", "prefix_llm"), "did you mean 'prefix_lm'"),
    ],
)
def test_a_study_that_is_wrong_says_where(tmp_path, text, message):
    path = tmp_path / "wrong.py"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        sweeps.load(str(path))
    assert str(path) in str(raised.value)


def test_a_mistyped_study_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'quickstart'"):
        sweeps.load("quikstart")


def test_planning_touches_no_device(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    script = f"import sweeps; print(len(sweeps.plan(sweeps.load({str(tmp_path / 'mine.py')!r})).runs))"
    environment = {**os.environ, "JAX_PLATFORMS": "nodevice"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "8", done.stderr


def test_options_are_part_of_the_run(mine):
    arms = {name: replace(a, options=Options(mlp="gelu")) for name, a in mine.arms.items()}
    assert {r.run_id for r in sweeps.plan(replace(mine, arms=arms)).runs}.isdisjoint(
        r.run_id for r in sweeps.plan(mine).runs
    )


def test_the_corpus_is_planned_by_its_hash(tmp_path):
    data = describe("markov").data
    moved = replace(data, path="/elsewhere")
    assert make_run(data=data).run_id == make_run(data=moved).run_id != make_run().run_id
    assert Path(shipped()["quickstart"]).exists()


def test_runs_are_grouped_by_the_program_that_serves_them(mine):
    """Budgets, rates and seeds do not part them; what the worker asks, the program's key, says the same."""
    plan = sweeps.plan(replace(mine, seeds=2))
    groups = plan.groups
    assert sorted(i for ids in groups for i in ids) == sorted(plan.unique) and len(groups) == plan.programs()
    keys = [{program_key(plan.unique[i].run) for i in ids} for ids in groups]
    assert all(len(key) == 1 for key in keys) and len(set.union(*keys)) == len(groups)
    assert max(map(len, groups)) == 2 * len(mine.budgets)


def test_the_program_that_takes_most_memory_is_named(mine):
    plan = sweeps.plan(mine)
    needed, settings, row = plan.memory()
    assert needed.total == max(predict(r.run, V, settings).total for r in plan.unique.values())
    assert row.run.shape.D == 24
    small, frugal, _ = plan.memory("gpu", limit=1)
    assert small.total < needed.total and frugal.remat and frugal.microbatches == 4


def test_each_replicate_is_planned_as_its_own_seed_spends(mine):
    """Which forms the steps take is the seed's: replicates of one cell may differ in steps and FLOPs."""
    o = Objective(name="prefix_lm", S=8, T=8, splits=(2, 8, 14))
    arms = {name: replace(a, objective=o) for name, a in mine.arms.items()}
    rows = sweeps.plan(replace(mine, arms=arms, seeds=4)).runs
    for row in rows:
        assert dict(row.planned) == cost.planned(row.run, row.run.V)
        assert row.residual == match.residual(row.run, row.run.V)
    by_cell = {}
    for row in rows:
        by_cell.setdefault((row.arm, row.budget, row.rung), set()).add(row.planned["exact"])
    assert any(len(spent) > 1 for spent in by_cell.values()), "seeds that draw alike would show nothing"


def test_arms_trained_differently_are_compared_where_they_are_scored_alike(mine):
    other = mine.arms["prefix_lm"]
    arms = {**mine.arms, "prefix_lm": replace(other, objective=Objective(name="ul2", S=8, T=8))}
    with pytest.raises(ValueError, match=r"ul2's own, 16 tokens of text.*evaluation\.splits"):
        sweeps.plan(replace(mine, arms=arms))
    splits = other.objective.S
    arms["prefix_lm"] = replace(arms["prefix_lm"], evaluation=replace(other.evaluation, splits=(splits,)))
    assert sweeps.plan(replace(mine, arms=arms)).runs


def test_named_steps_are_pairs_of_arms_and_stand_in_the_plan(mine):
    first, second = list(mine.arms)[:2]
    assert sweeps.plan(replace(mine, steps=((first, second),))).to_json()["study"]["steps"] == [[first, second]]
    assert "steps" not in sweeps.plan(mine).to_json()["study"]
    for wrong in ((first, first), (first, "other"), (first,)):
        with pytest.raises(ValueError, match=r"study\.steps = .*give two of the arms"):
            replace(mine, steps=(wrong,))


def test_an_arms_options_are_named_in_the_plan_where_they_are_not_the_default(mine):
    plain = mine.arms["prefix_lm"]
    changed = Options(mlp="gelu", parametrization=Parametrization(name="mup", base_D=8, base_H=4))
    said = sweeps.plan(replace(mine, arms={**mine.arms, "prefix_lm": replace(plain, options=changed)})).to_json()[
        "study"
    ]["arms"]
    assert said["prefix_lm"].endswith("loss on targets; mlp gelu, parametrization mup")
    assert all(text.endswith("loss on targets") for name, text in said.items() if name != "prefix_lm")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*shipped(), *shipped(TUNINGS)}))
def test_every_preset_plans(name):
    """Also those for a GPU and for a cluster, which nobody trains here; within 1%, which a plan refuses otherwise."""
    tuned = name not in shipped()
    module = importlib.import_module(f"sweeps.{'tunings' if tuned else 'studies'}.{name}")
    for preset in module.PRESETS:
        if tuned:
            asked = load_tuning(name, preset)
            plan = grid_trials(asked, asked.grids)
        else:
            plan = sweeps.plan(sweeps.load(name, preset))
        assert plan.runs and all(row.planned["steps"] >= 1 for row in plan.runs), preset


def test_arms_are_described_by_what_tells_them_apart():
    told = sweeps.load("no_train_no_gain").arms
    found = sweeps.plan(sweeps.load("no_train_no_gain", "smoke")).to_json()["study"]["arms"]
    assert found["bert/adamw"].endswith("; adamw, linear") and found["bert/wsd"].endswith("; adamw, wsd")
    assert describe_arm(told["t5/rho_loss_free"]).endswith("not charged") and "mega_batch 2)" in describe_arm(
        told["t5/rho_loss"]
    )
    deep = sweeps.plan(sweeps.load("depth_bottleneck")).to_json()["study"]["arms"]
    assert deep["same_8"].endswith("; 8 layers") and len(set(deep.values())) == len(deep)
