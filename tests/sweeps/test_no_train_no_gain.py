"""The study of what trains faster: the original's settings, what its plan refuses, and (slow) the whole way to its page."""

import json
import math
from dataclasses import replace

import pytest

import sweeps
from lab import cost
from lab.objectives import corrupted
from lab.spec import Objective
from sweeps.studies.no_train_no_gain import BASELINE, FAMILIES, PRESETS, against, templates
from sweeps.study import Gains
from sweeps.tune.trials import grid_trials
from sweeps.tune.tuning import load as load_tuning


@pytest.fixture(scope="module")
def smoke() -> sweeps.Study:
    return sweeps.load("no_train_no_gain", "smoke", sweeps.corpus("markov"))


def published(preset, vocabulary):
    """The preset's baseline in the original's vocabulary."""
    data = replace(sweeps.corpus("markov"), vocabulary=vocabulary)
    first = templates(preset, data)[f"{preset}/{BASELINE}"]
    chosen = PRESETS[preset]
    run = replace(first, shape=chosen.shape, batch=chosen.batch)
    return run, chosen, cost.parameters(run.structure, run.shape, run.options, run.objective, vocabulary)


def test_crammed_bert_is_the_original():
    """120 M parameters (Geiping and Goldstein 2023), 16 layers of 768 with a GeGLU of 3072 in, 1536 out; 19 of 128 tokens masked;
    31,957 updates of 1,536 sequences are 6.28e9 tokens in 24 hours."""
    run, chosen, counted = published("bert", 32768)
    by_hand = 16 * (4 * 768**2 + 768 * 3072 + 1536 * 768) + 32768 * 768
    assert counted.total == pytest.approx(by_hand, rel=1e-3) and counted.total == pytest.approx(120e6, rel=0.01)
    assert run.objective == Objective(name="masked_lm", S=128, T=19)
    step = cost.train_step(run, run.V)
    assert step["tokens"] * chosen.updates[-1] == pytest.approx(6.28e9, rel=1e-3)
    # The head at the masked positions alone: in a step the products with the token table are of 19 positions of 128.
    # F counted apart: projections 2 d^2 a matrix, attention of all pairs, 3 times forward.
    layer = 2 * 128 * (4 * 768**2 + 3 * 768 * 1536) + 4 * 768 * 128 * 128
    assert step["exact"] == pytest.approx(3 * 1536 * (16 * layer + 2 * 19 * 768 * run.V), rel=1e-3)


def test_t5_is_the_original():
    """T5-v1.1-base, 248 M parameters, and one token table more, since here each stream has its own where head and table are two;
    568 tokens become 512 in (the end among them, which is not fed here) and 114 out."""
    run, chosen, counted = published("t5", 32128)
    assert counted.total - 32128 * 768 == pytest.approx(248e6, rel=0.01)
    assert run.objective == corrupted(568) and (run.objective.S + 1, run.objective.T) == (512, 114)
    assert chosen.batch == 144 and run.optimizer.final <= 1e-3


def test_updates_are_those_that_the_published_reference_times_buy():
    """Kaddour et al. 2023: 0.2253 s for a micro-batch of 128 of BERT, 1.031 s for a step of T5; 6, 12 and 24 hours."""
    for preset, seconds in (("bert", 12 * 0.2253), ("t5", 1.031)):
        for hours, updates in zip((6, 12, 24), PRESETS[preset].updates, strict=True):
            assert updates == pytest.approx(3600 * hours / seconds, abs=1)


def test_the_plan_has_every_family_with_its_controls(smoke):
    plan = sweeps.plan(smoke)
    for family in FAMILIES:
        rows = {
            arm: [r for r in plan.runs if r.arm == f"{family}/{arm}"] for arm in (BASELINE, "no_op", "plus_10", "wsd")
        }
        assert [r.run_id for r in rows["no_op"]] == [r.run_id for r in rows[BASELINE]]
        for more, base in zip(rows["plus_10"], rows[BASELINE], strict=True):
            assert more.budget == base.budget and more.run.budget.amount == pytest.approx(1.1 * base.run.budget.amount)
            assert more.planned["steps"] / base.planned["steps"] == pytest.approx(1.1, abs=0.02)
        assert len({r.run.measure for of in rows.values() for r in of}) == 1
    header = plan.to_json()["study"]
    assert header["gains"]["controls"]["t5/plus_10"] == 1.1 and header["against"]["t5/wsd"] == "t5/adamw"
    assert not any("same function" in said for said in plan.warnings)


