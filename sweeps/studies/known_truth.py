"""Does a sweep find the truth where it is known? One size, trained on ever more data, on sources of lab.data.synthetic.

command    lab run known_truth && python -m sweeps.studies.known_truth runs/known_truth
           lab run known_truth --preset facts --out runs/facts && python -m sweeps.studies.known_truth runs/facts
cost       small: 9.7e11 FLOPs in 12 runs, 72 s in one process on a core shared with others (44 s of its time, compilation and
           planning included); facts: 1.7e11 FLOPs in 12 runs, 41 s (28 s)
expected   small: E 2.3282 (2.3216 to 2.3355), truth 2.3241; gamma 0.93 (0.86 to 1.01), truth 1
           facts: gamma 0.49 (0.40 to 0.59), truth 0.5

small: an order-1 Markov chain. E is its entropy rate. The excess of an estimate of k probabilities from D tokens is k / 2D
(Rissanen 1986), so that gamma = 1 is what a learner would show that wastes nothing.
facts: the values of keys whose frequencies are a power law. E = 0; a learner that stores every value it has seen often
enough has gamma = a / (1 + a) = 1/2 (Michaud et al. 2023, arXiv:2303.13506).

What is not found: E of `zipf_facts` with its keys scored too (S = 1). Seven budgets from 8,192 to 524,288 facts gave 0.551
(0.550 to 0.552), truth 0.545, and a law with a further term K / D for the keys' own frequencies gave the same. A fit that
converges, with a narrow interval, need not be true: the interval is of the noise and knows nothing of a law that is wrong.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from analysis import draw_parameters, fit_law, load
from lab import plan_file, spec
from lab.data.synthetic import task
from lab.data.truth import optimum_on_evaluation
from lab.spec import Evaluation, Optimizer
from sweeps.ladder import ladder
from sweeps.study import Match, Study, arm, corpus

PRESETS = {
    "small": {"corpus": "markov", "S": 4, "T": 28, "batch": 16, "first": 2**16, "evaluation": 4096},
    "facts": {"corpus": "zipf_facts:exponent=1.0", "S": 3, "T": 1, "batch": 64, "first": 2**15, "evaluation": 32_768},
}
GAMMA = {"small": 1.0, "facts": 0.5}


def study(preset: str = "small") -> Study:
    chosen = PRESETS[preset]
    template = arm(
        "decoder_only",
        corpus(chosen["corpus"]),
        S=chosen["S"],
        T=chosen["T"],
        optimizer=Optimizer(learning_rate=0.01, weight_decay=0.0),
        evaluation=Evaluation(examples=chosen["evaluation"]),
    )
    return Study(
        name="known_truth",
        question="Does the fit of a sweep find the asymptote and the exponent that are known?",
        arms={"decoder_only": template},
        baseline="decoder_only",
        match=Match(quantity="tokens"),
        budgets=tuple(float(chosen["first"] * 2**doubling) for doubling in range(6)),
        sizes=ladder(32, depth=1),
        window=1,
        batch=chosen["batch"],
        learning_rate=0.01,
        seeds=2,
    )


@dataclass(frozen=True, kw_only=True)
class Recovered:
    """A parameter's truth, its estimate and its 95% interval."""

    name: str
    truth: float
    estimate: float
    low: float
    high: float

    @property
    def found(self) -> bool:
        return self.low <= self.truth <= self.high


def recovered(directory: Path, gamma: float) -> list[Recovered]:
    """The law that the study's runs were fitted to, L = E + A D^-gamma (without E where that is 0), beside its truth.

    The source's own loss on the evaluation examples is taken off every run's (a control variate), and E added again: the
    examples are the same for all runs, so that their luck would go into the fitted E.
    """
    run = spec.from_json(plan_file.read(directory)["runs"][0]["run"])
    E = task(run.data.corpus).loss(run.objective.S, run.objective.T)
    table = load(directory)
    losses = table["loss"] - optimum_on_evaluation(run) + E
    law, truths = ("power_law", {}) if E == 0 else ("power_law_with_asymptote", {"E": E})
    fit = fit_law(law, {"C": table["tokens_seen"], "loss": losses}, delta="scatter")
    if not fit.converged:
        raise ValueError(f"{directory}: the fit of {law} has not converged ({fit.status}): has every run ended?")
    intervals = draw_parameters(fit).intervals()
    return [
        Recovered(name=name, truth=truth, estimate=fit.flat[name], low=intervals[name][0], high=intervals[name][1])
        for name, truth in {**truths, "gamma": gamma}.items()
    ]


def main(directory: Path) -> None:
    corpus_name = spec.from_json(plan_file.read(directory)["runs"][0]["run"]).data.corpus
    preset = next(name for name, chosen in PRESETS.items() if chosen["corpus"] == corpus_name)
    for r in recovered(directory, GAMMA[preset]):
        verdict = "inside" if r.found else "OUTSIDE"
        print(f"{r.name:6} {r.estimate:.4f}  95% interval {r.low:.4f} to {r.high:.4f}  truth {r.truth:.4f}  {verdict}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
