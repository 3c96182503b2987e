"""What the true source loses on the very tokens that a run is evaluated on."""

import numpy as np

from lab.data.examples import Examples
from lab.data.prepare import load
from lab.data.synthetic import task
from lab.forms import evaluated
from lab.spec import Run


def optimum_on_evaluation(run: Run) -> float:
    """Nats per target of the task's own probabilities on the run's held-out examples. A run's loss less this is its excess,
    without the luck of the examples; their difference to `Task.loss` is that luck.

    Raises ValueError where the run's corpus is no task, and where its loss is not of targets given the text before them.
    """
    scored = evaluated(run.objective, run.evaluation.splits)
    if any(form.name != "lm" for form in scored):
        raise ValueError(
            f"objective.name = {run.objective.name!r}: optima are known of targets given the text before them: use 'lm' or "
            "'prefix_lm', or evaluate at splits of the text (evaluation.splits)"
        )
    known = task(run.data.corpus)
    examples = Examples(load(run.data), run.objective.length, seed=0).held_out(run.evaluation.examples)
    nats_Bn = known.optimum(examples)
    return float(np.concatenate([nats_Bn[:, -form.T :].reshape(-1) for form in scored]).mean())
