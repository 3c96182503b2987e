"""The order in which a stream takes what there is: all in an order that the seed draws, then all in another, without end."""

from collections.abc import Callable

import numpy as np

MOST = 2**32  # that can be put in an order


def seeds(seed: int, streams: int) -> list[int]:
    """Of so many streams of one run. Hashed seeds lie far apart: no run's second epoch is another's first."""
    return np.random.SeedSequence(seed).generate_state(streams).tolist()


def shuffled(count: int, seed: int) -> Callable[[int], int]:
    """order(i) is the number, below `count`, of what stands at place i, as grain.MapDataset.range(count).shuffle(seed).repeat()
    has it, in half of the time. Access is random: nothing is kept."""
    # Here, because it imports jax, which a planner need not have loaded.
    from grain.experimental import index_shuffle

    def order(place: int) -> int:
        epoch, place = divmod(place, count)
        return index_shuffle(place, max_index=count - 1, seed=(seed + epoch) % 2**32, rounds=4)

    return order
