"""A table of runs to one typed verdict for each arm."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis.arms import compare_arms
from analysis.compare import Difference
from analysis.crossing import Crossing
from analysis.gain import Gain
from analysis.in_range import InRange, in_range
from analysis.nested import Nested
from analysis.noise import Noise
from analysis.refusal import Refusal, Refused
from simulated_arms import C_RANGE, CROSSES, DESIGNS, aa_rates, crossing_rates, grid, noise, steeper
from simulated_coverage import TRUTH, optimum
from sweeps.cli.arms import compare

# pandas' own annotations lose the type of a column; its errors are not this file's.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false

DATA = Path(__file__).parents[3] / "shared" / "data"
BETTER = {**TRUTH, "A": 0.9 * TRUTH["A"], "B": 0.93 * TRUTH["B"]}
QUICK = {"null_draws": 99, "draws": 300, "hold_out": False}


def runs(laws, *, sd=0.002, seed=0, off=1.0):
    """A frame with users' names for columns; `off` shifts the budgets of every other arm than the first."""
    table = grid(laws, budgets=4, sizes=5)
    table["D"] = table["D"] * np.where(table["arm"] == next(iter(laws)), 1.0, off)
    N, D = table["N"], table["D"]
    p = {name: np.array([laws[a][name] for a in table["arm"]]) for name in TRUTH}
    clean = np.log(p["E"] + p["A"] * N ** -p["alpha"] + p["B"] * D ** -p["beta"])
    losses = np.exp(clean + noise(table, 1, np.random.default_rng(seed), 1, sd)[0])
    return pd.DataFrame({"router": table["arm"], "params": N, "tokens": D, "loss": losses})


NAMES = {"columns": {"N": "params", "D": "tokens"}, "arm": "router", "baseline": "base"}


def test_an_arm_that_is_better_by_all_that_is_measured():
    table = runs({"base": TRUTH, "arm": BETTER, "worse": {**TRUTH, "E": TRUTH["E"] + 0.05}})
    answer = compare_arms(table, **NAMES, **QUICK)
    assert [v.kind for v in answer.verdicts] == ["A better", "B better"]
    pair = answer.pairs["arm"]
    for C, d in pair.measured.items():
        assert isinstance(d, Difference) and d.low < optimum(BETTER, C)[1] - optimum(TRUTH, C)[1] < d.high
    assert (
        isinstance(pair.nested, Nested)
        and pair.nested.selected == "shared exponents"
        and pair.p_bh <= pair.p_holm < 0.05
    )
    assert isinstance(pair.by_law, dict)
    last = list(pair.by_law.values())[-1]
    truth = optimum(BETTER, last.budget)[1] - optimum(TRUTH, last.budget)[1]
    assert last.low < truth < last.high and last.high - last.low < 0.7 * (d.high - d.low)
    # Curves of shared exponents do not cross; the measured differences say the same.
    assert isinstance(pair.crossing, Crossing) and pair.crossing.median is None
    assert isinstance(pair.gain, Gain) and isinstance(pair.pinned, Gain)
    at = np.geomspace(1e20, 1e23, 3001)
    truth = at[np.argmin(np.abs(optimum(TRUTH, at)[1] - optimum(BETTER, 1e21)[1]))] / 1e21
    assert pair.gain.low < truth < pair.gain.high and pair.gain.extrapolated
    # The pinned speed-up on the baseline's own curve is the same number, by another way.
    assert pair.pinned.value == pytest.approx(pair.gain.value, rel=0.01)
    said = str(answer)
    for phrase in ("[A better] arm is better than base by", "shared exponents", "Benjamini-Hochberg", "ranks:"):
        assert phrase in said


def test_a_planted_crossing_is_a_verdict_with_its_place():
    answer = compare_arms(runs({"base": TRUTH, "arm": steeper()}), **NAMES, **QUICK)
    said, pair = answer.verdicts[0], answer.pairs["arm"]
    assert said.kind == "crosses at" and said.at == pytest.approx(CROSSES, rel=0.2)
    assert isinstance(pair.crossing, Crossing) and pair.crossing.low < CROSSES < pair.crossing.high


