"""Held-out loss on the same fixed examples for all arms: nats per target token, bits per byte, loss by position and by form."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from lab.data.tokenizers import Tokenizer
from lab.forms import Form
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
    target_losses: Callable[[Form, Batch], Any],
    held_out: Sequence[tuple[Form, Batch]],
    *,
    tokenizer: Tokenizer,
    stopping: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """target_losses(form, batch) -> (BATCH, T) negative log-likelihoods of the targets in nats. Sums are in float64.

    The loss is the mean over all targets of all forms, PAD excepted. Bits per byte divide by the UTF-8 bytes of the very
    targets that are scored; sentinels and ends of documents have none. `loss_by_form` is there where there are several
    forms, keyed S+T. Raises Interrupted once stopping(), which is asked before each batch, is true.
    """
    bytes_V = np.concatenate([tokenizer.token_bytes, [0.0]])  # of an id, those above the text's being the last
    width = max(form.T for form, _ in held_out)
    sums_T, scored_T, size = np.zeros(width), np.zeros(width), 0.0
    totals, counts = [], []
    by_form: dict[str, list[float]] = {}  # nats and targets; denoisers of a short text may have one shape
    for form, examples in held_out:
        parts = []
        for batch, counted in batches(examples):
            if stopping():
                raise Interrupted
            parts.append(np.asarray(target_losses(form, batch), np.float64)[:counted])
        losses_ET, labels_ET = np.concatenate(parts), examples.labels[:, -form.T :]
        scored_ET = labels_ET != tokenizer.pad
        losses_ET = np.where(scored_ET, losses_ET, 0.0)
        sums_T[: form.T] += losses_ET.sum(axis=0)
        scored_T[: form.T] += scored_ET.sum(axis=0)
        size += float(bytes_V[np.minimum(labels_ET, tokenizer.text)].sum())
        totals.append(losses_ET.sum(axis=1))
        counts.append(scored_ET.sum(axis=1))
        of_form = by_form.setdefault(f"{form.S - (form.mode is not None)}+{form.T}", [0.0, 0.0])
        of_form[0] += float(losses_ET.sum())
        of_form[1] += float(scored_ET.sum())
    total_E, count_E = np.concatenate(totals), np.concatenate(counts)
    nats, scored, examples = float(total_E.sum()), float(count_E.sum()), len(total_E)
    loss, spread = nats / scored, None
    if examples > 1:  # of a ratio of sums; with as many targets in each example, that of a mean
        off_E = total_E - loss * count_E
        spread = math.sqrt(float(np.square(off_E).sum()) * examples / (examples - 1)) / scored
    return {
        "loss": loss,
        "bits_per_byte": nats / math.log(2) / size if size else None,
        "loss_per_position": [float(value) for value in sums_T / np.maximum(scored_T, 1)],
        "loss_by_form": {name: nats / n for name, (nats, n) in by_form.items()} if len(by_form) > 1 else None,
        "loss_standard_error": spread,
    }
