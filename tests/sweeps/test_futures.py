"""`lab forecast` and `lab design` as a person types them, on tables and studies with planted losses."""

import re

import numpy as np
import pandas as pd
import pytest

import sweeps
from lab import cost, plan_file, records
from sweeps import propose
from sweeps.cli import futures
from sweeps.store import Store

STUDY = """
from sweeps import Study, arm, corpus
from sweeps.ladder import ladder

def study(preset="small"):
    data = corpus("markov", allow_repeat=True)
    return Study(
        name="planted", question="?", baseline="decoder_only", budgets=(3e9, 1.2e10, 4.8e10), batch=4, window=4,
        learning_rate=0.01, sizes=ladder(8, 12, 16, 24, 32, 48, depth=2, head_width=8),
        arms={name: arm(name, data, S=8, T=8) for name in ("decoder_only", "encoder_decoder")},
    )
"""


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Two arms that cross at a known C, in the columns of somebody else."""
    rng, rows = np.random.default_rng(0), []
    for arm, (E, A, B) in {"dense": (1.9, 300, 900), "moe": (1.7, 460, 1300)}.items():
        for C in np.geomspace(1e18, 1e21, 6):
            for ratio in np.geomspace(0.25, 4, 4):
                N = 0.18 * (C / 6) ** 0.49 * ratio
                D = C / 6 / N
                loss = (E + A * N**-0.34 + B * D**-0.33) * np.exp(1e-3 * rng.standard_normal())
                rows.append({"router": arm, "params": N, "tokens": D, "eval": loss})
    path = tmp_path_factory.mktemp("table") / "runs.csv"
    pd.DataFrame(rows).to_csv(path, index=False)
    return str(path)


@pytest.fixture
def study(tmp_path):
    """A study's plan, with results as if its losses followed a law."""
    file = tmp_path / "planted.py"
    file.write_text(STUDY)
    directory, rng = tmp_path / "runs", np.random.default_rng(0)
    plan = sweeps.plan(sweeps.load(str(file)))
    Store(directory).write_plan(plan.to_json())
    for row in plan.runs:
        counted = cost.parameters(row.run.structure, row.run.shape, row.run.options, row.run.objective, 260)
        bonus = 0.97 if row.arm == "decoder_only" else 1.0
        loss = 1.0 + bonus * (11 * counted.body**-0.35 + 60 * row.planned["tokens"] ** -0.35)
        loss += 0.003 * rng.standard_normal()
        result = {
            "schema": records.SCHEMA,
            "run_id": row.run_id,
            "status": "done",
            "outcome": {"loss": loss, "bits_per_byte": loss, "loss_standard_error": 0.01, "loss_per_position": None,
                        "tokens_seen": row.planned["tokens"], "spent": dict(row.planned)},
            "parameters": {"total": counted.total, "body": counted.body, "embedding": counted.embedding},
            "planned": dict(row.planned),
        }  # fmt: skip
        records.write_json(records.run_directory(directory, row.run_id) / records.RESULT, result)
    return directory


NAMES = "N=params,D=tokens,loss=eval,arm=router"


def test_forecast_of_a_table_names_the_planted_year(table, capsys):
    futures.forecast(table, columns=NAMES, shared=("alpha", "beta"), dollars=1e4, tenfold_years=10.0, draws=200)
    out = " ".join(capsys.readouterr().out.split())
    # The frontiers are E + K (C / 6)^-(alpha beta / (alpha + beta)), with K from the amplitudes.
    alpha, beta, curves = 0.34, 0.33, {}
    for arm, (E, A, B) in {"dense": (1.9, 300, 900), "moe": (1.7, 460, 1300)}.items():
        G = (alpha * A / (beta * B)) ** (1 / (alpha + beta))
        curves[arm] = (E, A * G**-alpha + B * G**beta)
    gamma = alpha * beta / (alpha + beta)
    C = 6 * ((curves["moe"][1] - curves["dense"][1]) / (1.9 - 1.7)) ** (1 / gamma)
    year = 2026.3 + 10 * np.log10(C * 2.5 / (3600 * 989e12 * 0.4) / 1e4)
    found = re.search(r"moe overtakes dense in ([\d.]+) \(95% interval ([\d.]+) to ([\d.]+)\)", out)
    assert found, out
    middle, low, high = map(float, found.groups())
    # Over other noise the median scatters by 0.2 years.
    assert low < middle < high < low + 2 and middle == pytest.approx(year, abs=0.7)
    assert "has won by" in out and "100%" in out


