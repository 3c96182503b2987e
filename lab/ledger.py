"""What a run has spent, in every unit. The ledger, not a step counter, says when a run ends and how far it is.

Each step is charged the operations that it executes (lab.method), at the prices of lab.cost and, in seconds, of a table of
reference times; stop, learning rate, growth and drops follow the spent share of the budget, in the budget's own unit.
`simulated` lets a ledger run by itself: it is how a plan knows what a run with a technique, or with a budget of seconds, will
spend.
"""

import bisect
import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace

from lab import cost, reference_times
from lab.forms import Course, forms
from lab.method import Method, Moment, Operation, method
from lab.spec import Run, Seed

Spent = dict[str, int | float]
PLAIN = -1  # in place of a stage: the whole model's


class Prices:
    """Of all operations of a run."""

    def __init__(self, run: Run, V: int):
        """Raises ValueError naming what the table of reference times lacks, as soon as it is asked for."""
        self.run, self.V = run, V
        self.table = reference_times.of(run.budget)
        self.units = (*cost.UNITS, *(("reference_seconds",) if self.table else ()))
        self._found: dict[tuple[int, tuple[Operation, ...]], Mapping[str, int | float]] = {}

    def of(self, stage: int, run: Run, operations: tuple[Operation, ...]) -> Mapping[str, int | float]:
        """All of them together, in every unit. run: the stage's."""
        found = self._found.get((stage, operations))
        if found is None:
            found = self._found[stage, operations] = self._sum(run, operations)
        return found

    def _sum(self, run: Run, operations: tuple[Operation, ...]) -> Spent:
        total: Spent = dict.fromkeys(self.units, 0)
        for o in operations:
            price = cost.operation(run, self.V, o.kind, o.examples, o.form, o.active)
            for unit in cost.UNITS:
                total[unit] += price[unit]
            if self.table:
                total["reference_seconds"] += self.table.seconds(run, o)
        return total


class Ledger:
    """`steps` are those that the run has taken; of `spent` the steps are the updates that were charged."""

    def __init__(self, run: Run, V: int):
        """Raises ValueError for a budget below one step."""
        self.prices = Prices(run, V)
        self.unit, self.amount = cost.budget_unit(run), run.budget.amount
        self.course, one_form = Course(run.objective, run.seed.data), len(forms(run.objective)) == 1
        self.one_form = one_form
        plain = Method(run, 0.0)
        step = self.prices.of(PLAIN, run, plain.plain(Moment(1, 0, 0, 0.0)))[self.unit]
        self.method = method(run, self.amount / step)
        self.stage_runs = self.method.stages
        self.steps = 0
        self.spent: Spent = {unit: 0 for unit in self.prices.units}
        self._open: Moment | None = None  # of a step that is taken and not settled
        self._moment: Moment | None = None  # of the next step, and its price, once they are asked for
        self._next: Mapping[str, int | float] | None = None
        if not self.fits:
            raise ValueError(
                f"budget.amount = {self.amount:g} {self.unit} is less than one step of {self.price[self.unit]:g}: raise the "
                f"budget, or lower batch = {run.batch} or the shape"
            )

    @property
    def stage(self) -> int:
        """Of the step that comes next."""
        return self.method.stage(self.steps, self.share)

    @property
    def form(self) -> int:
        """Of the step that comes next, an index into the objective's forms."""
        return 0 if self.one_form else self.course.form(self.steps)

    @property
    def moment(self) -> Moment:
        """Of the step that comes next."""
        if self._moment is None:
            self._moment = self._now()
        return self._moment

    def _now(self) -> Moment:
        at = Moment(self.steps, self.stage, self.form, self.share)
        if not self.method.foresees:
            return at
        after = self.spent[self.unit] + self._price(at)[self.unit]
        share, step = after / self.amount, self.steps + 1
        following = Moment(step, self.method.stage(step, share), 0 if self.one_form else self.course.form(step), share)
        last = after + self._price(following)[self.unit] / 2 > self.amount  # as `fits` will say
        return at._replace(share_after=share, last=last)

    def _price(self, at: Moment) -> Mapping[str, int | float]:
        if not self.method.charged:
            return self.prices.of(PLAIN, self.method.run, self.method.charges(at))
        return self.prices.of(at.stage, self.stage_runs[at.stage], self.method.charges(at))

    @property
    def price(self) -> Mapping[str, int | float]:
        """Of the step that comes next; where it depends on what the step finds, of one that makes an update."""
        if self._next is None:
            at = self.moment
            self._next = self._price(at)
            if self.method.dependent:
                more = self._update(at)
                self._next = {unit: amount + more[unit] for unit, amount in self._next.items()}
        return self._next

    def _update(self, at: Moment) -> Mapping[str, int | float]:
        return self.prices.of(at.stage, self.stage_runs[at.stage], self.method.settled(at))

    def charge(self) -> None:
        """Takes the next step."""
        at = self.moment
        self.steps += 1
        self._add(self._price(at) if self.method.dependent else self.price)
        self._open = at if self.method.dependent else None

    def settle(self, updated: bool) -> None:
        """Where the method is dependent: what the step that was taken last came to."""
        if self._open is not None:
            at, self._open = self._open, None
            if updated:
                self._add(self._update(at))

    def _add(self, price: Mapping[str, int | float]) -> None:
        for unit, amount in price.items():
            self.spent[unit] += amount
        self._moment = self._next = None

    @property
    def fits(self) -> bool:
        """Whether the next step ends nearer to the budget than stopping does."""
        return self.spent[self.unit] + self.price[self.unit] / 2 <= self.amount

    @property
    def share_in_step(self) -> float:
        """Where the learning rate's schedule is in the middle of the step that comes next."""
        share = (self.spent[self.unit] + self.price[self.unit] / 2) / self.amount
        return self.method.schedule(self.steps, share)

    @property
    def share(self) -> float:
        return self.spent[self.unit] / self.amount

    def restore(self, spent: Spent, steps: int) -> None:
        if set(spent) != set(self.spent):
            raise ValueError(
                f"checkpoint's units {sorted(spent)} are not this version's {sorted(self.spent)}: start the run again"
            )
        self.spent, self.steps, self._moment, self._next = dict(spent), steps, None, None


def method_of(run: Run) -> Method:
    """The run's method, as its ledger has it."""
    return method(run, 1.0) if run.technique is None else Ledger(run, run.V).method


@dataclass(frozen=True)
class Whole:
    """A whole run, as its ledger sees it. shares: of the budget, after each step."""

    spent: Mapping[str, int | float]
    shares: tuple[float, ...]

    @property
    def steps(self) -> int:
        return len(self.shares)

    def reached(self, share: float) -> int:
        """Steps until this share is spent."""
        return min(bisect.bisect_left(self.shares, share) + 1, self.steps)


def simulated(run: Run, V: int) -> Whole:
    """What the run spends. The same additions in the same order as in training, and so the same to the last digit; where it
    depends on what steps find, what they find on average."""
    rate = replace(run.optimizer, learning_rate=1.0)
    return _simulated(replace(run, optimizer=rate, seed=Seed(data=run.seed.data), revision=0), V)


@functools.lru_cache(maxsize=256)
def _simulated(run: Run, V: int) -> Whole:
    ledger, shares = Ledger(run, V), []
    while ledger.fits:
        ledger.charge()
        ledger.settle(ledger.method.expected(ledger.steps - 1))
        shares.append(ledger.share)
    return Whole(dict(ledger.spent), tuple(shares))
