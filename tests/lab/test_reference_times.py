"""The ledger against No Train No Gain's published reference times, by pure simulation; tables that are refused."""

import json
from dataclasses import replace

import pytest

from lab import cost, reference_times
from lab.ledger import Ledger, simulated
from lab.spec import Objective, Optimizer, Run, Shape, from_json, to_json
from lab.technique import Technique
from runs import make_run

DAY = 24 * 3600.0
# What each method's updates are to the baseline's, worked out from the published tables (BERT, T5).
STACKING, DROPPING, SOPHIA = (1.465, 1.478), (1.335, 1.331), (0.952, 1 / 1.121)


def bert(table: str = "ntng-bert", amount: float = DAY, **parts) -> Run:
    shape = Shape(D=768, F=3072, N=12, K=12, H=64, L=16, L_input=16)
    return make_run("encoder_only", shape=shape, objective=Objective(name="masked_lm", S=128, T=19), batch=1536,
                    budget=reference_times.budget(table, amount), **parts)  # fmt: skip


def t5(amount: float = DAY, **parts) -> Run:
    shape = Shape(D=768, F=2048, N=12, K=12, H=64, L=12, L_input=12)
    parts = {"optimizer": Optimizer(name="adamw_scale", learning_rate=0.02), **parts}
    return make_run("encoder_decoder", shape=shape, objective=Objective(S=512, T=114), batch=144,
                    budget=reference_times.budget("ntng-t5", amount), **parts)  # fmt: skip


def updates(run: Run) -> int:
    return int(cost.planned(run, run.V)["steps"])


def technique(name: str, charged: bool = True, **settings) -> Technique:
    return Technique(name=name, charged=charged, settings=settings)


@pytest.mark.parametrize(("hours", "of_bert", "of_t5"), [(6, 7989, 20950), (12, 15978, 41901), (24, 31957, 83802)])
def test_updates_of_the_baselines(hours, of_bert, of_t5):
    """The published counts stop before the step that would end beyond; whole steps nearest to the budget are within one."""
    assert abs(updates(bert(amount=hours * 3600.0)) - of_bert) <= 1
    assert abs(updates(t5(hours * 3600.0)) - of_t5) <= 1


@pytest.mark.parametrize(
    ("run", "ratio"),
    [
        (bert(technique=technique("stacking")), STACKING[0]),
        (t5(technique=technique("stacking")), STACKING[1]),
        (bert(technique=technique("layer_dropping")), DROPPING[0]),
        (bert("ntng-bert-corrected", technique=technique("layer_dropping")), 1.331),
        (t5(technique=technique("layer_dropping", gamma=20.0)), DROPPING[1]),
        (bert(technique=technique("selective_backprop")), 0.548),
        (bert(technique=technique("rho_loss", holdout_charged=0)), 0.548),
        (bert(technique=technique("rho_loss", mega_batch=10, holdout_charged=0)), 0.195),
        (bert(optimizer=Optimizer(name="sophia_g", learning_rate=4e-4)), SOPHIA[0]),
        (t5(optimizer=Optimizer(name="sophia_g", learning_rate=1e-3)), SOPHIA[1]),
        (bert(technique=technique("selective_backprop", beta=2.0)), 1 / 2.24),
        (bert(technique=technique("selective_backprop", beta=3.0)), 1 / 2.65),
    ],
    ids=lambda x: f"{x.structure.name}-{(x.technique or x.optimizer).name}" if isinstance(x, Run) else str(x),
)  # fmt: skip
def test_updates_relative_to_the_baseline(run, ratio):
    base = replace(run, technique=None, optimizer=(bert() if run.structure.encoder_only else t5()).optimizer)
    assert updates(run) / updates(base) == pytest.approx(ratio, abs=0.002)


def test_selection_that_is_free_makes_182_times_as_many_updates():
    for name, settings in (("rho_loss", {"holdout_charged": 0}), ("selective_backprop", {})):
        charged, free = (updates(bert(technique=technique(name, c, **settings))) for c in (True, False))
        assert free / charged == pytest.approx(1.824, abs=0.002)
        assert abs(free - updates(bert())) <= 1


def test_the_holdout_models_training_is_charged_by_default():
    """A quarter of the budget trains it, and what is left pays for its forward passes too: 2 x 2 of 0.412, and an update."""
    run = bert(technique=technique("rho_loss"))
    of_holdout, chosen = 0.25, 0.75 / (1 + 4 * 0.09285 / 0.2253)
    assert updates(run) / updates(bert()) == pytest.approx(of_holdout + chosen, abs=0.001)


def test_planned_seconds_are_spent_to_the_last_digit():
    run = t5(3600.0, technique=technique("layer_dropping"))
    ledger, planned = Ledger(run, run.V), cost.planned(run, run.V)
    while ledger.fits:
        ledger.charge()
    assert ledger.spent == planned == simulated(run, run.V).spent
    assert abs(planned["reference_seconds"] - 3600) <= 1.031 / 2


def test_a_run_refers_to_its_table_by_content(tmp_path):
    path = tmp_path / "times.json"
    path.write_bytes(reference_times.shipped()["ntng-bert"].read_bytes())
    moved = replace(bert(), budget=reference_times.budget(path, DAY))
    assert moved.run_id == bert().run_id != bert("ntng-bert-corrected").run_id
    assert from_json(json.loads(json.dumps(to_json(moved)))) == moved
    path.write_text(path.read_text().replace("0.2253", "0.2254"))
    reference_times._of.cache_clear()
    with pytest.raises(ValueError, match="another table"):
        cost.planned(replace(moved, seed=replace(moved.seed, data=7)), moved.V)


@pytest.mark.parametrize(
    ("run", "key"),
    [
        (replace(bert(), batch=100), r"encoder_only-d768-128\+19-f32-[0-9a-f]{8}/train/16 x100"),
        (replace(t5(), batch=288), "/train/12 x288"),
        (bert(optimizer=Optimizer(name="muon", learning_rate=0.02)), "/update/muon,iterations=5/16 x0"),
        (bert(technique=technique("ema")), "/average/ema/16 x0"),
        (bert(technique=technique("stacking", doublings=3)), "/update/adamw/2 x0"),
    ],
)
def test_what_a_table_lacks_is_refused_by_its_key(run, key):
    with pytest.raises(ValueError, match=f"has no reference time of .*{key}"):
        cost.planned(run, run.V)


def test_tables_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'ntng-bert'"):
        reference_times.read("ntng-brt")
    for text, match in (("{}", "not a table"), ('{"schema": 1, "entries": {"*/train/1 x1": -1}, "microbatch": true, '
                        '"machine": {}, "source": ""}', "'.*/train/1 x1' is -1.0")):  # fmt: skip
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=match):
            reference_times.read(tmp_path / "bad.json")
        reference_times._read.cache_clear()
    with pytest.raises(ValueError, match=r"budget\.reference = None: a budget of reference_seconds"):
        replace(bert().budget, reference=None)
