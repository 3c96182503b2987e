"""What `lab plan` prints: every cell, what it costs, how nearly it matches, and what it takes of the device that is named."""

import math

import pytest

import sweeps
from lab import hardware
from sweeps.cli.main import main
from sweeps.cli.tables import HEADS

MINE = """
from sweeps import Study, arm, corpus
from sweeps.ladder import ladder

def study(preset="small"):
    data = corpus("markov")
    return Study(
        name="mine", question="?", baseline="decoder_only", budgets={budgets}, batch=4, window=2, learning_rate=0.01, seeds=2,
        arms={{name: arm(name, data, S=8, T=8) for name in ("prefix_lm", "decoder_only")}},
        sizes=ladder(8, 16, depth=2, head_width=8),
    )
"""


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(MINE.format(budgets=(1e9, 2e9)))
    return path


def printed(capsys, *words) -> str:
    main([str(word) for word in words])
    return capsys.readouterr().out


@pytest.mark.parametrize("device", ["cpu", "h100", "v5e"])
def test_a_row_has_what_its_run_costs_on_the_named_device(capsys, mine, device):
    plan, on = sweeps.plan(sweeps.load(str(mine))), hardware.named(device)
    lines = printed(capsys, "plan", mine, "--device", device, "--workers", "4").splitlines()
    assert lines[1].split() == " ".join(HEADS).split()
    rows = {tuple(line.split()[:3]): line.replace(" x ", "x").split() for line in lines[2 : 2 + 8]}
    for row in plan.unique.values():
        shown = dict(zip(HEADS, rows[row.arm, f"{row.budget:.3g}", str(row.rung)], strict=True))
        assert float(shown["FLOPs"]) == pytest.approx(row.planned["exact"], rel=0.005)
        assert shown["residual"] == f"{row.residual:+.2%}" and shown["seeds"] == "2"
        seconds = hardware.estimate_seconds(row.run, row.run.V, on.kind, peak=on.peak)
        assert float(shown["hours"]) == pytest.approx(seconds / 3600, rel=0.06)
        needed = plan.memory(on.kind, limit=on.memory)[0].total
        assert 0 <= float(shown["MiB"]) <= math.ceil(needed / 2**20)
    text = "\n".join(lines[10:])
    assert f"about {plan.seconds(4, on.kind, peak=on.peak) / 60:.1f} min on 4 " in text
    assert ("a guess: at most 35%" in text and "not measured" in text) == (device != "cpu")


def test_more_workers_and_a_larger_peak_take_less_time(mine):
    plan = sweeps.plan(sweeps.load(str(mine)))
    h100, a100 = hardware.named("H100"), hardware.named("a100")
    assert plan.seconds(8, "gpu", peak=h100.peak) == pytest.approx(plan.seconds(1, "gpu", peak=h100.peak) / 8)
    assert h100.peak > a100.peak and plan.seconds(1, "gpu", peak=h100.peak) < plan.seconds(1, "gpu", peak=a100.peak)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--device", "h1000"), "device = 'h1000': did you mean 'h100'"),
        (("--workers", "0"), "workers = 0: use a whole number of at least 1"),
    ],
)
def test_what_can_not_be_planned_for(capsys, mine, words, said):
    with pytest.raises(SystemExit) as left:
        main(["plan", str(mine), *words])
    assert left.value.code == 2 and said in " ".join(capsys.readouterr().err.split())


def test_what_can_not_be_matched_is_refused_with_its_residual(capsys, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(MINE.format(budgets=(1e7,)))
    with pytest.raises(SystemExit) as left:
        main(["plan", str(path)])
    said = " ".join(capsys.readouterr().err.split())
    assert left.value.code == 2 and "can not be matched within 1.0%" in said and "%; " in said


def test_programs_that_one_device_can_not_hold_are_named(capsys, mine, monkeypatch):
    small = hardware.Device(name="small", kind="gpu", peak=1e14, memory=2**10)
    monkeypatch.setitem(hardware.DEVICES, "small", small)
    said = printed(capsys, "plan", mine, "--device", "small")
    assert "programs take more than the 0 MiB of one small" in said and "--mesh" in said
