"""Solves each arm's steps (and, to match parameters, widths) so that compared arms spend the same, and refuses the rest."""

from dataclasses import replace

from lab import cost, reference_times
from lab.spec import Budget, Run, Shape
from sweeps.study import Match


def set_budget(run: Run, amount: float, by: Match) -> Run:
    """The run with this budget in the unit that the study matches."""
    if by.reference is not None:
        return replace(run, budget=reference_times.budget(by.reference, amount))
    if by.quantity == "flops":
        return replace(run, budget=Budget(unit="flops", amount=amount, convention=by.convention))
    return replace(run, budget=Budget(unit="tokens", amount=amount))


def residual(run: Run, V: int) -> float:
    """Spent over budget, less 1: a run takes whole steps."""
    return cost.planned(run, V)[cost.budget_unit(run)] / run.budget.amount - 1


def with_parameters(run: Run, target: int, V: int, tolerance: float) -> Shape:
    """The run's shape with the feed-forward width that brings its body nearest to `target` parameters.

    Body parameters are linear in F, so two counts give the width; raises ValueError where none comes near enough.
    """

    def body(F: int) -> int:
        return cost.parameters(run.structure, replace(run.shape, F=F), run.options, run.objective, V).body

    slope = body(2) - body(1)
    F = max(1, round(1 + (target - body(1)) / slope))
    off = body(F) / target - 1
    if abs(off) > tolerance:
        raise ValueError(
            f"{run.structure.name} at D = {run.shape.D}, L = {run.shape.L}: no feed-forward width gives {target:,} body "
            f"parameters within {tolerance:.1%} (F = {F} is off by {off:+.1%}); give this arm its own sizes"
        )
    return replace(run.shape, F=F)
