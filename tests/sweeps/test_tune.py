"""A tuning from its first trial to a study that takes its rules. Trials are simulated from a law that is known; one tuning is
really trained (slow)."""

import csv
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_cli import run as command

import sweeps
from lab import plan_file, records
from lab.spec import Seed
from sweeps.ladder import LEARNING_RATES, Size
from sweeps.store import Store
from sweeps.study import TUNING_SEEDS, TUNINGS, shipped
from sweeps.tune import report, rules
from sweeps.tune.conclude import ALL, DEFAULT, Tuned
from sweeps.tune.rounds import source, tune
from sweeps.tune.trials import grid_trials
from sweeps.tune.tuning import Tuning, load

MINE = """
from sweeps import Study, Tuning, arm, corpus
from sweeps.ladder import ladder, shape

def arms():
    data = corpus("markov")
    return {name: arm(name, data, S=8, T=8) for name in ("prefix_lm", "decoder_only")}

def tuning(preset="small"):
    return Tuning(name="mine", arms=arms(), budgets=(1e8, 4e8), sizes=ladder(8, 16, 24, depth=1, head_width=8), batch=2,
                  rates=(0.005, 0.01, 0.02, 0.04, 0.08), hold_out=(4e8, shape(32, 1, head_width=8)))

def study(preset="small"):
    return Study(name="mine", question="?", arms=arms(), baseline="decoder_only", budgets=(1e8, 4e8), window=3, batch=2,
                 sizes=ladder(8, 16, 24, depth=1, head_width=8), learning_rate="tuned:runs/tune-mine/rules.json")
"""
# Of each arm: its best rate is c size^a tokens^b, and losses are CURVATURE (log rate - log best)^2 above 2.
LAWS = {"prefix_lm": (1.2, -0.4, 0.0), "decoder_only": (0.4, -0.35, 0.02)}
CURVATURE, NOISE = 0.2, 1e-4


@pytest.fixture
def mine(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path / "mine.py"


class Simulated:
    """Trains in no time what has not ended: losses of the law, diverged from `cliff` on. `ask` are the plans it was given."""

    def __init__(
        self, out: Path, laws=LAWS, cliff: float = math.inf, better: str = "", left: int = 0, failing: str = ""
    ):
        self.out, self.laws, self.cliff, self.better, self.left, self.failing = out, laws, cliff, better, left, failing
        self.asked: list[sweeps.Plan] = []

    def __call__(self, plan: sweeps.Plan) -> None:
        self.asked.append(plan)
        store = Store(self.out)
        store.write_plan(plan.to_json())
        for row in list(plan.unique.values())[: len(plan.unique) - self.left]:
            run_dir = records.run_directory(self.out, row.run_id)
            if row.run_id.startswith(self.failing) and self.failing:
                claim = store.claim(row.run_id)
                assert claim is not None
                store.fail(claim, "broken")
            elif not (run_dir / records.RESULT).exists():
                records.write_json(run_dir / records.RESULT, self.result(row))

    def result(self, row) -> dict:
        (c, a, b), size = self.laws[row.arm], Size.of(row.run, row.run.V)
        best = c * size.body_flops**a * size.tokens**b
        rng = np.random.default_rng(int(row.run_id[-8:], 16))
        rate = row.run.optimizer.learning_rate
        loss = 2 + CURVATURE * math.log(rate / best) ** 2 + NOISE * rng.standard_normal() + 0.1 * row.replicate
        loss -= 0.05 if self.better == row.arm and row.run.optimizer.beta2 == 0.99 else 0.0
        lost = rate >= self.cliff
        spent = {"exact": row.planned["exact"] / (2 if lost else 1)}
        return {"schema": 1, "run_id": row.run_id, "status": "diverged" if lost else "done",
                "outcome": {"loss": None if lost else loss, "spent": spent, "steps": row.planned["steps"]},
                "measured": {"seconds": 36.0, "versions": {"jax": "0"}, "device": "none"}}  # fmt: skip


def tuned(tuning: Tuning, out: Path, **how) -> tuple[Tuned, Simulated]:
    train = Simulated(out, **how)
    found = tune(tuning, out, train)
    assert found is not None
    return found, train


@pytest.fixture
def written(mine) -> rules.Rules:
    """The rules of a simulated tuning, in runs/tune-mine."""
    out = Path("runs/tune-mine")
    found, _ = tuned(load(str(mine)), out)
    return report.write(found, source(found, out), out)


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
        ({"budgets": (2.0, 1.0)}, "ascending"),
    ],
)
def test_a_tuning_that_is_wrong_says_where(mine, change, message):
    with pytest.raises(ValueError, match=message):
        replace(load(str(mine)), **change)


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


