"""A tuning from its first trial to a study that takes its rules. Trials are simulated from a law that is known; one tuning is
really trained (slow)."""

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_cli import run as command

import sweeps
from lab import records
from lab.spec import Optimizer, Seed
from simulated_tuning import CURVATURE, LAWS, NOISE, Simulated, tuned
from sweeps.ladder import LEARNING_RATES
from sweeps.study import TUNING_SEEDS, TUNINGS, shipped
from sweeps.tune import report, rules
from sweeps.tune.conclude import ALL, DEFAULT, Tuned
from sweeps.tune.rounds import source, tune
from sweeps.tune.trials import grid_trials
from sweeps.tune.tuning import load

# --- rounds ---------------------------------------------------------------------------------------------------------


def test_the_rule_of_every_arm_is_found_from_as_many_trials(mine, tmp_path):
    found, train = tuned(load(str(mine)), tmp_path / "out")
    assert set(found.trials.per_arm().values()) == {7 * 5 * 2 + 2 * sum(_moves(found).values())}
    for arm, (c, a, b) in LAWS.items():
        law = found.laws.of[arm]
        assert law.columns == ("size", "tokens")
        assert (law.exponent("size"), law.exponent("tokens")) == (
            pytest.approx(a, abs=0.02),
            pytest.approx(b, abs=0.02),
        )
        for at, size in found.sizes.items():
            if at[0] == arm:
                assert found.optima[at].rate == pytest.approx(c * size.body_flops**a * size.tokens**b, rel=0.01)
        held = found.held_out[arm]
        assert held.excess is not None and abs(held.log_off) < 0.03 and held.excess < 1e-3
        assert found.hours(arm) == pytest.approx(found.trials.per_arm()[arm] / 100)
        assert found.flops(arm) == sum(t.row.planned["exact"] for t in found.trials.trials if t.arm == arm)
    assert found.laws.exponents_differ.p < 1e-6, "the arms' laws differ"
    assert found.noise.sd == pytest.approx(NOISE, rel=0.4), "what seeds shift alike is no noise of a best rate"
    assert len(train.asked) == 1 + len({move for move in _moves(found).values() if move})


def _moves(found: Tuned) -> dict:
    """Rates that each cell's grid has beyond the first five."""
    arm = found.arms[0]
    return {cell: len({t.rate for t in found.trials.of(arm, cell)}) - 5 for cell in found.trials.tuning.cells}


def test_a_grid_whose_best_is_at_an_edge_is_moved_for_every_arm(mine, tmp_path):
    """One arm's best rates are four times as high: the other's trials are added too."""
    said: list[str] = []
    high = {**LAWS, "prefix_lm": (8 * 1.2, -0.4, 0.0)}
    train = Simulated(tmp_path / "out", laws=high)
    found = tune(load(str(mine)), tmp_path / "out", train, say=said.append)
    assert found is not None and len(train.asked) > 1
    counts = {arm: {cell: len(found.trials.of(arm, cell)) for cell in found.trials.tuning.cells} for arm in LAWS}
    assert counts["prefix_lm"] == counts["decoder_only"] and max(counts["decoder_only"].values()) > 10
    assert "prefix_lm, size 0 at 1e+08: upper edge, 0.08" in said[0] and "decoder_only" not in said[0]
    first, second = (set(plan.unique) for plan in train.asked[:2])
    assert first < second, "what was trained stays"
    assert max(t.rate for t in found.trials.trials) == pytest.approx(0.16 if len(said) == 1 else 0.08 * 2 ** len(said))


def test_moves_end_with_an_error_that_names_the_cell(mine, tmp_path):
    tuning = replace(load(str(mine)), moves=1)
    low = {**LAWS, "decoder_only": (1e-6, 0.0, 0.0)}
    with pytest.raises(ValueError, match=r"after 1 moves .* decoder_only, size 0 at 1e\+08: lower edge, 0\.0025"):
        tune(tuning, tmp_path / "out", Simulated(tmp_path / "out", laws=low))


def test_a_tuning_goes_on_where_it_was(mine, tmp_path):
    """Nothing is trained twice; a lost result alone is trained again, without a smaller plan."""
    tuning, out = load(str(mine)), tmp_path / "out"
    train = Simulated(out, laws={**LAWS, "prefix_lm": (8 * 1.2, -0.4, 0.0)}, left=3)
    assert tune(tuning, out, train) is None, "a budget that is spent leaves trials"
    train.left = 0
    first = tune(tuning, out, train)
    assert first is not None
    again = Simulated(out)
    second = tune(tuning, out, again)
    assert second is not None and not again.asked and second.outcomes == first.outcomes
    lost = first.trials.trials[0].row.run_id
    (records.run_directory(out, lost) / records.RESULT).unlink()
    train.asked.clear()
    assert tune(tuning, out, train) is not None
    assert [set(plan.unique) for plan in train.asked] == [set(first.trials.unique)], "the whole plan, as it was written"


