"""What a run has spent, in every unit. The ledger, not a step counter, says when a run ends and how far it is."""

from lab import cost
from lab.spec import Run

STEP = "train_step"


class Ledger:
    """Each operation that a run executes is charged here; stop and schedules follow the spent share of the budget."""

    def __init__(self, run: Run, V: int):
        cost.steps(run, V)  # refuses a budget below one step
        self.prices = {STEP: cost.train_step(run, V)}
        self.unit, self.amount = cost.budget_unit(run), run.budget.amount
        self.spent = dict.fromkeys(self.prices[STEP], 0)

    def charge(self, operation: str) -> None:
        for unit, price in self.prices[operation].items():
            self.spent[unit] += price

    def fits(self, operation: str) -> bool:
        """Whether doing it ends nearer to the budget than stopping does."""
        return self.spent[self.unit] + self.prices[operation][self.unit] / 2 <= self.amount

    def share_in(self, operation: str) -> float:
        """The share of the budget that is spent in the middle of the operation that comes next."""
        return (self.spent[self.unit] + self.prices[operation][self.unit] / 2) / self.amount

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
