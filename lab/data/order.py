"""The order in which a stream takes what there is: all in an order that the seed draws, then all in another, without end."""

from typing import Any

import numpy as np


def shuffled(count: int, seed: int, part: int = 0) -> Any:
    """order[i] is the number, below `count`, of what stands at place i. Access is random: nothing is kept. part: streams of
    one seed that are independent of each other."""
    # Here, because it imports jax, which a planner need not have loaded.
    import grain

    # grain draws epoch e from its seed + e. Hashed seeds lie far apart: no run's second epoch is another's first.
    entropy = seed if not part else [seed, part]
    drawn = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    return grain.MapDataset.range(count).shuffle(seed=drawn).repeat()
