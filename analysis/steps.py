"""What one change does: arms that differ in a single thing, beside each other at every budget.

A study's verdicts are of its arms against one baseline. What a piece of structure is worth is the difference between two arms
that are alike but for it, whichever arms those are; this finds all such pairs of a study, unless it names pairs of its own.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import pandas as pd

from analysis.compare import ALPHA, Difference, Reading, difference, readings, with_power
from analysis.frame import DEPTHS
from analysis.isoflop import Minima
from analysis.multiplicity import holm
from analysis.noise import Noise
from analysis.refusal import Refused

Designs = Mapping[str, Mapping[str, str]]  # of each arm: analysis.frame.design


@dataclass(frozen=True, kw_only=True)
class Step:
    """`arm` is `before` but for `what`. differences: arm minus before at each budget, nats; p_holm is corrected over all steps
    of the study at all budgets. readings: what the largest of these budgets says under another count of FLOPs."""

    before: str
    arm: str
    what: str
    differences: tuple[Difference | Refused, ...]
    readings: tuple[Reading, ...] = ()


def alike_but_for_one(designs: Designs) -> Iterator[tuple[str, str]]:
    """(before, arm) of every pair whose designs have the same leaves and differ in one, in the study's order. A depth is no such
    thing: it comes with other widths."""
    for before, arm in itertools.combinations(designs, 2):
        changed = _changed(designs, before, arm)
        if set(designs[before]) == set(designs[arm]) and len(changed) == 1 and changed[0] not in DEPTHS:
            yield before, arm


def _changed(designs: Designs, before: str, arm: str) -> list[str]:
    a, b = designs[before], designs[arm]
    return [path for path in dict.fromkeys((*a, *b)) if a.get(path) != b.get(path)]


def what_changes(designs: Designs, before: str, arm: str) -> str:
    """Each leaf that differs: "memory: final -> same"."""
    a, b = designs[before], designs[arm]
    said = (
        f"{path.split('.', 1)[-1]}: {a.get(path, 'none')} -> {b.get(path, 'none')}"
        for path in _changed(designs, before, arm)
    )
    return ", ".join(said)


def steps(frame: pd.DataFrame, found: Minima, noise: Noise | Refused) -> tuple[Step, ...]:
    """Every step of the study: those that it names, or all."""
    designs = frame.attrs["designs"]
    budgets = sorted({budget for _, budget in found})
    made = [
        Step(before=before, arm=arm, what=what_changes(designs, before, arm), differences=tuple(
            noise if isinstance(noise, Refused) else difference(frame, found, noise, arm, before, budget)
            for budget in budgets))
        for before, arm in frame.attrs["study"].get("steps") or alike_but_for_one(designs)
    ]  # fmt: skip
    corrected = tuple(_corrected(made))
    among = [d for step in corrected for d in step.differences if isinstance(d, Difference)]
    return tuple(
        replace(step, readings=tuple(readings(
            frame, found, {(step.arm, budget): d for budget, d in zip(budgets, step.differences, strict=True)},
            baseline=step.before, among=among)))
        for step in corrected
    )  # fmt: skip


def _corrected(made: Sequence[Step]) -> Iterator[Step]:
    judged = [d for step in made for d in step.differences if isinstance(d, Difference) and not d.same_runs]
    level, corrected = ALPHA / max(1, len(judged)), iter(holm([d.p for d in judged]))
    for step in made:
        yield replace(step, differences=tuple(
            with_power(replace(d, p_holm=next(corrected)), level) if isinstance(d, Difference) and not d.same_runs else d
            for d in step.differences))  # fmt: skip
