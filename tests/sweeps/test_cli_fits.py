"""`lab fit` and `lab report` as a person types them, on tables and on a study."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import synthetic
from sweeps.cli.main import main

EPOCH = Path(__file__).parents[3] / "shared" / "data" / "epoch_chinchilla" / "chinchilla_points.csv"
QUICK = ("--draws", "0", "--holdout", "none")


def run(capsys, *words: str) -> tuple[int, str, str]:
    try:
        main([str(word) for word in words])
        code = 0
    except SystemExit as left:
        code = int(left.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, " ".join(captured.err.split())


def value(out: str, name: str) -> float:
    return float(re.search(rf"^ +{re.escape(name)} +(\S+)", out, re.MULTILINE)[1])


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("tables") / "runs.csv"
    rng = np.random.default_rng(3)
    N, D = (axis.ravel() for axis in np.meshgrid(np.geomspace(1e7, 1e9, 5), np.geomspace(1e9, 1e11, 6)))
    loss = (1.8 + 480 * N**-0.35 + 2100 * D**-0.37) * np.exp(0.003 * rng.standard_normal(30))
    runs = pd.DataFrame({"params": N, "tokens": D, "eval": loss, "half": np.arange(30) % 2, "run": np.arange(30) // 2})
    runs.to_csv(path, index=False)
    return path


def test_fit_prints_seven_digits_and_every_check(capsys, table):
    words = ("--columns", "N=params,D=tokens", "--loss", "eval", "--draws", "100", "--delta", "scatter")
    code, out, err = run(capsys, "fit", table, *words, "--holdout", "1e19")
    assert code == 0, err
    assert value(out, "E") == pytest.approx(1.8, abs=0.1) and value(out, "alpha") == pytest.approx(0.35, abs=0.05)
    assert len(re.search(r"^ +beta +(\S+)", out, re.MULTILINE)[1].replace(".", "").lstrip("0")) >= 6
    for said in (
        "converged",
        "objective",
        "gradient norm",
        "of the starts agree",
        "condition number",
        "lack of fit:",
        "C <= 1e19",
        "L(centre)",
        "intervals: leave-one-out of 30",
        "note: The table has no compute: C is 6 N D.",
    ):
        assert said in out
    low, high = map(float, re.search(r"^ +a +\S+ +(\S+) to (\S+)", out, re.MULTILINE).groups())
    assert low < 0.37 / 0.72 < high and "report:" not in out


def test_fixed_tied_where_and_arms(capsys, table):
    named = ("--columns", "N=params,D=tokens,loss=eval")
    code, out, err = run(capsys, "fit", table, *named, *QUICK, "--fix", "alpha=.36", "E=1.75", "--tie", "beta=alpha")
    assert code == 0, err
    assert value(out, "alpha") == 0.36 == value(out, "beta") and value(out, "E") == 1.75
    assert "fixed" in out and "tied to alpha" in out
    code, out, err = run(
        capsys, "fit", table, *named, *QUICK, "--per-arm", "A,B", "--arm", "half", "--where", "tokens > 2e9"
    )
    assert code == 0, err
    assert value(out, "A[0]") == pytest.approx(value(out, "A[1]"), rel=0.05) and "25 rows" in out


def test_rows_of_one_run_need_clusters(capsys, tmp_path):
    rng = np.random.default_rng(0)
    C = np.tile(np.geomspace(1e18, 1e21, 6), 8)
    checkpoints = pd.DataFrame({"C": C, "run": np.arange(48) // 6, "loss": 1.7 + 2 * (C / 1e18) ** -0.2})
    checkpoints["loss"] *= np.exp(0.003 * rng.standard_normal(48))
    path = tmp_path / "checkpoints.parquet"
    checkpoints.to_parquet(path)
    words = ("fit", path, "--law", "power_law_with_asymptote", "--draws", "60", "--holdout", "none")
    code, out, _ = run(capsys, *words)
    assert code == 0 and "run '0' has 6 rows, which are not independent" in out and "--clusters run" in out
    assert " to " not in re.search(r"^ +gamma.*", out, re.MULTILINE)[0]
    code, out, _ = run(capsys, *words, "--clusters", "run", "--method", "jackknife")
    assert "leave-one-out of 8 clusters" in out and " to " in re.search(r"^ +gamma.*", out, re.MULTILINE)[0]


def test_report_of_a_table_and_of_a_study(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    C = np.geomspace(1e18, 1e22, 7)
    pd.DataFrame({"C": C, "loss": 1.7 + 2 * (C / 1e18) ** -0.2 + 0.001 * np.sin(7 * np.log(C))}).to_csv("curve.csv")
    code, out, err = run(capsys, "report", "curve.csv", "--law", "power_law", "--draws", "40",
                         "--laws", "power_law_with_asymptote")  # fmt: skip
    assert code == 0, err
    assert "report: curve-fit/fit.html" in out and "<svg" in Path("curve-fit/fit.html").read_text()
    assert json.loads(Path("curve-fit/fit.json").read_text())["law"]["name"] == "power_law"
    rows = json.loads(Path("curve-fit/fit.json").read_text())["laws"]
    assert [row["law"] for row in rows] == ["power_law", "power_law_with_asymptote"]
    # What is asked of other laws is checked before anything is fitted, and is not ignored where there is no page.
    code, out, err = run(capsys, "report", "curve.csv", "--law", "power_law", "--laws", "power_lav")
    assert code == 2 and "law = 'power_lav'" in err and "did you mean 'power_law'?" in err and not out
    code, out, err = run(capsys, "fit", "curve.csv", "--law", "power_law", "--laws", "none")
    assert code == 2 and "laws = 'none'" in err and "--out" in err and not out
    arms = {name: synthetic.FOUR_ARMS[name] for name in ("prefix_lm", "decoder_only")}
    synthetic.write(tmp_path / "study", synthetic.Study(arms=arms, baseline="decoder_only"))
    code, out, err = run(capsys, "report", "study")
    assert code == 0 and "report: study/report.html" in out
    code, _, err = run(capsys, "report", "study", "--delta", "1e-2")
    assert code == 2 and "takes no options of a fit; use lab fit study" in err
    code, out, err = run(capsys, "fit", "study", *QUICK, "--per-arm", "A,B")
    assert code == 0 and "A[prefix_lm]" in out and "28 rows of study" in out, err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nowhere.csv",), "nowhere.csv: no such file"),
        (("TABLE", "--law", "chinchila"), "law = 'chinchila': did you mean 'chinchilla'"),
        (("TABLE",), "no column 'N' for N: it has params, tokens, eval, half, run; say which one it is with --columns N=NAME"),
        (("TABLE", "--columns", "N=parms,D=tokens"), "no column 'parms' for N: did you mean 'params'"),
        (("TABLE", "--columns", "N:params"), "N=params,D=tokens"),
        (("TABLE", "NAMED", "--where", "eval < 'x'"), "where = \"eval < 'x'\""),
        (("TABLE", "NAMED", "--where", "tokens < 0"), "no row for which tokens < 0"),
        (("TABLE", "NAMED", "--where", "params > 2e8"), "needs 3 distinct values of N and has 2"),
        (("TABLE", "NAMED", "--fix", "alpha"), "fix = 'alpha'"),
        (("TABLE", "NAMED", "--fix", "alpha=big"), "fix: alpha = 'big': use a number"),
        (("TABLE", "NAMED", "--fix", "alpa=.3"), "'alpa' is not a parameter: did you mean 'alpha'"),
        (("TABLE", "NAMED", "--delta", "-1"), "delta = -1.0"),
        (("TABLE", "NAMED", "--clusters", "rum"), "clusters = 'rum' is not a column"),
        (("TABLE", "NAMED", "--holdout", "most"), "holdout = 'most': use a number"),
        (("TABLE", "NAMED", "--per-arm", "A"), "column 'arm' is not in the table"),
    ],
)  # fmt: skip
def test_mistakes_get_a_message_and_no_traceback(capsys, table, words, message):
    given = [str(table) if word == "TABLE" else word for word in words]
    if "NAMED" in given:
        at = given.index("NAMED")
        given[at : at + 1] = ["--columns", "N=params,D=tokens,loss=eval"]
    code, _, err = run(capsys, "fit", *given)
    assert code == 2 and message in err and "Traceback" not in err


def test_help_shows_an_example_and_loads_nothing_heavy():
    code = """
import sys
from sweeps.cli.main import main
for words in (["fit", "--help"], ["--help"]):
    try:
        main(words)
    except SystemExit as left:
        assert not left.code
heavy = {"jax", "pandas", "matplotlib", "scipy"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Example: lab fit runs.csv --law chinchilla --columns N=params,D=tokens" in " ".join(done.stdout.split())


@pytest.mark.published
@pytest.mark.skipif(not EPOCH.exists(), reason=f"{EPOCH} is not there")
def test_epochs_optimum_to_seven_digits(capsys):
    code, out, err = run(capsys, "fit", EPOCH, "--where", "kept", "--delta", "1e-3", *QUICK)
    assert code == 0, err
    for name, published in (
        ("E", 1.8172181),
        ("A", 477.82587),
        ("B", 2143.41734),
        ("alpha", 0.34731050),
        ("beta", 0.36717243),
    ):
        assert value(out, name) == pytest.approx(published, rel=1e-6)
    assert "objective 0.001018274018" in out and value(out, "a") == pytest.approx(0.513900, abs=1e-6)
