"""Multitask sparse parity: many tasks, each a parity of a few bits of its own, with frequencies that are a power law.

Michaud et al. 2023 (arXiv:2303.13506, section 3): task i has p_i ~ i^-(1 + a), and a network that learns whole tasks, the
commonest first, loses ln 2 on the others. Its loss falls as N^-a in parameters (a task takes a fixed number of them), as
D^-(a / (1 + a)) in examples (a task takes a fixed number of ITS examples), and to E = 0.
"""

import numpy as np
from jaxtyping import Float, Int

from lab.data.synthetic import draws
from lab.data.synthetic.ranks import Zipf, check_zipf
from lab.data.synthetic.task import DOCUMENTS, LETTERS, Task, check_documents, check_number, examples, known


def sparse_parity(
    *, exponent: float = 0.4, tasks: int = 64, bits: int = 16, subset: int = 3, documents: int = DOCUMENTS
) -> Task:
    """Inputs: the task's number and `bits` fair bits; target: the parity of the `subset` of them that is the task's. The
    paper gives the task as a one-hot vector of control bits; here it is a token (or two)."""
    check_zipf("sparse_parity", "tasks", tasks, exponent)
    check_number("sparse_parity", "bits", bits, 2, 256)
    check_number("sparse_parity", "subset", subset, 1, bits)
    check_documents("sparse_parity", documents)
    zipf = Zipf(count=tasks, exponent=exponent)
    subsets = draws.orders(draws.generator(41), tasks, bits)[:, :subset]
    S = zipf.digits + bits

    def parity(tasks_B: np.ndarray, bits_Bk: np.ndarray) -> np.ndarray:
        return np.take_along_axis(bits_Bk, subsets[tasks_B], axis=1).sum(axis=1, keepdims=True) % 2

    def draw(rng: np.random.Generator, rows: int) -> np.ndarray:
        tasks_B, bits_Bk = draws.choose(rng, zipf.weights, rows), draws.below(rng, 2, (rows, bits))
        return np.concatenate([zipf.write(tasks_B), LETTERS + bits_Bk, LETTERS + parity(tasks_B, bits_Bk)], axis=1)

    def optimum(tokens_Bn: Int[np.ndarray, "B n"]) -> Float[np.ndarray, "B n"]:
        task_Bd, bits_Bk = tokens_Bn[:, : zipf.digits], tokens_Bn[:, zipf.digits : S] - LETTERS
        fair_Bk = np.where((bits_Bk == 0) | (bits_Bk == 1), np.log(2), np.inf)
        tasks_B = zipf.read(task_Bd)
        right_B1 = (tasks_B >= 0)[:, None] & (tokens_Bn[:, S:] == LETTERS + parity(tasks_B, bits_Bk))
        return np.concatenate([zipf.nats(task_Bd), fair_Bk, known(right_B1)], axis=1)

    def entropies(n: int) -> Float[np.ndarray, "n"]:
        return np.concatenate([zipf.entropies(), np.full(bits, np.log(2)), [0.0]])

    read = examples(draw, n=S + 1, seed=42, documents=documents)
    return Task(name="sparse_parity", S=S, T=1, read=read, optimum=optimum, entropies=entropies)