def test_equivalence_needs_a_margin_and_reports_its_bound():
    table = runs({"base": TRUTH, "arm": TRUTH}, sd=0.0005)
    with_margin = compare_arms(table, None, **NAMES, margin=0.02).verdicts[0]
    assert with_margin.kind == "no difference larger than" and 0.0005 < with_margin.bound < 0.02
    tight = compare_arms(table, None, **NAMES, margin=with_margin.bound * 0.99).verdicts[0]
    assert tight.kind == "not resolved" == compare_arms(table, None, **NAMES).verdicts[0].kind
    # A difference that is sure and does not matter: within the margin it is no difference.
    small = runs({"base": TRUTH, "arm": {**TRUTH, "E": TRUTH["E"] - 0.004}}, sd=0.0003)
    assert compare_arms(small, None, **NAMES).verdicts[0].kind == "A better"
    within = compare_arms(small, None, **NAMES, margin=0.01).verdicts[0]
    assert within.kind == "no difference larger than" and "arm is better than base by 0.004" in within.detail
    with pytest.raises(ValueError, match="margin = -1"):
        compare_arms(table, None, **NAMES, margin=-1)


def test_without_a_common_budget_the_law_decides_and_says_so():
    better = compare_arms(runs({"base": TRUTH, "arm": BETTER}, off=1.3), **NAMES, **QUICK)
    said = better.verdicts[0]
    assert isinstance(better.in_range, Refused) and said.kind == "A better" and "by the fitted law" in said.sentence
    refused = compare_arms(runs({"base": TRUTH, "arm": BETTER}, off=1.3), None, **NAMES).verdicts[0]
    assert refused.kind == "refused" and "no law was asked for" in refused.sentence
    apart = compare_arms(runs({"base": TRUTH, "arm": BETTER}, off=1e4), **NAMES, **QUICK).verdicts[0]
    assert apart.kind == "refused" and "overlaps" in apart.sentence


def test_runs_that_are_not_independent_need_clusters():
    table = runs({"base": TRUTH, "arm": TRUTH}).assign(run_id=np.arange(40) // 2)
    with pytest.raises(Refusal, match="run_id '0' has 2 rows"):
        compare_arms(table, None, **NAMES)
    answer = compare_arms(table, **NAMES, **QUICK, clusters="run_id")
    assert isinstance(answer.pairs["arm"].nested, Nested) and "20 clusters" in answer.pairs["arm"].nested.null


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"baseline": "bse"}, "did you mean 'base'"),
        ({"arm": "ruter"}, "did you mean 'router'"),
        ({"columns": {"N": "parms", "D": "tokens"}}, "parms"),
        ({"clusters": [1, 2]}, "2 labels"),
    ],
)
def test_mistakes_say_the_way_out(change, said):
    with pytest.raises(ValueError, match=said):
        compare_arms(runs({"base": TRUTH, "arm": TRUTH}), **{**NAMES, **change})


def test_losses_of_different_things_are_not_compared():
    table = runs({"base": TRUTH, "arm": TRUTH})
    table["measure"] = ["128 tokens of text, targets after 64"] * len(table["loss"])
    assert compare_arms(table, None, **NAMES).pairs
    table["measure"] = [f"targets after {32 if name == 'arm' else 64}" for name in table[NAMES["arm"]]]
    with pytest.raises(
        ValueError, match=r"different things \(targets after 32; targets after 64\); .*evaluation\.splits"
    ):
        compare_arms(table, None, **NAMES)


def test_noise_is_of_replicates_of_parabolas_or_of_the_differences():
    """Every way to know the noise of a run recovers the planted 0.01 nats."""
    rng = np.random.default_rng(0)
    C = np.geomspace(1e18, 1e21, 30)

    def found(copies, sizes):
        N, c, arm, _ = (a.ravel() for a in np.meshgrid(sizes, C, ["a", "b"], range(copies), indexing="ij"))
        c = c.astype(float)
        N = N.astype(float) * np.sqrt(c / 1e18) * 1e7
        loss = 3 + 0.02 * np.log(N / (2e7 * np.sqrt(c / 1e18))) ** 2 + 0.01 * rng.standard_normal(len(c))
        return in_range({"C": c, "N": N, "arm": arm, "loss": loss}, arms=["a", "b"], baseline="a")

    for copies, sizes, source in ((2, [1.0, 2.0, 4.0], "replicates"), (1, [0.5, 1.0, 2.0, 4.0, 8.0], "parabolas"),
                                  (1, [2.0], "line in log C")):  # fmt: skip
        answer = found(copies, sizes)
        assert source in answer.noise_source and isinstance(answer.noise, Noise)
        assert answer.noise.sd == pytest.approx(0.01, rel=0.35)
        assert len(answer.of("b")) == 30
    few = in_range({"C": C[[0, 1, 0, 1]], "N": C[[0, 1, 0, 1]], "arm": np.array(list("aabb")), "loss": np.array([3, 2, 3, 2.0])},
                   arms=["a", "b"], baseline="a")  # fmt: skip
    assert isinstance(few.noise, Refused) and "noise of a run is unknown" in few.noise.reason