def test_trials_that_fail_stop_a_tuning(mine, tmp_path):
    with pytest.raises(ValueError, match=r"trials failed, such as prefix_lm.*--retry"):
        tune(load(str(mine)), tmp_path / "out", Simulated(tmp_path / "out", failing="prefix_lm-d8"))


def test_trials_that_diverge_count_as_infinitely_bad(mine, tmp_path):
    found, _ = tuned(load(str(mine)), tmp_path / "out", cliff=0.04)
    assert all(found.diverged(arm) > 0 for arm in LAWS)
    assert all(np.isinf(o.loss_n[o.rate_n >= 0.039]).all() for o in found.optima.values())
    assert max(found.optima.values(), key=lambda o: o.rate).rate < 0.04
    half = next(t for t in found.trials.trials if t.rate >= 0.04)
    assert found.outcomes[half.row.run_id].flops == half.row.planned["exact"] / 2, "what they spent is part of the cost"


def test_regret_is_the_loss_at_anothers_rate(mine, tmp_path):
    """On true parabolas it is the curvature times the squared log ratio of the rates."""
    found, _ = tuned(load(str(mine)), tmp_path / "out")
    rates = {**{name: law.rate for name, law in found.laws.of.items()}, DEFAULT: LEARNING_RATES[DEFAULT].rate}
    checked = 0
    for (name, arm, cell), excess in found.excess.items():
        c, a, b = LAWS[arm]
        size = found.sizes[arm, cell]
        if name != ALL and abs(off := math.log(rates[name](size) / (c * size.body_flops**a * size.tokens**b))) < 0.3:
            assert excess == pytest.approx(CURVATURE * off**2, abs=2e-3)
            checked += 1
    assert checked > 14
    r = found.regret("prefix_lm", "decoder_only")
    values = [found.excess["prefix_lm", "decoder_only", cell] for cell in found.trials.tuning.cells]
    assert r.worst == max(v for v in values if math.isfinite(v)) and r.cells + r.beyond + r.diverged == 7


def test_other_settings_are_tried_alike_and_adopted_where_they_are_better(mine, tmp_path):
    tried = {"optimizer.beta2": (0.9, 0.99), "batch": (1,)}
    tuning = replace(load(str(mine)), coordinates=tried)
    found, _ = tuned(tuning, tmp_path / "out", better="prefix_lm")
    assert len(set(found.trials.per_arm().values())) == 1
    assert sum(t.stage != "grid" for t in found.trials.trials) == 2 * 6 * 2 * (1 + 3)
    of = {arm: {(c.path, c.value): c for c in found.coordinates[arm]} for arm in LAWS}
    assert of["prefix_lm"]["optimizer.beta2", 0.99].adopted
    assert of["prefix_lm"]["optimizer.beta2", 0.99].difference == pytest.approx(-0.05, abs=3 * NOISE)
    assert not any(c.adopted for c in found.coordinates["decoder_only"])
    out = tmp_path / "out"
    made = report.write(found, source(found, out), out)
    assert made.rules["prefix_lm"].optimizer == {"beta2": 0.99} and made.rules["decoder_only"].optimizer == {}
    study = replace(sweeps.load(str(mine)), learning_rate=f"tuned:{out}/rules.json")
    assert {(row.arm, row.run.optimizer.beta2) for row in sweeps.plan(study).runs} == {
        ("prefix_lm", 0.99),
        ("decoder_only", 0.95),
    }


