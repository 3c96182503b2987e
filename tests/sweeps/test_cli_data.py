"""lab data, and studies on text that a person brings."""

import json
import shlex

import numpy as np
import pytest
from test_cli import run

import sweeps
from lab.data import Examples, load
from sweeps.cli.data import COMMANDS
from sweeps.study import name_of

WORDS = [
    "the",
    "ship",
    "sailed",
    "on",
    "and",
    "gulls",
    "followed",
    "it",
    "over",
    "a",
    "grey",
    "sea",
    "toward",
    "another",
    "shore",
]


@pytest.fixture(autouse=True)
def own_cache(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("BITTERLAB_CACHE", str(tmp_path / "own"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def novels(tmp_path):
    """2 MB in 60 files: enough for the quickstart's 512 held-out examples."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "My novels"
    folder.mkdir()
    for number in range(60):
        (folder / f"{number}.txt").write_text(" ".join(rng.choice(WORDS, 6500)))
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_an_example(capsys, command):
    code, out, _ = run(capsys, "data", command, "--help")
    assert code == 0 and f"Example: lab data {command}" in " ".join(out.replace("│", " ").split())


def test_prepare_show_tokenizer_and_mix(capsys, novels, tmp_path):
    code, out, _ = run(capsys, "data", "tokenizer", str(novels), "--vocabulary", "290", "--out", "t.json")
    assert code == 0 and "bpe-290-" in out
    for name, share in (("one", "0.1"), ("two", "0.1")):
        code, out, _ = run(capsys, "data", "prepare", str(novels), "--out", name, "--tokenizer", "t.json", "--held-out", share,
                           "--licence", "CC0-1.0", "--workers", "1")  # fmt: skip
        assert code == 0 and "60 documents" in out
    manifest = json.loads((tmp_path / "one" / "manifest.json").read_text())
    assert manifest["licence"] == "CC0-1.0" and manifest["tokenizer"]["exact"]
    code, out, _ = run(capsys, "data", "show", "one")
    assert code == 0
    for shown in (manifest["manifest"], "bpe-290-", "CC0-1.0", "held_out", "left out nothing", "ship"):
        assert shown in out
    code, out, _ = run(capsys, "data", "mix", "one=0.7", "two=0.3", "--out", "both")
    assert code == 0 and "120 documents" in out
    code, out, _ = run(capsys, "data", "show", "both")
    assert "0.7000 of the examples: one" in out
    data = sweeps.corpus("both")
    assert data == sweeps.corpus("prepared", "both") and data.vocabulary == 290
    assert Examples(load(data), 16, seed=0).batch(7, 4).shape == (4, 16)


def test_a_study_on_ones_own_text_is_one_command(capsys, novels):
    code, out, _ = run(capsys, "plan", "quickstart", "--preset", "smoke", "--data", str(novels))
    assert code == 0 and "On" not in out and "on My_novels" in " ".join(out.split())
    study = sweeps.load("quickstart", "smoke", sweeps.corpus(novels))
    assert study.name == "quickstart-My_novels"
    assert shlex.split(study.source) == ["quickstart", "--preset", "smoke", "--data", str(novels)]
    run(capsys, "data", "prepare", str(novels), "--out", "prepared")
    code, out, _ = run(capsys, "plan", "quickstart", "--preset", "smoke", "--data", "prepared", "--out", "plan")
    assert code == 0 and (novels.parent / "plan" / "plan.json").exists()


def test_what_was_left_out_is_said(capsys, novels):
    for name, content in (
        ("a.bin", b"\xff"),
        ("b.bin", b"\0"),
        ("c.txt", b""),
        ("d.txt", (novels / "0.txt").read_bytes()),
    ):
        (novels / name).write_bytes(content)
    shown = "left out 2 not_text, 1 empty, 1 duplicate"
    assert shown in run(capsys, "data", "prepare", str(novels), "--out", "out")[1]
    assert shown in run(capsys, "data", "show", "out")[1]
    (novels.parent / "book.txt").write_bytes(b"a line\n" * 9 + b"caf\xe9\n")
    code, _, err = run(capsys, "data", "prepare", "book.txt", "--out", "book")
    assert code == 2 and "byte 66 (from 0), in line 10, is 0xe9" in " ".join(err.split())


def test_what_a_text_was_not_prepared_with_is_refused(capsys, novels):
    run(capsys, "data", "tokenizer", str(novels), "--vocabulary", "290", "--out", "t.json")
    run(capsys, "data", "prepare", str(novels), "--out", "prepared", "--tokenizer", "t.json", "--held-out", "0.1")
    name = sweeps.corpus("prepared").tokenizer
    given = [{}, {"held_out": 0.1}, {"tokenizer": "t.json"}, {"tokenizer": name, "held_out": 0.1}]
    assert len({sweeps.corpus("prepared", **settings) for settings in given}) == 1
    for settings, message in (
        ({"held_out": 0.05}, r"data\.held_out = 0\.05: .*prepared was prepared with 0\.1: leave it out, or prepare"),
        ({"tokenizer": "bytes"}, r"data\.tokenizer = 'bytes': .*prepared was prepared with 'bpe-290-"),
    ):
        with pytest.raises(ValueError, match=message):
            sweeps.corpus("prepared", **settings)
    plan = ("plan", "quickstart", "--preset", "smoke")
    code, _, err = run(capsys, *plan, "--data", "prepared", "--tokenizer", "bytes")
    assert code == 2 and "was prepared with 'bpe-290-" in " ".join(err.split())
    code, _, err = run(capsys, *plan, "--tokenizer", "t.json")
    assert code == 2 and "leave it out, or give --data too" in " ".join(err.split())
    # Prepared is no source.
    for words in (
        ("prepare", "prepared", "--out", "again"),
        ("tokenizer", "prepared", "--vocabulary", "300", "--out", "x"),
    ):
        code, _, err = run(capsys, "data", *words)
        assert code == 2 and "it is prepared already" in " ".join(err.split())


def test_a_plan_keeps_its_text(capsys, novels, monkeypatch):
    """What is given beside a directory with a plan is compared with it."""
    run(capsys, "data", "prepare", str(novels), "--out", "prepared")
    assert run(capsys, "plan", "quickstart", "--preset", "smoke", "--data", "prepared", "--out", "plan")[0] == 0
    trained = []
    monkeypatch.setattr("sweeps.cli.studies.train", lambda _, directory, **__: trained.append(directory))
    for words in (
        (),
        ("--data", "prepared"),
        ("--data", "./prepared", "--tokenizer", "bytes"),
        ("--tokenizer", "bytes"),
    ):
        assert run(capsys, "run", "plan", *words)[0] == 0
    assert trained == ["plan"] * 4
    run(capsys, "data", "tokenizer", str(novels), "--vocabulary", "290", "--out", "t.json")
    for words, message in (
        (("--data", str(novels)), "the plan in this directory is of"),
        (("--data", "markov"), "the plan in this directory is of"),
        (("--preset", "long"), "preset = 'long': plan holds a plan, which is run as it is"),
        (("--tokenizer", "t.json"), "was prepared with 'bytes': leave it out"),
    ):
        code, _, err = run(capsys, "run", "plan", *words)
        assert code == 2 and message in " ".join(err.split())
    assert len(trained) == 4


def test_quickstart_finds_its_text_once(capsys, novels, monkeypatch):
    from lab.data import locate

    found, ran = [], []
    once = locate.locate
    monkeypatch.setattr(
        "sweeps.study.locate", lambda *words, **settings: found.append(words) or once(*words, **settings)
    )
    monkeypatch.setattr("sweeps.cli.studies.train", lambda solved, directory, **_: ran.append((solved, directory)))
    monkeypatch.setattr("sweeps.cli.studies.report", lambda directory: ran.append(directory))
    assert run(capsys, "quickstart", "--preset", "smoke", "--data", str(novels))[0] == 0
    ((solved, directory), reported) = ran
    assert len(found) == 1 and directory == reported == "runs/quickstart-My_novels"
    assert {row.run.data.path for row in solved.runs} == {str(novels)}


def test_names_of_texts_name_directories():
    data = sweeps.corpus("markov")
    assert name_of(data) == "markov"


def test_a_study_that_takes_no_data_says_how(tmp_path):
    (tmp_path / "mine.py").write_text("def study(preset='small'):\n    return None\n")
    with pytest.raises(ValueError, match=r"takes no other data: let it be `def study\(preset=\.\.\., data=None\)`"):
        sweeps.load(str(tmp_path / "mine.py"), data=sweeps.corpus("markov"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("prepare", "nowhere.txt", "--out", "x"), "'nowhere.txt' is not in"),
        (("prepare", "markov", "--out", "x", "--tokenizer", "none.json"), "there is no such file"),
        (("prepare", "markov", "--out", "x", "--column", "text"), "no setting 'column': it has none"),
        (("mix", "one", "two=1", "--out", "x"), "'one': write DIRECTORY=WEIGHT"),
        (("mix", "one=a", "--out", "x"), "'one=a': write DIRECTORY=WEIGHT"),
        (("show", "nowhere"), "no manifest.json there"),
        (("tokenizer", "markov", "--vocabulary", "300", "--out", "x"), "256 different ids"),
    ],
)
def test_mistakes_get_a_message_and_no_traceback(capsys, tmp_path, words, message):
    code, _, err = run(capsys, "data", *words)
    assert code == 2 and message in " ".join(err.split()) and "Traceback" not in err
    assert not [path for path in tmp_path.iterdir() if path.name != "own"]
