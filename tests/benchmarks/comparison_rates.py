"""How often comparisons of two arms say what is not so, and how often a crossing's interval contains the planted one.

    python tests/benchmarks/comparison_rates.py --simulations 1000

Two arms on one iso-FLOP grid, 1% or 0.5% normal noise of the loss (half of its variance shared by the rows of a cluster
where data are clustered). A/A: both follow one law, and `alike` rates should be at most 5%. Planted: exponents differ and
the best losses are equal at one compute inside the grid. 1,000 simulations give a rate of 5% a standard error of 0.7
points. Prints markdown.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "analysis"))

from simulated_arms import DESIGNS, aa_rates, crossing_rates, nested_rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulations", type=int, default=1000)
    parser.add_argument("--null-draws", type=int, default=199)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument(
        "--whole", type=int, default=None, help="simulations of the whole comparison (default: a tenth)"
    )
    options = parser.parse_args()

    def share(of: str, value: float, n: int) -> None:
        print(f"| {of} | {100 * value:.1f}% | {n} |", flush=True)

    print("| rate | found | simulations |\n|---|---|---|")
    for name in DESIGNS:
        began = time.perf_counter()
        for step, rate in nested_rates(name, options.simulations, null_draws=options.null_draws).items():
            share(f"{name}, A/A: {step} rejected at 5%", rate, options.simulations)
        print(f"{name}, nested: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    began = time.perf_counter()
    whole = options.whole or max(20, options.simulations // 10)
    for basis in ("measured", "law"):
        share(f"independent, A/A: verdict from {basis} calls them different", aa_rates(basis, whole), whole)
    print(f"verdicts: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    began = time.perf_counter()
    found = crossing_rates(options.simulations, draws=options.draws)
    for what, rate in found.items():
        share(f"planted crossing: {what}", rate, options.simulations)
    print(f"crossing: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
