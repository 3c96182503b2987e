"""One run: resumed bit for bit, ended honestly, the same numbers as worked out by hand."""

import contextlib
import functools
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import jax
import numpy as np
import pytest

import lab.data.pairs
from lab import attempt, cost, evaluate, hardware, records
from lab.batches import Batches
from lab.data import Examples, describe, load
from lab.data.prepare import Corpus
from lab.data.tokenizers import TOKENIZERS
from lab.execution import Execution
from lab.forms import Course, forms
from lab.objectives import build, corrupted
from lab.preemption import Preempted, Superseded
from lab.program import program, token_losses
from lab.spec import Budget, Evaluation, Objective, Optimizer, Run, to_json
from lab.structure import LADDER, STRUCTURES
from lab.technique import Technique
from lab.train import restore_parameters, train, train_together
from runs import make_run

TWO_STEPS = Execution(steps_per_dispatch=2, scan=False)
V = make_run().V


def losses_of(model, form, params, batch):
    """float64 [B, P], by a program of its own."""
    return np.asarray(jax.jit(functools.partial(token_losses, model, form))(params, batch), np.float64)


class Killed(BaseException):
    """Stands for a process that is gone: nothing in the lab may catch it."""


def real_run(structure="decoder_only", **parts) -> Run:
    return make_run(structure, **{"data": describe("markov").data, **parts})


def killed_after(step):
    def progress(done, steps, loss, speed):
        if done >= step:
            raise Killed

    return progress


@pytest.mark.first(2)
@pytest.mark.parametrize("loss", ["targets", "all"])
@pytest.mark.parametrize("name", STRUCTURES)
def test_killed_and_restarted_is_the_same_run(name, loss, tmp_path):
    if loss == "all" and name != "decoder_only":
        pytest.skip("scoring the inputs is covered by the structure that is trained so")
    run = real_run(name, evaluation=Evaluation(examples=16, times=2))
    if loss == "all":
        run = replace(run, objective=replace(run.objective, loss="all"))
    whole = train(run, tmp_path / "whole", execution=TWO_STEPS)
    for step in (3, 5):
        with pytest.raises(Killed):
            train(run, tmp_path / "killed", execution=TWO_STEPS, checkpoint_seconds=0, on_progress=killed_after(step))
    again = train(run, tmp_path / "killed", execution=TWO_STEPS)
    assert again["outcome"] == whole["outcome"] and whole["status"] == "done"
    assert again["measured"]["attempts"] == 3
    lines = [[{k: v for k, v in line.items() if k != "seconds"} for line in records.read_metrics(tmp_path / d)]
             for d in ("whole", "killed")]  # fmt: skip
    assert lines[0] == lines[1]


def test_where_the_time_went_adds_up(tmp_path):
    run = real_run(evaluation=Evaluation(examples=16, times=2))
    measured = train(run, tmp_path, execution=TWO_STEPS, checkpoint_seconds=0)["measured"]
    parts = measured["seconds_by_part"]
    assert set(parts) == {"compile", "data", "step", "evaluate", "checkpoint"}
    assert all(seconds > 0 for seconds in parts.values())
    assert sum(parts.values()) <= measured["seconds"]
    spent = cost.planned(run, V)
    assert measured["exact_flops_per_second"] / measured["tokens_per_second"] == pytest.approx(
        spent["exact"] / spent["tokens"]
    )
    assert measured["mfu"] is None  # a processor has no published peak


def test_share_of_the_peak_of_a_known_chip(tmp_path, monkeypatch):
    monkeypatch.setitem(hardware.PEAKS, jax.local_devices()[0].device_kind, 1e12)
    measured = train(real_run(), tmp_path, execution=TWO_STEPS)["measured"]
    assert measured["mfu"] == pytest.approx(measured["exact_flops_per_second"] / 1e12 / jax.local_device_count())


@pytest.mark.parametrize("steps_per_dispatch", [2, 64], ids=["several dispatches", "one"])
def test_a_profile_shows_the_training_program(tmp_path, steps_per_dispatch):
    train(real_run(), tmp_path, execution=replace(TWO_STEPS, steps_per_dispatch=steps_per_dispatch), profile=True)
    (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(trace)).planes
    names = {event.name for plane in planes for line in plane.lines for event in line.events}
    assert any("advance" in name or "dot" in name for name in names)


