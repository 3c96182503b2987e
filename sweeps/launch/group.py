"""One worker of several processes, on as many hosts, for runs larger than a machine: the first one claims, all of them train.

What to train next is told through files of the study's directory, which all of them see: the first may wait hours for a run, and
no collective operation waits that long. An error that all of them meet is the run's, and the first records it. One that some meet
alone, such as a peer that died, is nobody's fault: the group ends (JAX's coordination service sees to those in the midst of a
step), to be started again and go on from the last checkpoint.
"""

import contextlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from lab import records
from lab.preemption import AGAIN, Preempted, Superseded
from sweeps.files import Files

DIRECTORY = "groups"
POLL_SECONDS = 0.2
ALONE_SECONDS = 20.0  # after an error, in which the others say that they met it too
log = logging.getLogger(__name__)


class Orders:
    """A channel from the first process of this group to the others."""

    def __init__(self, files: Files):
        from jax.experimental import multihost_utils

        token = np.frombuffer(os.urandom(8), np.uint8).astype(np.int32)
        agreed: Any = multihost_utils.broadcast_one_to_all(token)
        self.files, self.number = files, 0
        self.directory = f"{DIRECTORY}/{bytes(np.asarray(agreed).astype(np.uint8)).hex()}"

    def give(self, **order: Any) -> None:
        """The first process; without an order, that there are no more."""
        self.number += 1
        content = {"schema": records.SCHEMA, **order}
        self.files.write(f"{self._order()}.json", json.dumps(content).encode())
        if self.number > 2:
            self.files.remove(f"{self._order(self.number - 2)}.json")  # all have begun the one after it

    def taken(self, stopping: Callable[[], bool]) -> Iterator[dict[str, Any]]:
        """The others: each order as it comes, until there are no more."""
        while True:
            self.number += 1
            name = f"{self._order()}.json"
            while not self.files.exists(name):
                if stopping():
                    raise Preempted()
                time.sleep(POLL_SECONDS)
            order = records.parse_json(self.files.read(name), name)
            if "runs" not in order:
                return
            yield order

    def met(self) -> None:
        """The others: there was an error in what was ordered."""
        self.files.write(f"{self._order()}.error-{jax.process_index()}", b"")

    def all_met(self, seconds: float = ALONE_SECONDS) -> bool:
        """The first process: whether the others say so too."""
        return self._within(seconds, (f"{self._order()}.error-{number}" for number in range(1, jax.process_count())))

    def next_is_given(self, seconds: float = ALONE_SECONDS) -> bool:
        return self._within(seconds, [self._order(self.number + 1) + ".json"])

    def _order(self, number: int | None = None) -> str:
        return f"{self.directory}/{number or self.number:06d}"

    def _within(self, seconds: float, names: Iterable[str]) -> bool:
        until, missing = time.monotonic() + seconds, set(names)
        while missing and time.monotonic() < until:
            time.sleep(POLL_SECONDS)
            missing = {name for name in missing if not self.files.exists(name)}
        return not missing


class Broken(SystemExit):
    """An error that not all of the group met: it is to be started again."""

    def __init__(self):
        super().__init__(AGAIN)


@contextlib.contextmanager
def led(orders: Orders | None, **order: Any) -> Iterator[None]:
    """What the first process does: gives the order and carries it out itself; raises Broken for an error that it met alone."""
    if orders is None:
        yield
        return
    orders.give(**order)
    try:
        yield
    except Superseded:
        raise
    except Exception:
        if orders.all_met():
            raise
        log.exception("not all processes of this group met this error: it starts again")
        raise Broken() from None


def follow(orders: Orders, train: Callable[[dict[str, Any]], Any], stopping: Callable[[], bool]) -> None:
    """What the others do with each order."""
    for order in orders.taken(stopping):
        try:
            train(order)
        except Superseded:
            pass
        except Exception:
            log.exception("process %d met an error", jax.process_index())
            orders.met()
            if not orders.next_is_given():
                os._exit(AGAIN)
