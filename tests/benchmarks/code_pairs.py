"""What the corpora of pairs hold on this machine: how many, how long, and what was left out for which reason.

python tests/benchmarks/code_pairs.py        about 80 s of one core
"""

from collections import Counter

import numpy as np

from lab.data.code_pairs import CUTS, pairs
from lab.data.corpora import listing


def main() -> None:
    for corpus, cut in CUTS.items():
        left_out: Counter[str] = Counter()
        files = ((d.file, d.content) for d in listing("python").read() if isinstance(d.content, str))
        sizes = np.array([[len(side.encode()) for side in pair] for _, _, pair in pairs(files, cut, left_out)])
        sources, targets = sizes.sum(axis=0) / 1e6
        print(f"{corpus}: {len(sizes):,} pairs, {sources:.1f} MB -> {targets:.1f} MB")
        for side, of_side in zip(("source", "target"), sizes.T, strict=True):
            quantiles = np.percentile(of_side, (1, 10, 50, 90, 99)).astype(int)
            print(f"  {side} bytes at 1, 10, 50, 90, 99%: {', '.join(map(str, quantiles))}; longest {of_side.max()}")
        for reason, count in left_out.most_common():
            print(f"  left out: {count:,} {reason}")


if __name__ == "__main__":
    main()
