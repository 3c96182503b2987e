"""Held-out loss on the same fixed examples for all arms: nats per target token, bits per byte, loss by position."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from lab.objectives import Batch

BATCH = 64  # examples; the same for every arm, so that no arm is summed in another order


def batches(examples: Batch) -> Iterable[tuple[Batch, int]]:
    """Batches of one static size and the number of examples in each that count: the last is filled up by repetition."""
    count = len(examples.inputs)
    for start in range(0, count, BATCH):
        rows = np.minimum(np.arange(start, start + BATCH), count - 1)
        yield Batch(*(array[rows] for array in examples)), min(BATCH, count - start)


class Interrupted(Exception):
    """An evaluation was asked to stop; it has to be made anew."""


def evaluate(
    target_losses: Callable[[Batch], Any],
    examples: Batch,
    *,
    token_bytes: np.ndarray,
    stopping: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """target_losses(batch) -> (BATCH, T) negative log-likelihoods of the targets in nats. Sums are in float64.

    token_bytes: UTF-8 bytes of each text token; bits per byte divide by those of the very targets that are scored.
    Raises Interrupted once stopping(), which is asked before each batch, is true.
    """
    parts = []
    for batch, counted in batches(examples):
        if stopping():
            raise Interrupted
        parts.append(np.asarray(target_losses(batch), np.float64)[:counted])
    losses_ET = np.concatenate(parts)
    labels_ET = examples.labels[:, -losses_ET.shape[1] :]
    loss = float(losses_ET.mean())
    by_example_E = losses_ET.mean(axis=1)
    spread = float(by_example_E.std(ddof=1)) / math.sqrt(len(by_example_E)) if len(by_example_E) > 1 else None
    return {
        "loss": loss,
        "bits_per_byte": float(losses_ET.sum() / math.log(2) / token_bytes[labels_ET].sum()),
        "loss_per_position": [float(value) for value in losses_ET.mean(axis=0)],
        "loss_standard_error": spread,
    }
