"""What a run has spent, in every unit. The ledger, not a step counter, says when a run ends and how far it is."""

from collections.abc import Mapping

from lab import cost
from lab.forms import Course
from lab.spec import Run


class Ledger:
    """Each step that a run takes is charged here, by its form; stop and schedules follow the spent share of the budget."""

    def __init__(self, run: Run, V: int):
        cost.steps(run, V)  # refuses a budget below one step
        self.course = Course(run.objective, run.seed.data)
        self.prices, self.refresh = cost.prices(run, V), cost.refresh(run, V)
        self.interval = int(run.optimizer.extra["interval"]) if run.optimizer.curvature else 0
        self.unit, self.amount = cost.budget_unit(run), run.budget.amount
        self.spent = dict.fromkeys(self.prices[0], 0)

    @property
    def form(self) -> int:
        """Of the step that comes next, an index into the objective's forms."""
        return self.course.form(self.steps)

    @property
    def price(self) -> Mapping[str, int]:
        """Of the step that comes next."""
        price = self.prices[self.form]
        if self.interval and self.steps % self.interval == 0:
            return {unit: amount + self.refresh[unit] for unit, amount in price.items()}
        return price

    def charge(self) -> None:
        """Takes the next step."""
        for unit, price in self.price.items():
            self.spent[unit] += price

    @property
    def fits(self) -> bool:
        """Whether the next step ends nearer to the budget than stopping does."""
        return self.spent[self.unit] + self.price[self.unit] / 2 <= self.amount

    @property
    def share_in_step(self) -> float:
        """The share of the budget that is spent in the middle of the step that comes next."""
        return (self.spent[self.unit] + self.price[self.unit] / 2) / self.amount

    @property
    def share(self) -> float:
        return self.spent[self.unit] / self.amount

    @property
    def steps(self) -> int:
        return self.spent["steps"]

    def restore(self, spent: dict[str, int]) -> None:
        if set(spent) != set(self.spent):
            raise ValueError(
                f"checkpoint's units {sorted(spent)} are not this version's {sorted(self.spent)}: start the run again"
            )
        self.spent = dict(spent)
