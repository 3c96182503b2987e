"""Tables that a user may bring, good and bad."""

import numpy as np
import pandas as pd
import pytest

import synthetic
from analysis.fit import fit_law
from analysis.refusal import Refusal
from analysis.resample import pairs_bootstrap
from analysis.table import clusters_of, read_table


def runs(n=12):
    N, D = np.geomspace(1e7, 1e10, n), np.geomspace(3e11, 1e9, n)
    return pd.DataFrame({"params": N, "tokens": D, "eval": 1.7 + 400 * N**-0.34 + 900 * D**-0.3})


NAMES = {"N": "params", "D": "tokens", "loss": "eval"}


@pytest.mark.parametrize("ending", [".csv", ".csv.gz", ".parquet", ".jsonl", ".tsv"])
def test_every_kind_of_file_reads_alike(tmp_path, ending):
    path = tmp_path / f"runs{ending}"
    if "csv" in ending or ending == ".tsv":
        runs().to_csv(path, index=False, sep="\t" if ending == ".tsv" else ",")
    elif ending == ".parquet":
        runs().to_parquet(path)
    else:
        runs().to_json(path, orient="records", lines=True, double_precision=15)
    table = read_table(path, columns=NAMES)
    np.testing.assert_allclose(table["N"], runs()["params"], rtol=1e-12)
    np.testing.assert_allclose(table["C"], 6 * runs()["params"] * runs()["tokens"])
    assert table.attrs["C"] == "6 N D"


def test_integers_do_not_overflow(tmp_path):
    table = runs().astype({"params": "int64", "tokens": "int64"}) * 1
    table["tokens"] *= 1000
    table.to_parquet(tmp_path / "runs.parquet")
    assert read_table(tmp_path / "runs.parquet", columns=NAMES)["C"].max() > 2.0**63


def test_where_keeps_rows(tmp_path):
    runs().assign(kind="a").to_csv(tmp_path / "runs.csv", index=False)
    table = read_table(tmp_path / "runs.csv", columns=NAMES, where='N > 1e8 and kind == "a"')
    assert len(table) == (runs()["params"] > 1e8).sum() and list(table.index) == list(range(len(table)))


def test_a_study_is_a_table(tmp_path):
    arms = {"decoder_only": synthetic.Arm(), "prefix_lm": synthetic.Arm(A=26.0)}
    synthetic.write(tmp_path, synthetic.Study(arms=arms, baseline="decoder_only", missing=(0,)))
    table = read_table(tmp_path, where="arm == 'prefix_lm'")
    assert set(table["arm"]) == {"prefix_lm"} and {"N", "D", "C", "loss", "run_id"} <= set(table)
    assert np.median(table["C"] / (6 * table["N"] * table["D"])) == pytest.approx(1.15, rel=0.01)
    assert np.isfinite(table["loss"]).all()


def spoil(column, row, value):
    def change(table):
        table = table.astype({column: object})
        table.loc[row, column] = value
        return table

    return change


@pytest.mark.parametrize(
    ("change", "arguments", "match"),
    [
        (spoil("eval", 3, float("nan")), {}, r"loss in row 3 is nan: .*--where \"loss == loss\""),
        (spoil("eval", 3, float("inf")), {}, "loss in row 3 is inf"),
        (spoil("params", 2, 0), {}, "N in row 2 is 0"),
        (spoil("tokens", 1, -5), {}, "D in row 1 is -5"),
        (spoil("tokens", 1, "many"), {}, "D in row 1 is 'many'"),
        (lambda t: t, {"columns": NAMES | {"N": "param"}}, "no column 'param' for N: did you mean 'params'"),
        (lambda t: t, {"where": "size > 3"}, "where = 'size > 3'.*the columns are N, D, loss"),
        (lambda t: t, {"where": "N + 1"}, "not true or false"),
        (lambda t: t, {"where": "@__import__('os')"}, "columns and numbers only"),
        (lambda t: t, {"where": "N > 1e30"}, "no row for which N > 1e30"),
        (lambda t: t.iloc[:0], {}, "no row; give a table"),
        (lambda t: pd.concat([t, t.iloc[[4]]], ignore_index=True), {}, r"row 12 is the same .*--drop-duplicates"),
        (lambda t: t.assign(params=t.params.where(t.index < 6, t.params / 1e6)), {}, "N jumps from"),
        (lambda t: t.assign(C=6 * t.params * t.tokens / 1e9), {}, "C is about 1e-09 times 6 N D in every row"),
        (
            lambda t: t.assign(C=6 * t.params * t.tokens * np.where(t.index == 5, 1e6, 1)),
            {},
            r"C is about 1e\+06 times 6 N D in 1 of 12 rows \(row 5\)",
        ),
    ],
)
def test_bad_tables_are_named(tmp_path, change, arguments, match):
    path = tmp_path / "runs.csv"
    change(runs()).to_csv(path, index=False)
    with pytest.raises(ValueError, match=match):
        read_table(path, **{"columns": NAMES, **arguments})


def test_files_that_are_none(tmp_path):
    (tmp_path / "runs.csv").write_text("N,D\n")
    with pytest.raises(ValueError, match=r"rans\.csv: no such file; did you mean 'runs\.csv'"):
        read_table(tmp_path / "rans.csv")
    (tmp_path / "runs.parquet").write_bytes(b"PAR0 and no more")
    with pytest.raises(ValueError, match=r"not readable as \.parquet"):
        read_table(tmp_path / "runs.parquet")
    (tmp_path / "runs.txt").write_text("")
    with pytest.raises(ValueError, match=r"\.txt: use one of \.csv"):
        read_table(tmp_path / "runs.txt")
    with pytest.raises(ValueError, match=r"without plan\.json"):
        read_table(tmp_path)


def test_duplicates_go_on_request(tmp_path):
    pd.concat([runs(), runs().iloc[[4]]]).to_csv(tmp_path / "runs.csv", index=False)
    assert len(read_table(tmp_path / "runs.csv", columns=NAMES, drop_duplicates=True)) == 12


def test_checkpoints_of_one_run_are_noticed(tmp_path):
    table = runs().assign(run=np.arange(12) // 3)
    assert clusters_of(table) == "run" and clusters_of(runs().assign(run=range(12))) is None
    fit = fit_law("chinchilla", table, columns={"N": "params", "D": "tokens"}, loss="eval", starts=4)
    with pytest.raises(Refusal, match="clusters=run_ids"):
        pairs_bootstrap(fit, table["run"])