# --- the file, and a study that takes it ----------------------------------------------------------------------------


def test_rules_are_read_as_they_were_written(written):
    path = Path("runs/tune-mine/rules.json")
    assert rules.read(path) == written
    content = json.loads(path.read_text())
    assert content["schema"] == 1 and content["source"]["command"].startswith("lab tune ")
    assert content["rules"]["prefix_lm"]["cells"][-1]["held_out"] is True
    assert len(plan_file.read(path.parent)["runs"]) == 2 * content["rules"]["prefix_lm"]["trials"]
    page = (path.parent / "tuning.md").read_text()
    assert (
        "| decoder_only |" in page
        and "Regret of sharing" in page
        and "Held out" in page
        and "hours of training" in page
    )
    with (path.parent / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * written.rules["prefix_lm"].trials and {row["status"] for row in rows} == {"done"}
    with (path.parent / "regret.csv").open() as file:
        assert {row["rule"] for row in csv.DictReader(file)} == {*LAWS, ALL, DEFAULT}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(schema=2), "schema = 2: this version reads 1"),
        (lambda c: c.update(ruls={}), r"unknown key ruls: did you mean 'rules'"),
        (lambda c: c["source"].pop("plan_sha256"), r"missing key source\.plan_sha256: a file of rules is complete"),
        (lambda c: c["rules"]["prefix_lm"].update(trials="70"), r"rules\.prefix_lm\.trials = '70': use int"),
        (lambda c: c["rules"]["prefix_lm"].update(trials=True), r"rules\.prefix_lm\.trials = True: use int"),
        (lambda c: c["rules"]["prefix_lm"].update(form="c size"), "use one of"),
        (lambda c: c["rules"]["prefix_lm"].update(c=c["rules"]["prefix_lm"]["c"] * 2), "c, a and b give"),
        (lambda c: c["rules"]["prefix_lm"].update(form="c size^a"), "the form 'c size.a' has none"),
        (lambda c: c["rules"]["prefix_lm"].update(a_interval=[1.0]), "use a list of 2"),
        (lambda c: c["rules"]["prefix_lm"]["cells"][2].update(rate=None), r"cells\[2\]\.rate = None: use float"),
        (lambda c: c["regret"].pop("prefix_lm"), r"regret\.prefix_lm"),
        (lambda c: c["rules"]["prefix_lm"].update(flops=math.nan), "NaN is no JSON number"),
    ],
)
def test_a_file_of_rules_that_is_wrong_says_where(written, change, message):
    path = Path("runs/tune-mine/rules.json")
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as raised:
        rules.read(path)
    assert str(path) in str(raised.value)


def test_each_arm_of_a_study_has_the_rate_of_its_own_rule(mine, written):
    plan = sweeps.plan(sweeps.load(str(mine)))
    for row in plan.runs:
        rule, size = written.rules[row.arm], Size.of(row.run, row.run.V)
        expected = rule.c * size.body_flops**rule.a * size.tokens**rule.b
        assert row.run.optimizer.learning_rate == pytest.approx(expected, rel=1e-5)
        assert max(row.run.seed.init, row.run.seed.data) < TUNING_SEEDS
    assert not any("extrapolates" in said for said in plan.warnings), plan.warnings
    about = plan.to_json()["study"]
    assert about["learning_rates"]["arms"]["prefix_lm"]["trials"] == written.rules["prefix_lm"].trials
    assert about["learning_rates"]["source"]["plan_sha256"] == written.source.plan_sha256
    notes = "\n".join(about["notes"])
    for said in ("learning rates by the arms' own rules (tuned:runs/tune-mine/", "tuned alike, by 7", "no run of a study",
                 "decoder_only's rule for all arms would cost", "known within a factor of 1"):  # fmt: skip
        assert said in notes, notes