def test_a_resume_uses_the_settings_it_was_begun_with(tmp_path, caplog):
    run = real_run()
    with pytest.raises(Killed):
        train(run, tmp_path, execution=TWO_STEPS, checkpoint_seconds=0, on_progress=killed_after(3))
    result = train(run, tmp_path, execution=Execution(steps_per_dispatch=4, scan=True))
    assert result["measured"]["execution"] == TWO_STEPS.to_json()
    assert "goes on with the settings" in caplog.text


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
def test_a_killed_process_goes_on(number, tmp_path):
    """A real process, killed in its loop after it has saved; SIGTERM saves and leaves with status 75."""
    run = real_run(budget=Budget(unit="steps", amount=300))
    whole = train(run, tmp_path / "whole", execution=TWO_STEPS)
    (tmp_path / "run.json").write_text(json.dumps(to_json(run)))
    script = (
        "import sys, pathlib\nfrom lab.spec import read_run\nfrom lab.train import train\n"
        "from lab.execution import Execution\n"
        "train(read_run(pathlib.Path(sys.argv[1]) / 'run.json'), pathlib.Path(sys.argv[1]) / 'killed',"
        " checkpoint_seconds=0.05, execution=Execution(steps_per_dispatch=2, scan=False))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], env={**os.environ, "JAX_PLATFORMS": "cpu"}
    )
    deadline = time.monotonic() + 120
    while not list((tmp_path / "killed").glob("checkpoints/[0-9]*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(timeout=60) == (75 if number == signal.SIGTERM else -signal.SIGKILL)
    assert records.read_result(tmp_path / "killed") is None
    assert train(run, tmp_path / "killed")["outcome"] == whole["outcome"]


def test_the_result_is_what_the_parameters_say(tmp_path):
    """Loss, bits per byte and loss by position, recomputed from the saved parameters and the held-out text."""
    run = real_run("prefix_lm", evaluation=Evaluation(examples=70))
    result = train(run, tmp_path, execution=TWO_STEPS)
    model, params = restore_parameters(run, tmp_path)
    examples = Examples(load(run.data), run.objective.length, seed=99)
    batch = build(forms(run.objective)[0], examples.held_out(70), TOKENIZERS["bytes"], seed=0, first=0)
    losses = losses_of(model, forms(run.objective)[0], params, batch)
    outcome = result["outcome"]
    assert outcome["loss"] == pytest.approx(losses.mean(), rel=1e-6)
    assert outcome["bits_per_byte"] == pytest.approx(losses.mean() / math.log(2), rel=1e-6)
    np.testing.assert_allclose(outcome["loss_per_position"], losses.mean(axis=0), rtol=1e-5)
    assert outcome["loss_standard_error"] == pytest.approx(losses.mean(axis=1).std(ddof=1) / 70**0.5, rel=1e-5)
    assert outcome["spent"] == result["planned"] == cost.planned(run, V)
    assert outcome["target_tokens"] == 8 * 4 * 5 and outcome["tokens_seen"] == 8 * 4 * 11


def test_a_run_that_diverges_is_a_result(tmp_path):
    run = real_run(optimizer=Optimizer(learning_rate=10.0, clip=1e9, warmup=0.0, weight_decay=0.0),
                   budget=Budget(unit="steps", amount=60))  # fmt: skip
    result = train(run, tmp_path)
    assert result["status"] == "diverged" and result["outcome"]["loss"] is None
    assert result["outcome"]["steps"] == result["outcome"]["diverged_at"] + 1 <= 60
    assert train(run, tmp_path) == result


def test_seeds_decide_and_only_seeds(tmp_path):
    def ended(name, **seed):
        run = real_run()
        return train(replace(run, seed=replace(run.seed, **seed)), tmp_path / name, execution=TWO_STEPS)["outcome"]

    first = ended("a")
    assert ended("b") == first
    assert ended("c", init=1)["parameter_hash"] != first["parameter_hash"]
    assert ended("d", data=1)["parameter_hash"] != first["parameter_hash"]


def test_a_directory_belongs_to_one_run(tmp_path):
    train(real_run(), tmp_path, execution=TWO_STEPS)
    with pytest.raises(ValueError, match="holds the result of"):
        train(real_run(batch=2), tmp_path)


def test_text_that_is_not_the_planned_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match="manifest"):
        train(make_run(), tmp_path)


def test_a_run_goes_on_in_another_directory(tmp_path):
    """As another attempt: from the newest whole checkpoint of those before it, with their lines, to the same end."""
    run = real_run(evaluation=Evaluation(examples=16, times=4))
    whole = train(run, tmp_path / "whole", execution=TWO_STEPS)
    for number, earlier, step in ((1, [], 3), (2, [1], 5), (3, [2, 1], 99)):
        directories = {n: tmp_path / str(n) for n in (number, *earlier)}
        with contextlib.suppress(Killed):
            again = train(run, directories[number], execution=TWO_STEPS, checkpoint_seconds=0,
                          earlier=[directories[n] for n in earlier], on_progress=killed_after(step))  # fmt: skip
    assert again["outcome"] == whole["outcome"] and again["measured"]["attempts"] == 3
    lines = [[{k: v for k, v in line.items() if k != "seconds"} for line in records.read_metrics(tmp_path / d)]
             for d in ("whole", "3")]  # fmt: skip
    assert lines[0] == lines[1] and any("held_out_loss" in line for line in lines[0])


@pytest.mark.parametrize("batch", [0, 1, 2, 3], ids=lambda n: f"before evaluation batch {n}")
def test_a_stop_in_an_evaluation_loses_nothing(batch, tmp_path, monkeypatch):
    """In one on the way or in the last; it is made anew after the resume, and its line is there once."""
    run = real_run(evaluation=Evaluation(examples=128, times=2))  # two batches each time
    whole = train(run, tmp_path / "whole", execution=TWO_STEPS)
    batches, seen = evaluate.batches, []

    def stopping_at(examples):
        for one in batches(examples):
            if len(seen) == batch:
                os.kill(os.getpid(), signal.SIGUSR1)
            seen.append(one)
            yield one

    with monkeypatch.context() as patched, pytest.raises(Preempted):
        patched.setattr(evaluate, "batches", stopping_at)
        train(run, tmp_path / "stopped", execution=TWO_STEPS)
    assert len(seen) == batch + 1 and records.read_result(tmp_path / "stopped") is None
    assert train(run, tmp_path / "stopped")["outcome"] == whole["outcome"]
    lines = [[line for line in records.read_metrics(tmp_path / d) if "held_out_loss" in line]
             for d in ("whole", "stopped")]  # fmt: skip
    assert lines[0] == lines[1] and len(lines[0]) == 1


def test_a_stop_in_the_evaluation_of_one_run_saves_those_beside_it(tmp_path, monkeypatch):
    """Also one that was evaluated before it."""
    runs = [
        real_run(seed=replace(real_run().seed, init=i), evaluation=Evaluation(examples=128, times=2)) for i in range(2)
    ]
    batches, seen = evaluate.batches, []

    def stopping_at(examples):
        for one in batches(examples):
            if len(seen) == 2:  # the second run's first
                os.kill(os.getpid(), signal.SIGUSR1)
            seen.append(one)
            yield one

    directories = [tmp_path / str(i) for i in range(2)]
    with monkeypatch.context() as patched, pytest.raises(Preempted):
        patched.setattr(evaluate, "batches", stopping_at)
        train_together(runs, directories, execution=TWO_STEPS)
    assert [[p.stem for p in d.glob("checksums/*.json")] for d in directories] == [["4"], ["4"]]


def test_an_ousted_attempt_leaves(tmp_path):
    run, asked = real_run(), iter([False, False, True, True])
    with pytest.raises(Superseded):
        train(run, tmp_path, execution=TWO_STEPS, superseded=lambda: next(asked))
    assert records.read_result(tmp_path) is None


def test_targets_of_pairs_that_are_selected_are_not_known(monkeypatch):
    monkeypatch.setattr(lab.data.pairs, "load", lambda data: of_pairs(load(data)))
    run = real_run("encoder_decoder", objective=Objective(name="pairs", S=9, T=6, buckets=((9, 6, 1),)))
    selecting = replace(run, technique=Technique(name="selective_backprop"))
    plain, chosen = (Batches(r, of_pairs(load(r.data))).target_tokens(3) for r in (run, selecting))
    assert plain is not None and 0 < plain < 3 * 4 * 6 and chosen is None


@pytest.mark.first(1)
@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_microbatches_train_alike(precision, tmp_path):
    run = real_run(precision=precision)  # whose program in f32 other tests train too
    whole = train(run, tmp_path / "whole", execution=TWO_STEPS)["outcome"]["loss"]
    parts = train(run, tmp_path / "parts", execution=replace(TWO_STEPS, microbatches=4))["outcome"]["loss"]
    assert parts == pytest.approx(whole, rel=1e-5 if precision == "f32" else 1e-3)


@pytest.mark.parametrize("name", [*LADDER, "encoder_only"])
def test_runs_of_one_shape_share_a_program(name):
    """Learning rate, seeds, weight decay and budget are no part of what is compiled."""
    run = make_run(name)
    other = replace(run, seed=replace(run.seed, init=3, data=4), optimizer=Optimizer(learning_rate=1.0, weight_decay=0.3),
                    budget=Budget(unit="tokens", amount=1e5))  # fmt: skip
    assert program(run, TWO_STEPS).key == program(other, TWO_STEPS).key
    assert program(run, TWO_STEPS).key != program(replace(run, batch=2), TWO_STEPS).key


def test_every_arm_reads_the_same_text():
    """A run's stream depends on the seed and the example's length alone."""
    corpus = load(describe("markov").data)
    one, other = Examples(corpus, 11, seed=5), Examples(corpus, 11, seed=5)
    wide = one.batch(0, 8)
    np.testing.assert_array_equal(wide, np.concatenate([other.batch(step, 2) for step in (0, 1, 2, 3)]))
    split = build(forms(Objective(S=6, T=5))[0], wide, TOKENIZERS["bytes"], seed=0, first=0)
    np.testing.assert_array_equal(split.inputs, wide[:, :6])
    np.testing.assert_array_equal(split.labels, wide[:, 6:])
    np.testing.assert_array_equal(split.targets[:, 1:], wide[:, 6:-1])
    assert (split.targets[:, 0] == TOKENIZERS["bytes"].sep).all()


OBJECTIVES = {
    "prefix_lm": Objective(name="prefix_lm", S=6, T=6, splits=(2, 6, 9)),
    "span_corruption": corrupted(14),
    "ul2": Objective(name="ul2", S=8, T=8),
    "causal_lm": Objective(name="causal_lm", S=0, T=12, attended=78),
    "pairs": Objective(name="pairs", S=9, T=6, buckets=((5, 6, 2), (9, 6, 1))),
}


def of_pairs(corpus: Corpus) -> Corpus:
    """The corpus' documents cut in short ones, each a source and a target."""

    def cut(split):
        which = np.random.default_rng(0).integers(0, 3, 1200)
        lengths, sources = np.array([6, 11, 9])[which], np.array([4, 8, 5])[which]
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        return replace(split, starts=starts, lengths=lengths, sources=sources)

    return replace(corpus, train=cut(corpus.train), held_out=cut(corpus.held_out))


@pytest.mark.first(1)
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in ("prefix_lm", "ul2") else name for name in OBJECTIVES],
)
def test_every_objective_trains_and_resumes(name, tmp_path, monkeypatch):
    """Planned equals spent, the loss is what the parameters say, and a killed run ends as one that was not."""
    if name == "pairs":
        for module in (attempt, lab.data.pairs):
            monkeypatch.setattr(module, "load", lambda data: of_pairs(load(data)))
    structure = "decoder_only" if name == "causal_lm" else "encoder_decoder"
    run = real_run(structure, objective=OBJECTIVES[name], evaluation=Evaluation(examples=16, times=2))
    run = replace(run, seed=replace(run.seed, data=1))
    whole = train(run, tmp_path / "whole", execution=TWO_STEPS)
    for step in (3, 5):
        with pytest.raises(Killed):
            train(run, tmp_path / "killed", execution=TWO_STEPS, checkpoint_seconds=0, on_progress=killed_after(step))
    outcome = train(run, tmp_path / "killed", execution=TWO_STEPS)["outcome"]
    assert outcome == whole["outcome"] and outcome["steps"] == 8
    assert outcome["spent"] == cost.planned(run, run.V) == whole["planned"]
    course = Course(run.objective, 1)
    if name != "pairs":
        assert outcome["target_tokens"] == sum(4 * course.forms[course.form(step)].T for step in range(8))
    model, params = restore_parameters(run, tmp_path / "killed")
    nats, scored, text = 0.0, 0, 0
    for form, batch in Batches(run, attempt.load(run.data)).held_out:
        labels = np.asarray(batch.labels)
        losses = losses_of(model, form, params, batch)
        nats += losses[labels != 258].sum()
        scored += int((labels != 258).sum())
        text += int((labels < 256).sum())
    assert outcome["loss"] == pytest.approx(nats / scored, rel=1e-6)
    assert outcome["bits_per_byte"] == pytest.approx(nats / math.log(2) / text, rel=1e-6)
    several = {"prefix_lm": {"2+10", "6+6", "9+3"}, "ul2": {"15+4", "12+4", "11+12", "9+10"}, "pairs": {"5+6", "9+6"}}
    assert set(outcome["loss_by_form"] or ()) == several.get(name, set())


def test_each_step_batch_and_checkpoint_shows_that_it_is_alive(tmp_path):
    """A long evaluation is no hang."""
    run = real_run(evaluation=Evaluation(examples=3 * evaluate.BATCH, times=2))
    signs, dispatches = [], []
    train_together(
        [run],
        [tmp_path],
        execution=TWO_STEPS,
        alive=lambda: signs.append(1),
        on_progress=lambda *given: dispatches.append(given),
    )
    assert len(dispatches) == 4 and len(signs) == len(dispatches) + 2 * 3 + 1