def test_arms_that_are_alike_are_called_different_at_no_more_than_the_nominal_rate():
    simulations = 80
    assert aa_rates("measured", simulations) * simulations <= stats.binom.ppf(0.995, simulations, 0.05)


def test_the_interval_of_a_planted_crossing_covers_it():
    simulations = 60
    found = crossing_rates(simulations, draws=300)
    low, high = stats.binom.ppf([0.005, 0.995], simulations, 0.95)
    assert low <= found["95% interval contains it"] * simulations <= high
    assert found["located inside the data"] > 0.9
    assert C_RANGE[0] < CROSSES < C_RANGE[1] and DESIGNS["independent"][2] == 1


def test_the_command(tmp_path, capsys):
    runs({"base": TRUTH, "arm": BETTER}).to_csv(tmp_path / "runs.csv", index=False)
    compare(str(tmp_path / "runs.csv"), baseline="base", columns="N=params,D=tokens", arm="router", margin=0.001, null_draws=99,
            draws=300, hold_out=False, out=tmp_path / "differences.csv")  # fmt: skip
    shown = capsys.readouterr().out
    assert shown.startswith("[A better] arm is better than base by") and "iso-FLOP minimum" in shown
    table = pd.read_csv(tmp_path / "differences.csv")
    assert len(table) == 4 + 3 and (table["low"] < table["difference"]).all()
    with pytest.raises(ValueError, match="did you mean 'base'"):
        compare(str(tmp_path / "runs.csv"), baseline="bas", columns="N=params,D=tokens,arm=router")


@pytest.mark.published
def test_dense_against_three_routers():
    """Clark et al. 2022 (arXiv:2202.01169): with 64 experts every router beats the dense model at all sizes of the grid, and
    by less the larger the model is; S-Base and RL-R beat Hash."""
    path = DATA / "dm_routing" / "final_step.csv"
    if not path.exists():
        pytest.skip(f"needs published data at {path}")
    table = pd.read_csv(path)
    assert len(table) == 223
    table = table[(table["k"] == 1) & (table["routing_frequency"] == 0.5)]
    table = table[(table["router_type"] == "Dense") | (table["num_experts"] == 64)]
    table = table.drop_duplicates(["router_type", "dense_parameter_count", "seed", "num_experts"])
    table = table.assign(C=table["flops_per_step"] * 249_000)
    answer = compare_arms(
        table, "power_law", baseline="Dense", arm="router_type", loss="loss_validation",
        columns={"N": "dense_parameter_count"}, run_id="hyper_id", **QUICK,
    )  # fmt: skip
    assert {v.arm: v.kind for v in answer.verdicts} == dict.fromkeys(["S-Base", "RL-R", "Hash"], "A better")
    assert isinstance(answer.in_range, InRange) and "replicates (2" in answer.in_range.noise_source
    assert all(verdict.sentence.endswith("at the same size.") for verdict in answer.verdicts)
    at_end = {}
    for name, pair in answer.pairs.items():
        values = [d.value for d in pair.measured.values() if isinstance(d, Difference)]
        assert len(values) == 6 and all(value < 0 for value in values)
        assert abs(values[-1]) < 0.6 * abs(values[0])
        assert (
            isinstance(pair.nested, Nested) and pair.nested.selected == "separate"
        )  # the slope is flatter with experts
        at_end[name] = values[-1]
    assert at_end["S-Base"] < at_end["Hash"] and at_end["RL-R"] < at_end["Hash"]