def test_a_law_of_compute_is_fitted_to_the_least_losses(table, capsys):
    law = "power_law_with_asymptote"
    futures.forecast(table, columns=NAMES, law=law, shared=("gamma",), dollars=1e4, draws=200)
    out = " ".join(capsys.readouterr().out.split())
    assert "12 rows" in out and "moe overtakes dense" in out


def test_mistakes_name_the_way_out(table):
    with pytest.raises(ValueError, match=r"arm = 'mo': the runs are of dense, moe"):
        futures.forecast(table, arms=("dense", "mo"), columns=NAMES)
    with pytest.raises(ValueError, match=r"columns = 'N': write name=value"):
        futures.forecast(table, columns="N")
    with pytest.raises(ValueError, match=r"shared = 'F': chinchilla has E, A"):
        futures.forecast(table, columns=NAMES, shared=("F",))
    with pytest.raises(ValueError, match="write: only a study's directory"):
        futures.design(table, columns=NAMES, write=True)
    with pytest.raises(ValueError, match="noise is not given"):
        futures.design(truth="E=1.8,A=480,B=2100,alpha=.35,beta=.37", budgets=(1e18, 1e19))
    with pytest.raises(ValueError, match="truth: A = 'many' is not a number"):
        futures.design(truth="E=1.8,A=many", budgets=(1e18,), noise=0.01)


def test_design_before_a_study_says_what_its_grid_would_tell(capsys, tmp_path):
    truth = "E=1.82,A=478,B=2143,alpha=.347,beta=.367"
    futures.design(truth=truth, budgets=(1e18, 1e19, 1e20), noise=0.005, draws=100, out=tmp_path / "recovery.csv")
    out = capsys.readouterr().out
    assert "15 runs of chinchilla" in out and "30 runs find a difference of 1.00%" in " ".join(out.split())
    assert list(pd.read_csv(tmp_path / "recovery.csv")["quantity"])[:5] == ["E", "A", "B", "alpha", "beta"]


def test_design_after_a_table_proposes_runs_within_the_budget(table, capsys, tmp_path):
    out = tmp_path / "next.csv"
    futures.design(table, columns=NAMES, shared=("alpha", "beta"), budget_flops=1e22, runs=4, out=out, draws=200)
    made = pd.read_csv(out)
    assert 1 <= len(made) <= 4 and made["flops"].sum() <= 1e22 and (np.diff(made["cumulative"]) > 0).all()
    assert "the crossing of dense and moe" in " ".join(capsys.readouterr().out.split())


def test_design_of_a_study_extends_its_plan_by_runs_that_are_legal(study, capsys):
    before = plan_file.read(study)["runs"]
    options = {"arms": ("encoder_decoder", "decoder_only"), "shared": ("E", "alpha", "beta"), "budget_flops": 3e11,
               "runs": 3, "target": "difference", "draws": 200, "method": "sandwich"}  # fmt: skip
    futures.design(str(study), **options)
    assert plan_file.read(study)["runs"] == before and "--write adds these runs" in capsys.readouterr().out
    futures.design(str(study), write=True, **options)
    out = " ".join(capsys.readouterr().out.split())
    after = plan_file.read(study)["runs"]
    assert after[: len(before)] == before and 1 <= len(after) - len(before) <= 3
    assert "sizes within 0.00% of those asked for" in out and f"lab run {study}" in out.replace("\n", "")
    for row in propose.read(study).runs[len(before) :]:
        assert dict(row.planned) == cost.planned(row.run, 260) and abs(row.residual) <= 0.01
    # Once more, with the added runs not done yet: they are not proposed as the same runs again.
    futures.design(str(study), write=True, **options)
    runs = [row["run_id"] for row in plan_file.read(study)["runs"]]
    assert len(set(runs)) == len(runs)


def test_a_plan_without_results_is_a_grid_to_simulate_on(study, capsys):
    for result in study.glob("runs/*/result.json"):
        result.unlink()
    with pytest.raises(ValueError, match="no run has a loss yet; --truth"):
        futures.design(str(study))
    futures.design(str(study), truth="E=1,A=11,B=60,alpha=.35,beta=.35", noise=0.003, draws=100)
    out = " ".join(capsys.readouterr().out.split())
    assert "12 runs of chinchilla" in out and "24 runs find a difference of 1.00%" in out
