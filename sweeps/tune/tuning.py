"""What is tuned. A tuning is one file that defines

    def tuning(preset: str = "small", data: Data | None = None) -> Tuning: ...

shipped in `sweeps/tunings/` or anywhere on disk; it may be the file of a study. Studies that share arms share its rules.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lab.checks import check_integer, check_number, nearest, require
from lab.spec import Data, Run, Seed, Shape
from sweeps.grid import override
from sweeps.study import TUNING_SEEDS, TUNINGS, Match, Study, define, named_on, shipped

RATE = "optimizer.learning_rate"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A size at a budget. Every arm has the same trials in it; those held out are in no fit."""

    budget: float
    rung: int
    held_out: bool = False

    def __str__(self) -> str:
        return f"size {self.rung} at {self.budget:.3g}" + (" (held out)" if self.held_out else "")


Grids = Mapping[Cell, tuple[float, ...]]


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """Arms are Run templates, as in a Study; every arm is tried at every size and budget at the same `rates` (ascending, about
    evenly spaced in log rate) with the same `seeds` replicates.

    relative: rates are multiples of each arm's own rate, as its template says it, for arms whose rates are of other sizes.
    against: as in a Study, of arms whose losses are of something else.
    hold_out: a budget and a size that no rule is fitted to, where the rules are tested: give a larger size than the others.
    noise: standard deviation of one trial's loss (nats), where it is known; with seeds = 1 it has to be. moves: how often
    grids may be moved because an optimum lies at an edge. coordinates: other values to be tried at each cell's best rate, one
    at a time: {"optimizer.beta2": (0.9, 0.99), "optimizer.weight_decay": (0.0, 0.3), "batch": (4, 16)}.
    """

    name: str
    arms: Mapping[str, Run]
    budgets: tuple[float, ...]
    sizes: tuple[Shape, ...] | Mapping[str, tuple[Shape, ...]]
    batch: int
    rates: tuple[float, ...]
    relative: bool = False
    against: Mapping[str, str] = field(default_factory=dict)
    hold_out: tuple[float, Shape | Mapping[str, Shape]] | None = None
    seeds: int = 2
    noise: float | None = None
    moves: int = 4
    coordinates: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    match: Match = field(default_factory=Match)
    source: str = ""  # what `lab tune` was given; `load` fills it in

    def __post_init__(self):
        for rate in self.rates:
            check_number("tuning.rates", rate, 0.0, 10.0, open_low=True)
        ascending = sorted(set(self.rates)) == list(self.rates) and len(self.rates) >= 3
        require(ascending, "tuning.rates", self.rates, "give at least 3 rates in ascending order, each once")
        check_integer("tuning.seeds", self.seeds, 1)
        check_integer("tuning.moves", self.moves, 0)
        if self.noise is not None:
            check_number("tuning.noise", self.noise, 0.0, 1e3, open_low=True)
        require(self.seeds > 1 or self.noise is not None, "tuning.noise", self.noise,
                "one seed does not show the noise of a trial: use seeds = 2 or more, or give its standard deviation")  # fmt: skip
        for arm, template in self.arms.items():
            plain = template.seed == Seed()
            require(plain, f"seed of arm {arm}", template.seed, "leave it: tuning trials have seeds of their own")
        budgets = sorted(set(self.budgets)) == list(self.budgets) and len(self.budgets) >= 1
        require(budgets, "tuning.budgets", self.budgets, "give at least one budget, in ascending order, each once")
        self.study(self.cells[0], self.rates)  # names, arms and sizes are checked there
        if self.hold_out is not None:
            check_number("tuning.hold_out budget", self.hold_out[0], 0.0, 1e40, open_low=True)
        for path, values in self.coordinates.items():
            ok = path == "batch" or (path.startswith("optimizer.") and path != RATE)
            require(ok, "tuning.coordinates", path, "use batch, or a field of the optimizer other than learning_rate")
            require(len(values) >= 1, f"tuning.coordinates {path}", values, "give at least one other value")
            for value, (arm, template) in itertools.product(values, self.arms.items()):
                try:
                    override(template, {path: value})
                except ValueError as error:
                    raise ValueError(f"tuning.coordinates {path} = {value!r}, of arm {arm}: {error}") from error

    @property
    def fitted(self) -> tuple[Cell, ...]:
        rungs = range(min(len(self.sizes_of(arm)) for arm in self.arms))
        return tuple(Cell(budget=budget, rung=rung) for budget in self.budgets for rung in rungs)

    @property
    def held_out(self) -> Cell | None:
        if self.hold_out is None:
            return None
        return Cell(budget=self.hold_out[0], rung=max(cell.rung for cell in self.fitted) + 1, held_out=True)

    @property
    def cells(self) -> tuple[Cell, ...]:
        return (*self.fitted, *([self.held_out] if self.held_out else []))

    @property
    def grids(self) -> dict[Cell, tuple[float, ...]]:
        """Before any has been moved."""
        return dict.fromkeys(self.cells, self.rates)

    def sizes_of(self, arm: str) -> tuple[Shape, ...]:
        if not isinstance(self.sizes, Mapping):
            return self.sizes
        require(arm in self.sizes, "tuning.sizes", list(self.sizes), f"give the sizes of arm {arm!r} too")
        return self.sizes[arm]

    def shape(self, arm: str, cell: Cell) -> Shape:
        if not cell.held_out:
            return self.sizes_of(arm)[cell.rung]
        assert self.hold_out is not None
        shape = self.hold_out[1]
        if isinstance(shape, Shape):
            return shape
        require(arm in shape, "tuning.hold_out", list(shape), f"give the size of arm {arm!r} too")
        return shape[arm]

    def study(self, cell: Cell, rates: tuple[float, ...]) -> Study:
        """One cell's trials: every arm at these rates, with seeds that no study has."""
        seed = Seed(init=TUNING_SEEDS, data=TUNING_SEEDS)
        return Study(
            name=f"tune-{self.name}",
            question="Which learning rate is best for each arm, at each size and budget?",
            arms={arm: replace(template, seed=seed) for arm, template in self.arms.items()},
            baseline=next(iter(self.arms), ""),
            budgets=(cell.budget,),
            sizes={arm: (self.shape(arm, cell),) for arm in self.arms},
            batch=self.batch,
            window=1,
            learning_rate=rates,
            relative=self.relative,
            against=self.against,
            seeds=self.seeds,
            match=self.match,
        )


def load(name: str, preset: str = "small", data: Data | None = None, *, tokenizer: str | None = None) -> Tuning:
    """A shipped tuning by its name, or a file's, by its path. data: the text that trials are trained on, instead of its own;
    the tuning's name then ends in that of the text. tokenizer: as in sweeps.load."""
    if name in shipped() and name not in shipped(TUNINGS):
        known = list(shipped(TUNINGS))
        raise ValueError(f"tuning {name!r}: this is a study; {nearest(name, known)}, or give a file with a `tuning`")
    made, source = define("tuning", Tuning, shipped(TUNINGS), name, preset, data, tokenizer)
    return (
        replace(made, source=source) if data is None else replace(made, source=source, name=named_on(made.name, data))
    )
