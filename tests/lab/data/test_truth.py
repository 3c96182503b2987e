"""The optimum on the tokens of an evaluation."""

import math
from dataclasses import replace

import pytest

from lab.data import Examples, count_windows, describe, load
from lab.data.synthetic import task
from lab.data.truth import optimum_on_evaluation
from lab.spec import Evaluation, Objective
from runs import make_run


def test_it_is_that_of_the_held_out_examples():
    corpus = "noisy_copy:symbols=4,length=3,documents=20"
    run = make_run(data=describe(corpus).data, objective=Objective(S=3, T=3), evaluation=Evaluation(examples=500))
    tokens = Examples(load(run.data), 6, seed=7).held_out(500)
    changed = (tokens[:, :3] != tokens[:, 3:]).mean()
    found = task(corpus)
    right, wrong = -math.log(0.9 + 0.1 / 4), -math.log(0.1 / 4)
    assert optimum_on_evaluation(run) == pytest.approx(changed * wrong + (1 - changed) * right)
    assert abs(optimum_on_evaluation(run) - found.loss()) < 0.1


def test_windows_of_a_task_are_its_examples():
    data = describe("copy:symbols=4,length=3,documents=20").data
    every = load(data)
    examples = Examples(every, 6, seed=0)
    assert examples.dropped == 0 and count_windows(data, 6) == (examples.windows, 682 * 20 - examples.windows)
    tokens = examples.batch(0, 64)
    assert (tokens[:, :3] == tokens[:, 3:]).all()
    for refused in (lambda: Examples(every, 5, seed=0), lambda: count_windows(data, 12)):
        with pytest.raises(ValueError, match=r"one of copy:symbols=4,length=3,documents=20 has 6: use S \+ T = 6"):
            refused()


def test_runs_without_a_truth_are_refused():
    with pytest.raises(ValueError, match="use 'lm'"):
        optimum_on_evaluation(make_run("encoder_only"))
    run = make_run()
    with pytest.raises(ValueError, match="no task 'python'"):
        optimum_on_evaluation(replace(run, data=replace(run.data, corpus="python")))
