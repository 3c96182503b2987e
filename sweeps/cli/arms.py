"""The command on two or more arms of any table: compare."""

from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

Name = Annotated[str, tyro.conf.Positional]


def compare(
    table: Name,
    /,
    baseline: str,
    law: str | None = "chinchilla",
    columns: str = "",
    arm: str = "arm",
    where: str = "",
    clusters: str | None = None,
    margin: float | None = None,
    alpha: float = 0.05,
    tolerance: float = 0.02,
    method: str | None = None,
    draws: int = 1000,
    null_draws: int = 399,
    hold_out: bool = True,
    seed: int = 0,
    out: Path | None = None,
) -> None:
    """Say of every arm whether it is better than the baseline at equal compute, and how sure that is.

    The verdict is one of: A better, B better (the baseline is), crosses at, no difference larger than, not resolved,
    refused. Nested laws say what the arms share; where their curves cross and what an arm is worth in compute follow.

    Example: lab compare runs.csv --baseline dense --columns N=params,D=tokens --arm router --margin 0.01
    Example: lab compare runs/quickstart --baseline decoder_only
    Example: lab compare final.csv --baseline Dense --arm router_type --columns C=flops,loss=loss_c4 --law power_law

    Args:
        table: a study's directory, or a CSV, parquet or JSON-lines file of runs
        baseline: the arm that the others are compared with
        law: of N and D, or of C; None compares what was measured and fits nothing
        columns: what the file calls them, such as N=params,D=tokens,loss=eval_loss,C=flops
        arm: the column that says which arm a run is of
        where: keep the rows where this holds, such as "D > 1e9"
        clusters: the column whose rows are not independent (checkpoints of one run, runs that share seeds)
        margin: the largest difference, in nats, that does not matter; without it no two arms are called equivalent
        alpha: the rate at which arms that are alike may be called different, over all arms and budgets
        tolerance: by how much runs of one budget may differ in compute, as a share
        method: of drawing parameters: jackknife, bootstrap, wild or sandwich (default: the one that covers best)
        draws: of the fitted parameters
        null_draws: data sets simulated for each test of nested laws
        hold_out: score every nested law by rolling extrapolation
        seed: of the draws
        out: write the differences as CSV
    """
    from analysis.arms import compare_arms
    from analysis.compare import Difference
    from sweeps.cli.sources import read

    console = Console(highlight=False)
    named = columns if arm == "arm" or "arm=" in columns else ",".join(filter(None, [columns, f"arm={arm}"]))
    runs = read(table, named, where).runs
    with console.status(f"{len(runs)} runs are compared"):
        answer = compare_arms(
            runs, law, baseline=baseline, run_id="run", clusters=clusters, margin=margin, alpha=alpha, tolerance=tolerance,
            method=method, draws=draws, null_draws=null_draws, hold_out=hold_out, seed=seed,
        )  # fmt: skip
    console.print(str(answer), soft_wrap=True, markup=False)
    heads = ("arm", "FLOPs", "difference", "low", "high", "p (Holm)", "compared at")
    shown, rows = Table(*heads, box=None, pad_edge=False), []
    for pair in answer.pairs.values():
        by_law = list(pair.by_law.items()) if isinstance(pair.by_law, dict) else []
        for budget, d in [*pair.measured.items(), *by_law]:
            if isinstance(d, Difference):
                rows.append((pair.arm, budget, d.value, d.low, d.high, d.p_holm, d.basis))
                shown.add_row(
                    d.arm,
                    f"{budget:.3g}",
                    f"{d.value:+.5f}",
                    f"{d.low:+.5f}",
                    f"{d.high:+.5f}",
                    f"{d.p_holm:.3g}",
                    d.basis,
                )
            else:
                shown.add_row(pair.arm, f"{budget:.3g}", "refused", "", "", "", d.reason)
    console.print(shown)
    if out is not None:
        import pandas as pd

        pd.DataFrame(rows, columns=list(heads)).to_csv(out, index=False)
        console.print(f"table: {out}")