def test_every_arm_of_the_small_preset_is_planned_in_every_family():
    """In updates of the baseline's: 3/5 where each takes two batches of candidates scored, at a third of a step each; fewer
    with a holdout model; more where layers are left out. The published presets have all arms once a user brings enough text."""
    plan = sweeps.plan(sweeps.load("no_train_no_gain", "small"))
    steps = {(r.arm, r.budget): r.planned["steps"] for r in plan.runs}
    assert {r.arm.split("/")[1] for r in plan.runs} >= set(PRESETS["small"].arms)
    for family in FAMILIES:
        for budget in PRESETS["small"].budgets:
            base = steps[f"{family}/{BASELINE}", budget]
            of = {arm: steps[f"{family}/{arm}", budget] / base for arm in PRESETS["small"].arms}
            assert of["selective_backprop"] == pytest.approx(0.6, rel=0.01) and of["rho_loss"] < 0.6
            assert 0.9 < of["sophia_g"] < 1 == of["ema"] == of["lion"] == of["muon"]
            assert min(of["layer_dropping"], of["stacking"]) > 1.2
    assert list(plan.to_json()["study"]["gains"]["free"]) == [f"{family}/rho_loss_free" for family in FAMILIES]
    published = [preset for preset in PRESETS if PRESETS[preset].updates]
    for preset in published:
        once = {name for name in templates(preset, sweeps.corpus("python")) if "rho" in name}
        assert once == {f"{preset}/rho_loss", f"{preset}/rho_loss_free"}
        assert not any("rho" in name for name in templates(preset, sweeps.corpus("python", allow_repeat=True)))


def in_reference_seconds(study, table, *budgets, kept=(BASELINE,)):
    arms = {name: run for name, run in study.arms.items() if name.split("/")[1] in (BASELINE, *kept)}
    by = sweeps.Match(quantity="reference_seconds", reference=str(table))
    return replace(
        study, arms=arms, against=against(arms), gains=Gains(allow=("repeated_text",)), budgets=budgets, match=by
    )


def test_the_published_comparison_is_planned_in_reference_seconds():
    """Kaddour et al. 2023 gave every arm 24 hours of reference times: updates of the baseline, and relative to it."""
    kept = ("stacking", "layer_dropping", "selective_backprop", "sophia_g")
    whole = sweeps.load("no_train_no_gain", "bert")
    plan = sweeps.plan(in_reference_seconds(whole, "ntng-bert", 24 * 3600.0, kept=kept))
    steps = {r.arm.split("/")[1]: r.planned["steps"] for r in plan.runs}
    assert steps[BASELINE] == 31_957
    found = [steps[name] / steps[BASELINE] for name in kept]
    assert found == pytest.approx([1.465, 1.335, 0.548, 0.952], abs=5e-4)
    assert max(abs(r.residual) for r in plan.runs) < 1e-3
    said = plan.to_json()["study"]["match"]
    assert said == {"quantity": "reference_seconds", "convention": "exact", "tolerance": 0.01, "reference": "ntng-bert"}


def test_a_tuning_has_the_budgets_of_its_study_in_reference_seconds():
    whole = sweeps.load("no_train_no_gain", "bert")
    kept = {name: whole.arms[name] for name in ("bert/adamw", "bert/stacking")}
    by = sweeps.Match(quantity="reference_seconds", reference="ntng-bert")
    tuning = sweeps.Tuning(name="timed", arms=kept, budgets=(24 * 3600.0,), sizes=whole.sizes, batch=whole.batch,
                           rates=(0.5, 1.0, 2.0), relative=True, match=by)  # fmt: skip
    rows = grid_trials(tuning, tuning.grids).runs
    steps = {row.arm: row.planned["steps"] for row in rows}
    assert len(rows) == 2 * 3 * 2 and steps["bert/adamw"] == 31_957
    assert steps["bert/stacking"] / steps["bert/adamw"] == pytest.approx(1.465, abs=5e-4)


def test_reference_seconds_that_can_not_be_planned(smoke, tmp_path):
    whole = sweeps.load("no_train_no_gain", "bert")
    with pytest.raises(ValueError, match=r"ntng-bert\.json has no reference time of .*average/ema.* `lab calibrate`"):
        sweeps.plan(in_reference_seconds(whole, "ntng-bert", 3600.0, kept=("ema",)))
    with pytest.raises(ValueError, match="no such file"):
        sweeps.plan(in_reference_seconds(smoke, tmp_path / "none.json", 1.0))
    for wrong in (dict(quantity="reference_seconds"), dict(reference="ntng-bert")):
        with pytest.raises(ValueError, match=r"match\.reference = .*lab calibrate"):
            sweeps.Match(**wrong)
    with pytest.raises(ValueError, match=r"only a study with gains = Gains\(\) has budgets of reference times"):
        sweeps.plan(replace(in_reference_seconds(whole, "ntng-bert", 3600.0), gains=None))


