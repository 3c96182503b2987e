"""What the true source loses on the very tokens that a run is evaluated on."""

from lab.data.examples import Examples
from lab.data.prepare import load
from lab.data.synthetic import task
from lab.spec import Run


def optimum_on_evaluation(run: Run) -> float:
    """Nats per target of the task's own probabilities on the run's held-out examples. A run's loss less this is its excess,
    without the luck of the examples; their difference to `Task.loss` is that luck.

    Raises ValueError where the run's corpus is no task, and for masked_lm, whose targets see what follows them.
    """
    if run.objective.name == "masked_lm":
        raise ValueError(
            "objective.name = 'masked_lm': optima are known of targets given what is before them: use 'lm'"
        )
    known = task(run.data.corpus)
    examples = Examples(load(run.data), run.objective.length, seed=0).held_out(run.evaluation.examples)
    return float(known.optimum(examples)[:, run.objective.S :].mean())