def test_beyond_the_tuned_cells_a_rule_warns_and_says_how_little_it_knows(mine, written):
    study = sweeps.load(str(mine))
    near, far = (sweeps.plan(replace(study, budgets=b)).warnings for b in ((1e8, 4e8), (1e9, 6.4e9)))
    assert any("extrapolates in tokens and is asked at" in said for said in far) and not any(
        "extrap" in s for s in near
    )
    rule, size = written.rules["prefix_lm"], Size(body_flops=1e6, body_parameters=1, tokens=1e9)
    X = np.array([[1, math.log(c.size), math.log(c.tokens)] for c in rule.cells if not c.held_out])
    x = np.array([1, math.log(1e6), math.log(1e9)])
    assert rule.scatter is not None and rule.dof == 6
    sd = rule.scatter * math.sqrt(x @ np.linalg.inv(X.T @ X) @ x)
    assert rule.within(size) == pytest.approx(math.exp(2.446912 * sd), rel=1e-4)  # t of 6 degrees of freedom at 97.5%


def test_an_arm_without_a_rule_is_an_error_with_a_way_out(mine, written):
    study = sweeps.load(str(mine))
    more = replace(study, arms={**study.arms, "again": study.arms["prefix_lm"]})
    with pytest.raises(ValueError, match=r"arm 'again' has no rule .*rules=\{'again': 'prefix_lm'\}"):
        sweeps.plan(more)
    plan = sweeps.plan(replace(more, rules={"again": "prefix_lm"}))
    rates = {arm: [r.run.optimizer.learning_rate for r in plan.runs if r.arm == arm] for arm in more.arms}
    assert rates["again"] == rates["prefix_lm"] != rates["decoder_only"]
    assert any("again" in said and "(the rule of prefix_lm)" in said for said in plan.warnings)
    swapped = replace(study, arms={**study.arms, "prefix_lm": study.arms["decoder_only"]})
    with pytest.raises(ValueError, match=r"structure of arm 'prefix_lm' is 'decoder_only', .* of 'prefix_lm'; say so"):
        sweeps.plan(swapped)
    assert sweeps.plan(replace(swapped, rules={"prefix_lm": "prefix_lm"})).runs
    with pytest.raises(ValueError, match=r"study\.rules = 'prefix': did you mean 'prefix_lm'"):
        replace(study, rules={"prefix": "prefix_lm"})
    with pytest.raises(ValueError, match="only learning_rate = 'tuned:NAME'"):
        replace(study, learning_rate="lab", rules={"prefix_lm": "decoder_only"})
    with pytest.raises(ValueError, match=r"no file nowhere\.json in sweeps/rules"):
        sweeps.plan(replace(study, learning_rate="tuned:nowhere"))
    with pytest.raises(ValueError, match=r"nowhere\.json: not a readable JSON file"):
        sweeps.plan(replace(study, learning_rate="tuned:nowhere.json"))


def test_arms_that_were_tuned_by_unequal_numbers_of_trials_are_refused(mine, written):
    study, path = sweeps.load(str(mine)), Path("runs/tune-mine/unequal.json")
    fewer = replace(written.rules["prefix_lm"], trials=10)
    rules.write(path, replace(written, rules={**written.rules, "prefix_lm": fewer}))
    unequal = replace(study, learning_rate=f"tuned:{path}")
    with pytest.raises(ValueError, match=r"prefix_lm was tuned by 10 trials and its baseline decoder_only by 7"):
        sweeps.plan(unequal)
    assert sweeps.plan(replace(unequal, rules={"prefix_lm": "decoder_only"})).runs


def test_other_settings_than_the_tuned_ones_are_said(mine, written):
    study = sweeps.load(str(mine))
    said = "\n".join(sweeps.plan(replace(study, batch=1)).warnings)
    assert "tuned with other settings than this study's: batch 1 in place of 2" in said


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
