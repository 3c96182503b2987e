"""Small runs that tests are made of."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from lab.spec import Budget, Data, Evaluation, Objective, Optimizer, Options, Run, Shape
from lab.structure import ALL_TWO_STREAM, STRUCTURES, Structure

TINY = Shape(D=8, F=12, N=2, K=2, H=4, L=2, L_input=2)


def make_run(structure: Structure | str = "decoder_only", **parts: Any) -> Run:
    """A run of a few steps on a synthetic corpus whose manifest is not checked unless it is trained."""
    structure = STRUCTURES[structure] if isinstance(structure, str) else structure
    masked = structure.encoder_only
    run = Run(
        structure=structure,
        shape=TINY,
        options=Options(),
        objective=Objective(name="masked_lm", S=8, T=3) if masked else Objective(S=6, T=5),
        data=Data(corpus="markov", manifest="0" * 64, train_tokens=10**6),
        optimizer=Optimizer(learning_rate=3e-3),
        budget=Budget(unit="steps", amount=8),
        batch=4,
        evaluation=Evaluation(examples=16),
    )
    return replace(run, **parts)


def legal(structure: Structure, loss: str) -> bool:
    return loss == "targets" or structure.inputs == "causal"


EVERY_STRUCTURE = (*ALL_TWO_STREAM, STRUCTURES["encoder_only"])


def name_of(value: Any) -> str:
    return value.name if isinstance(value, Structure) else str(value)


def named_first(structures: Iterable[Structure]) -> list[Any]:
    """Test parameters: the named structures always, the combinations between them in the slow suite."""
    named = set(STRUCTURES.values())
    return [s if s in named else pytest.param(s, marks=pytest.mark.slow) for s in structures]
