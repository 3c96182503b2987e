"""What one change does: which pairs are alike but for one thing, and that each is judged as the pair that it is."""

import math
from dataclasses import replace
from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import synthetic
from analysis import compare
from analysis.answer import analyse
from analysis.compare import Difference
from analysis.frame import design, load
from analysis.multiplicity import holm
from analysis.report import steps_table, summary, verdict_json
from analysis.steps import alike_but_for_one, what_changes
from lab.spec import Optimizer, Options, to_json
from lab.structure import ALONE, LADDER
from runs import make_run


@pytest.fixture(scope="module")
def answer(tmp_path_factory):
    """encoder_decoder -> shared_stacks changes two things, shared_stacks -> prefix_lm -> decoder_only one each."""
    path = tmp_path_factory.mktemp("steps")
    synthetic.write(path, synthetic.Study(arms=synthetic.FOUR_ARMS, baseline="encoder_decoder"))
    return analyse(path)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(*[st.sampled_from("abc")] * 4), min_size=2, max_size=8))
def test_pairs_are_those_at_hamming_distance_one(words):
    designs = {f"arm{i}": dict(zip("wxyz", word, strict=True)) for i, word in enumerate(words)}
    found = set(alike_but_for_one(designs))
    names = list(designs)
    assert found == {(names[i], names[j]) for i, j in combinations(range(len(words)), 2)
                     if sum(a != b for a, b in zip(words[i], words[j], strict=True)) == 1}  # fmt: skip


def test_what_is_one_thing():
    def pairs(**runs):
        designs = {name: design(to_json(run)) for name, run in runs.items()}
        return [what_changes(designs, *pair) for pair in alike_but_for_one(designs)]

    base = make_run()
    other = Optimizer(learning_rate=0.5 * base.optimizer.learning_rate)
    assert pairs(a=base, b=make_run(optimizer=other)) == []  # nothing: every run has a rate of its own
    assert pairs(a=base, b=make_run(options=Options(mlp="gelu"), optimizer=other)) == ["mlp: swiglu -> gelu"]
    assert pairs(a=base, b=make_run(options=Options(mlp="gelu", norm="layer"))) == []
    apart = make_run("encoder_decoder")
    assert pairs(a=apart, b=replace(apart, shape=replace(apart.shape, L=2 * apart.shape.L))) == []  # a depth
    assert pairs(a=base, b=make_run(optimizer=Optimizer(name="lion", learning_rate=1e-3))) == []  # with all its numbers


def test_chungs_ladder_is_five_steps_and_four_dials():
    """Every rung changes one thing; each dial alone is one from the encoder-decoder, whose merged cross-attention is a rung."""
    arms = {name: design(to_json(make_run(name))) for name in LADDER} | {
        name: design(to_json(make_run(structure))) for name, structure in ALONE.items()
    }
    found = {pair: what_changes(arms, *pair) for pair in alike_but_for_one(arms)}
    rungs = list(LADDER)
    assert all(pair in found for pair in pairwise(rungs))
    assert all(("encoder_decoder", name) in found for name in ALONE)
    assert found["prefix_lm", "decoder_only"] == "inputs: bidirectional -> causal"
    assert found["shared_stacks", "prefix_lm"] == "memory: final -> same"


def test_a_step_is_the_difference_of_its_two_arms(answer):
    made = {(step.before, step.arm): step for step in answer.steps}
    assert set(made) == {("shared_stacks", "prefix_lm"), ("prefix_lm", "decoder_only")}
    for (before, arm), step in made.items():
        assert len(step.differences) == len(answer.budgets)
        largest, pair = step.differences[-1], answer.pairs[before, arm]
        assert isinstance(largest, Difference) and isinstance(pair, Difference)
        assert largest.value == pytest.approx(-pair.value) and largest.standard_error == pytest.approx(
            pair.standard_error
        )
        for budget, d in zip(answer.budgets, step.differences, strict=True):
            own = {name: answer.differences.get((name, budget)) for name in (before, arm)}
            assert d.value == pytest.approx(own[arm].value - own[before].value)  # both against the encoder-decoder
            assert d.p <= d.p_holm <= min(1.0, 2 * len(answer.budgets) * d.p + 1e-12) and math.isfinite(d.detectable)


def test_steps_are_on_the_page_in_the_json_and_in_words(answer, tmp_path):
    heads, *rows = steps_table(answer)
    assert heads[:3] == ["from", "to", "what changes"] and len(heads) == 3 + len(answer.budgets) and len(rows) == 2
    (step, _), (written, _) = answer.steps, verdict_json(answer)["steps"]
    assert written["what"] == step.what and written["differences"][0]["value"] == step.differences[0].value
    synthetic.write(tmp_path, synthetic.Study(arms=synthetic.FOUR_ARMS, baseline="encoder_decoder"))
    assert f"shared_stacks -> prefix_lm ({step.what}) at" in summary(tmp_path)
    two = {name: synthetic.FOUR_ARMS[name] for name in ("encoder_decoder", "decoder_only")}
    synthetic.write(tmp_path / "two", synthetic.Study(arms=two, baseline="decoder_only"))
    assert analyse(tmp_path / "two").steps == () and "one thing at a time" not in summary(tmp_path / "two")
    assert list(load(tmp_path / "two").attrs["designs"]) == ["encoder_decoder", "decoder_only"]


def test_a_study_may_name_its_own(tmp_path):
    """Then those alone are looked at, and corrected for."""
    pairs = [["encoder_decoder", "decoder_only"]]
    study = synthetic.Study(arms=synthetic.FOUR_ARMS, baseline="decoder_only", header={"steps": pairs})
    synthetic.write(tmp_path, study)
    (step,) = analyse(tmp_path).steps
    assert step.what == (
        "cross: separate -> merged, stacks: separate -> shared, memory: final -> same, inputs: bidirectional -> causal"
    )
    assert [d.p_holm for d in step.differences] == pytest.approx(holm([d.p for d in step.differences]))


def test_a_step_is_read_under_another_count_of_flops_as_if_its_first_arm_were_the_baseline(answer):
    assert {row.arm for row in answer.sensitivity if "->" in row.arm} == {
        "shared_stacks -> prefix_lm",
        "prefix_lm -> decoder_only",
    }
    for step in answer.steps:
        frame = answer.frame.copy()
        frame.attrs = answer.frame.attrs | {"study": answer.study | {"baseline": step.before}}
        compared = compare.differences(frame, answer.minima, answer.noise)
        direct = {r.convention: r for r in compare.readings(frame, answer.minima, compared) if r.arm == step.arm}
        assert {r.convention for r in step.readings} == direct.keys() > {"exact", "textbook"}
        for reading in step.readings:
            assert reading.value == pytest.approx(direct[reading.convention].value, abs=1e-12)
            assert reading.beyond == direct[reading.convention].beyond
        (exact,) = (r for r in step.readings if r.convention == "exact")
        assert exact.value == pytest.approx(step.differences[-1].value, abs=1e-3) and not exact.flips