def test_trials_have_seeds_that_no_study_may_have(mine):
    tuning = load(str(mine))
    seeds = {row.run.seed for row in grid_trials(tuning, tuning.grids).runs}
    assert seeds == {Seed(init=TUNING_SEEDS + r, data=TUNING_SEEDS + r) for r in range(2)}
    study = replace(sweeps.load(str(mine)), learning_rate=0.01)
    for kept in (Seed(init=TUNING_SEEDS), Seed(data=TUNING_SEEDS + 5)):
        arms = {name: replace(arm, seed=kept) for name, arm in study.arms.items()}
        with pytest.raises(ValueError, match="those of tuning trials"):
            sweeps.plan(replace(study, arms=arms))
    last = Seed(init=TUNING_SEEDS - 1)
    with pytest.raises(ValueError, match="those of tuning trials"):
        sweeps.plan(replace(study, seeds=2, arms={name: replace(arm, seed=last) for name, arm in study.arms.items()}))
    with pytest.raises(ValueError, match="tuning trials have seeds of their own"):
        replace(tuning, arms={name: replace(arm, seed=Seed(init=1)) for name, arm in tuning.arms.items()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rates": (0.01, 0.02)}, "at least 3 rates in ascending order"),
        ({"rates": (0.01, 0.03, 0.02)}, "ascending"),
        ({"rates": (0.0, 0.03, 0.2)}, r"tuning\.rates = 0\.0"),
        ({"seeds": 1}, "one seed does not show the noise"),
        ({"moves": -1}, r"tuning\.moves"),
        ({"noise": math.nan}, r"tuning\.noise"),
        ({"name": "a b"}, "names a directory"),
        ({"coordinates": {"shape.D": (8,)}}, "use batch, or a field of the optimizer"),
        ({"coordinates": {"optimizer.beta3": (0.9,)}}, "did you mean 'beta"),
        ({"coordinates": {"optimizer.learning_rate": (0.9,)}}, "other than learning_rate"),
        ({"coordinates": {"optimizer.beta2": (1.5,)}}, r"coordinates optimizer\.beta2 = 1\.5, of arm prefix_lm"),
        ({"budgets": (2.0, 1.0)}, "ascending"),
    ],
)
def test_a_tuning_that_is_wrong_says_where(mine, change, message):
    with pytest.raises(ValueError, match=message):
        replace(load(str(mine)), **change)


def test_other_values_are_refused_before_any_trial_where_one_arm_has_no_such_setting(mine):
    tuning = load(str(mine))
    muon = replace(tuning.arms["decoder_only"], optimizer=Optimizer(name="muon", learning_rate=0.01))
    setting = f"optimizer.extra.{next(iter(muon.optimizer.extra))}"
    with pytest.raises(ValueError, match=r"of arm prefix_lm: .*no field"):
        replace(tuning, arms={**tuning.arms, "muon": muon}, coordinates={setting: (0.9,)})


def test_every_shipped_tuning_plans_alike_for_every_arm_and_shares_no_name_with_a_study():
    assert not set(shipped()) & set(shipped(TUNINGS)) and set(shipped(TUNINGS)) == {
        "gains",
        "ladder",
        "learning_rate",
        "zoo",
    }
    for name in shipped(TUNINGS):
        tuning = load(name)
        trials = grid_trials(tuning, tuning.grids)
        assert len(set(trials.per_arm().values())) == 1
        assert trials.to_json()["study"]["command"] == f"lab tune {name}"
    with pytest.raises(ValueError, match="this is a tuning; use `lab tune learning_rate`"):
        sweeps.load("learning_rate")
    with pytest.raises(ValueError, match="this is a study"):
        load("quickstart")
    with pytest.raises(ValueError, match="did you mean 'ladder'"):
        load("lader")


def test_the_command_shows_refuses_and_resumes(capsys, mine, written):
    code, out, _ = command(capsys, "tune", str(mine), "--dry")
    assert code == 0 and "0.08" in out and "140 runs" in out
    code, out, err = command(capsys, "tune", str(mine), "--rules", "rules/mine.json")
    assert code == 0, err
    assert rules.read(Path("rules/mine.json")) == written
    assert "rule of \\ used for" in out and 'learning_rate="tuned:mine"' in out
    for words, message in (
        (("tune", "lader"), "did you mean 'ladder'"),
        (("tune", str(mine), "--rules", "x"), "name a .json"),
    ):
        code, _, err = command(capsys, *words)
        assert code == 2 and message in " ".join(err.split())


@pytest.mark.slow
def test_a_tuning_and_its_study_end_to_end(mine):
    """Really trained: a tuning at markov's smallest, resumed, and a study whose report says what it took."""

    def lab(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "sweeps.cli.main", *words], capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    first = lab("tune", str(mine))
    made = rules.read(Path("runs/tune-mine/rules.json"))
    assert set(made.rules) == set(LAWS) and len({rule.trials for rule in made.rules.values()}) == 1
    results = {path: path.stat().st_mtime_ns for path in Path("runs/tune-mine/runs").glob("*/result.json")}
    assert len(results) == sum(rule.trials for rule in made.rules.values())
    assert lab("tune", str(mine)) == first
    assert results == {path: path.stat().st_mtime_ns for path in Path("runs/tune-mine/runs").glob("*/result.json")}
    lab("run", str(mine))
    said = lab("report", "runs/mine")
    assert "learning rates by the arms' own rules" in said and "would cost" in said and "hours of training" in said
