"""What a run does, step by step: the plain course, which is every run's, and what a technique (lab.techniques) may change of it.

A method has two sides. `Method` is the host's: which operations a step executes and is charged, what it is fed, which examples it
reads, and when a stage with another program begins; all of it is a function of the run, the step and the spent share of the
budget, so that a plan knows it before anything is trained. `Inside` is what happens within the compiled step. Neither the loop
(lab.train) nor the program (lab.program) knows a technique by its name.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from lab.checks import require
from lab.cost import Active
from lab.forms import forms
from lab.objectives import Batch
from lab.spec import Run
from lab.technique import TECHNIQUES


class Operation(NamedTuple):
    """What is charged. kind: "train" (forward and backward), "forward", "hessian" (an optimizer's estimate), "update" (of the
    parameters, which makes a step), "average" (of parameters). form: an index into the objective's. active: the layers that run
    (None: all)."""

    kind: str
    examples: int
    form: int = 0
    active: Active | None = None


class Moment(NamedTuple):
    """Before a step: how many were taken, the stage, the form that the step takes, and the share of the budget that is spent.
    Of a method that `foresees`: the share once the step is, and whether no step follows."""

    step: int
    stage: int
    form: int
    share: float
    share_after: float = 0.0
    last: bool = False


@dataclass(frozen=True)
class Tools:
    """What a program lends to `Inside`. plain(state, batch, keep) -> (state, loss, norm): an optimizer step; keep: of each stack
    which layers run. losses(params, batch): [examples], nats a scored token. start(params): an optimizer's state."""

    plain: Callable[..., tuple[dict[str, Any], Any, Any]]
    losses: Callable[[Any, Batch], Any]
    start: Callable[[Any], Any]


NO_UPDATE = -1.0  # in place of a gradient's norm: the step made no update


@dataclass(frozen=True)
class Inside:
    """Within a compiled step. Frozen, since it is part of what a program is known by.

    examples: rows that a step is fed. fed: names and shapes of float32 arrays that each step gets beside its batch.
    """

    examples: int
    fed: tuple[tuple[str, tuple[int, ...]], ...] = ()

    def start(self, params: Any, batch: Batch) -> dict[str, Any]:
        """What the state has beside parameters and optimizer, at first. batch: shapes of the examples that a step is fed."""
        return {}

    def step(self, tools: Tools, state: dict[str, Any], batch: Batch, fed: dict[str, Any]) -> Any:
        """(state, loss, gradient norm) after one step; a norm of NO_UPDATE says that it made no update."""
        return tools.plain(state, batch)

    def enter(self, tools: Tools, before: dict[str, Any], fresh: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The state that the last one of the stage before becomes. fresh(): that of a run that starts with this stage."""
        raise NotImplementedError

    def average(self, state: dict[str, Any]) -> Any:
        """The parameters that are evaluated, where they are not those that are trained (None: they are)."""
        return None


class Method:
    """The plain course. plain_steps: how many updates of a plain run the budget pays for."""

    dependent = False  # what a step spends depends on what it finds: it is settled when the step is done
    packs = True  # runs side by side do no more than each would alone
    copies = 0  # of all parameters, in the state
    foresees = False  # what comes after a step is a part of its moment
    selects = False  # which examples a step trains on is not known from the stream
    one_epoch = False  # what it reads must not come again
    first_step = 0  # before which the model that is evaluated is not trained yet

    def __init__(self, run: Run, plain_steps: float):
        self.run, self.plain_steps = run, plain_steps
        self.charged = run.technique is None or run.technique.charged
        self.settings = run.technique.settings if run.technique else {}
        self.interval = int(run.optimizer.extra["interval"]) if run.optimizer.curvature else 0

    @property
    def stages(self) -> tuple[Run, ...]:
        """Of each stage the run whose model is trained in it: one program each."""
        return (self.run,)

    def stage(self, step: int, share: float) -> int:
        """That step `step` belongs to, when this share is spent before it."""
        return 0

    def schedule(self, step: int, share: float) -> float:
        """The share of its schedule at which the learning rate is, when this share of the budget is spent."""
        return share

    def operations(self, at: Moment) -> tuple[Operation, ...]:
        """What the step executes, whatever it finds."""
        return self.plain(at)

    def settled(self, at: Moment) -> tuple[Operation, ...]:
        """Where the method is dependent: what a step that made an update executed besides."""
        return ()

    def expected(self, step: int) -> bool:
        """Where the method is dependent: whether step `step` makes an update, if all goes as it does on average."""
        return True

    def plain(self, at: Moment, active: Active | None = None) -> tuple[Operation, ...]:
        batch, due = self.run.batch, self.interval and at.step % self.interval == 0
        train, update = Operation("train", batch, at.form, active), Operation("update", 0)
        if not due:
            return train, update
        return train, Operation("hessian", self.run.optimizer.hessian_examples(batch), at.form), update

    def every(self) -> Iterator[tuple[int, Operation]]:
        """All operations that there can be, with their stages."""
        for form in range(len(forms(self.run.objective))):
            for operation in self.plain(Moment(0, 0, form, 0.0)):
                yield 0, operation

    def charges(self, at: Moment) -> tuple[Operation, ...]:
        """What the step is charged: what it executes, or in an ablation (charged: false) what a plain step does."""
        return self.operations(at) if self.charged else self.plain(at)

    def feed(self, at: Moment) -> dict[str, np.ndarray]:
        return {}

    def examples(self, step: int) -> tuple[int, int]:
        """First and number of the examples that step `step` reads, in the run's stream."""
        return step * self.run.batch, self.run.batch

    def read(self, steps: int) -> int:
        """Examples of the stream that so many steps read."""
        return steps * self.run.batch

    def inside(self, stage: int) -> Inside:
        return Inside(examples=self.run.batch)

    def doublings(self, stage: int) -> int:
        """How often the depth has doubled."""
        return 0

    def refuse(self, *, devices: int, pack: int) -> None:
        """Raises ValueError where the program can not run so."""
        name = self.run.technique.name if self.run.technique else ""
        require(pack == 1 or self.packs, "pack", pack,
                f"of runs side by side what {name} skips would be computed, and each has stages of its own: use 1")  # fmt: skip


def method(run: Run, plain_steps: float = 1.0) -> Method:
    """The run's method; the plain course where it has no technique."""
    kind = Method if run.technique is None else TECHNIQUES[run.technique.name].method
    return kind(run, plain_steps)