def changed(study, arm, **changes):
    arms = {name: run for name, run in study.arms.items() if name.split("/")[1] in (BASELINE, "wsd")}
    arms[arm] = replace(arms[arm], **changes)
    return replace(study, arms=arms, against=against(arms), gains=Gains())


def test_a_plan_refuses_what_would_make_its_answer_worthless(smoke):
    base, wsd = smoke.arms["bert/adamw"], smoke.arms["bert/wsd"]
    undecayed = changed(smoke, "bert/adamw", optimizer=replace(base.optimizer, final=0.1))
    with pytest.raises(ValueError, match=r"the baseline bert/adamw is not decayed: .*gains\.allow = \('undecayed',\)"):
        sweeps.plan(undecayed)
    said = sweeps.plan(replace(undecayed, gains=Gains(allow=("undecayed",)))).warnings
    assert any("the baseline bert/adamw is not decayed" in one for one in said)
    for changes, message in (
        ({"precision": "bf16"}, "precision of arm bert/wsd"),
        ({"evaluation": replace(wsd.evaluation, examples=7)}, "evaluation examples of arm bert/wsd"),
        ({"objective": Objective(name="masked_lm", S=32, T=6)}, "the held-out loss of arm bert/wsd"),
        ({"seed": replace(wsd.seed, data=9)}, "seed of arm bert/wsd"),
    ):
        with pytest.raises(ValueError, match=message):
            sweeps.plan(changed(smoke, "bert/wsd", **changes))
    with pytest.raises(ValueError, match="has one seed"):
        sweeps.plan(replace(smoke, seeds=1))
    with pytest.raises(ValueError, match="text is read up to"):
        sweeps.plan(replace(smoke, budgets=(1e9, 1e12)))


def test_what_a_study_says_of_its_arms_is_checked(smoke):
    for wrong, message in (
        ({"gains": Gains(controls={"bert/wsd": 1.1})}, "give it the same template"),
        ({"gains": Gains(controls={"bert/muon": 1.1})}, "bert/muon"),
        ({"against": {"bert/wsd": "t5/wsd", "t5/wsd": "t5/adamw"}}, "compared with no other arm"),
        ({"batch": {"bert/adamw": 2}}, "give that of arm"),
        ({"relative": True}, "multiples"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(smoke, **wrong)
    with pytest.raises(ValueError, match="did you mean 'undecayed'"):
        Gains(allow=("undecade",))


def test_arms_are_tuned_about_their_own_rates_as_often_as_every_other():
    tuning = load_tuning("gains", "smoke", sweeps.corpus("markov"))
    twice = {name: replace(run, optimizer=replace(run.optimizer, learning_rate=0.003)) if name.endswith("wsd") else run
             for name, run in tuning.arms.items()}  # fmt: skip
    trials = grid_trials(replace(tuning, arms=twice), tuning.grids)
    assert len(set(trials.per_arm().values())) == 1
    for arm, own in (
        ("bert/adamw", 0.01),
        ("t5/adamw", 0.04),
        ("t5/wsd", 0.003),
    ):  # at width 16 AdamWScale's is 4 times AdamW's
        rates = {trial.rate for trial in trials.of(arm, tuning.fitted[0])}
        assert sorted(rates) == pytest.approx([own * factor for factor in tuning.rates])


@pytest.mark.slow
def test_from_nothing_to_a_page_of_verdicts(tmp_path, monkeypatch, capsys):
    from test_cli import run as command

    monkeypatch.chdir(tmp_path)
    assert command(capsys, "run", "no_train_no_gain", "--preset", "smoke", "--workers", "1")[0] == 0
    code, out, _ = command(capsys, "report", "no_train_no_gain")
    found = json.loads((tmp_path / "runs/no_train_no_gain/verdict.json").read_text())
    claims = {(c["arm"], c["budget"]): c for c in found["claims"]}
    assert code == 0 and len(claims) == 3 * 3 * 3
    for (arm, _), claim in claims.items():
        assert math.isfinite(claim["difference"])
        if arm.endswith("no_op"):
            assert claim["kind"] == "no gain" and claim["value"] == 0 and claim["same_runs"]
    assert "untuned" in out and "[no gain] (control: the baseline once more) decoder/no_op" in out
