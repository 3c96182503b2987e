"""A study: a question = arms x budgets x rungs x seeds, and what is matched. A study is one file that defines

    def study(preset: str = "small") -> Study: ...

and, where it can be asked on other text too, takes it as `data: Data | None = None`;
shipped in `sweeps/studies/` or anywhere on disk.
"""

import importlib.util
import inspect
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from analysis.guards import GUARDS, baseline_of
from lab.checks import check_integer, check_number, nearest, require
from lab.data import describe
from lab.data.locate import locate
from lab.data.prepare import Report
from lab.spec import Budget, Data, Evaluation, Objective, Optimizer, Run, Shape
from lab.structure import STRUCTURES, Structure

SHIPPED = Path(__file__).parent / "studies"
TUNINGS = Path(__file__).parent / "tunings"
OWN = "own"  # the learning rate that is each arm's own, as its template says
TUNED = "tuned:"  # what a learning rate begins with that is each arm's own rule, in a file that `lab tune` wrote
# Seeds from here on are those of tuning trials, and of no study: points that were chosen are trained anew (no winner's curse).
TUNING_SEEDS = 2**30
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Match:
    """What compared arms have in common at a budget, and how nearly.

    flops: every arm's own sizes, each trained until the budget is spent in `convention`. tokens: budgets are tokens of
    text. parameters: budgets are tokens too, and each arm's feed-forward width is solved for the baseline's parameters.
    reference_seconds: budgets are seconds of the table of reference times `reference`, its path or the name of one that is
    shipped (Kaddour et al. 2023); of studies of gains, whose arms do not differ in size.
    """

    quantity: Literal["flops", "tokens", "parameters", "reference_seconds"] = "flops"
    convention: Literal["exact", "dense", "6nd", "textbook"] = "exact"
    tolerance: float = 0.01
    reference: str | None = None

    def __post_init__(self):
        choices = ("flops", "tokens", "parameters", "reference_seconds")
        require(self.quantity in choices, "match.quantity", self.quantity, f"use one of {', '.join(choices)}")
        timed = self.quantity == "reference_seconds"
        require(timed == (self.reference is not None), "match.reference", self.reference,
                "give the table that `lab calibrate` made, with quantity = 'reference_seconds' and no other")  # fmt: skip
        require(0 < self.tolerance <= 0.05, "match.tolerance", self.tolerance, "use a share in (0, 0.05]")


@dataclass(frozen=True, kw_only=True)
class Gains:
    """That arms train faster than their baseline at an equal budget: the guards (analysis.guards) refuse what makes such a claim
    worthless, and the report is one of verdicts (analysis.gains).

    margin: the least gain that matters, as a share of the baseline's budget. controls: {arm: factor}, arms that are the
    baseline at so many times its budget, whose answer is known: 1.1 plants a gain of 10%, 1.0 none. free: arms some of whose
    cost is not charged, which are labelled as ablations. allow: guards that flag what they would refuse, by name.
    """

    margin: float = 0.1
    controls: Mapping[str, float] = field(default_factory=dict)
    free: tuple[str, ...] = ()
    allow: tuple[str, ...] = ()

    def __post_init__(self):
        check_number("gains.margin", self.margin, 0.0, 10.0, open_low=True)
        for arm, factor in self.controls.items():
            check_number(f"gains.controls of {arm}", factor, 0.1, 10.0)
        for guard in self.allow:
            require(guard in GUARDS, "gains.allow", guard, nearest(guard, list(GUARDS)))


@dataclass(frozen=True, kw_only=True)
class Study:
    """Arms are Run templates: shape, budget, batch, learning rate and seeds are filled in by the plan.

    sizes: the ladder that all arms share, or one for each arm. Budget i uses `window` neighbouring rungs from rung i
    on, so that a shape compiles once and serves several budgets. batch: examples a step, or those of each arm. learning_rate:
    a rule of sweeps.ladder, a number, several to sweep, "own" for what each template says (`relative`: several multiples of
    that), or "tuned:NAME": each arm by its own rule, as `lab tune` fitted it (a name in sweeps/rules, or a .json file).
    rules: {arm: the arm of that file whose rule it takes}, where that is another.
    against: {arm: the arm it is compared with}, where that is not the baseline: of arms whose losses are of something else.
    gains: the question is whether arms train faster.
    steps: pairs (before, arm) whose difference is of interest beside those to the baseline; where none is given, all arms that
    are alike but for one thing.
    seeds: replicates of every cell; extra_seeds: {(budget index, rung index): replicates} for measuring the noise.
    """

    name: str
    question: str
    arms: Mapping[str, Run]
    baseline: str
    budgets: tuple[float, ...]
    sizes: tuple[Shape, ...] | Mapping[str, tuple[Shape, ...]]
    batch: int | Mapping[str, int]
    window: int = 4
    learning_rate: str | float | tuple[float, ...] = "lab"
    relative: bool = False
    rules: Mapping[str, str] = field(default_factory=dict)
    seeds: int = 1
    extra_seeds: Mapping[tuple[int, int], int] = field(default_factory=dict)
    match: Match = field(default_factory=Match)
    against: Mapping[str, str] = field(default_factory=dict)
    gains: Gains | None = None
    steps: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    source: str = ""  # what `lab run` was given; `load` fills it in

    def __post_init__(self):
        ok = isinstance(self.name, str) and self.name.replace("_", "").replace("-", "").isalnum()
        require(ok, "study.name", self.name, "use letters, digits, - and _: it names a directory")
        require(len(self.arms) >= 1, "study.arms", dict(self.arms), "give at least one arm")
        require(self.baseline in self.arms, "study.baseline", self.baseline, nearest(self.baseline, list(self.arms)))
        require(len(self.budgets) >= 1, "study.budgets", self.budgets, "give at least one budget")
        ascending = sorted(set(self.budgets)) == list(self.budgets) and self.budgets[0] > 0
        require(ascending, "study.budgets", self.budgets, "give positive budgets in ascending order, each once")
        require(self.window >= 1, "study.window", self.window, "use at least 1 rung at each budget")
        require(
            self.gains is None or self.window == 1, "study.window", self.window, "gains are claims at one size: use 1"
        )
        require(self.seeds >= 1, "study.seeds", self.seeds, "use at least 1")
        rates = self.learning_rate
        require(not isinstance(rates, tuple) or 0 < len(rates) == len(set(rates)), "study.learning_rate", rates,
                "give at least one rate, and each once")  # fmt: skip
        require(not self.relative or isinstance(rates, tuple), "study.relative", self.relative,
                "only several learning rates can be multiples of the arms' own")  # fmt: skip
        for arm in (*self.against, *self.against.values(), *(self.gains.controls if self.gains else ()),
                    *(self.gains.free if self.gains else ())):  # fmt: skip
            require(arm in self.arms, "study.against, gains", arm, nearest(arm, list(self.arms)))
        for pair in self.steps:
            known = len(pair) == 2 and set(pair) <= set(self.arms) and pair[0] != pair[1]
            require(known, "study.steps", pair, f"give two of the arms {', '.join(self.arms)}")
        for arm in self.against.values():
            require(self.baseline_of(arm) == arm, "study.against", arm, "a baseline is compared with no other arm")
        for arm in self.gains.controls if self.gains else ():
            base = self.baseline_of(arm)
            remedy = (
                f"a control is its baseline {base} at another budget: give it the same template, sizes, batch and rule"
            )
            rule = self.rules.get(base, base)
            ours, theirs = ((self.arms[a], self.batch_of(a), self.sizes_of(a), r)
                            for a, r in ((arm, self.rules.get(arm, rule)), (base, rule)))  # fmt: skip
            require(arm != base and ours == theirs, "gains.controls", arm, remedy)
        for arm in self.arms:
            check_integer(f"study.batch of arm {arm}", self.batch_of(arm), 1)
        for arm in self.rules:
            require(arm in self.arms, "study.rules", arm, nearest(arm, list(self.arms)))
        tuned = isinstance(self.learning_rate, str) and self.learning_rate.startswith(TUNED)
        remedy = f"only learning_rate = '{TUNED}NAME' has a rule for each arm; use that, or leave rules empty"
        require(tuned or not self.rules, "study.rules", dict(self.rules), remedy)
        for arm in self.arms:
            need = self.window + len(self.budgets) - 1
            have = len(self.sizes_of(arm))
            require(
                have >= self.window,
                f"study.sizes of arm {arm}",
                have,
                f"give at least window = {self.window} sizes ({need} let the window move up with each budget)",
            )
        for (budget, rung), count in self.extra_seeds.items():
            cell = 0 <= budget < len(self.budgets) and rung in self.rungs(budget) and count >= 1
            require(cell, "study.extra_seeds", (budget, rung), "name a budget and a rung that the study has")

    def sizes_of(self, arm: str) -> tuple[Shape, ...]:
        if isinstance(self.sizes, Mapping):
            require(arm in self.sizes, "study.sizes", list(self.sizes), f"give the sizes of arm {arm!r} too")
            return self.sizes[arm]
        return self.sizes

    def batch_of(self, arm: str) -> int:
        if isinstance(self.batch, Mapping):
            require(arm in self.batch, "study.batch", dict(self.batch), f"give that of arm {arm!r} too")
            return self.batch[arm]
        return self.batch

    def baseline_of(self, arm: str) -> str:
        """What an arm is compared with; of a baseline itself."""
        return baseline_of({"baseline": self.baseline, "against": self.against}, arm)

    def rungs(self, budget: int) -> range:
        """Rungs of the ladder that the budget of this index uses."""
        count = min(len(self.sizes_of(arm)) for arm in self.arms)
        first = min(budget, count - self.window)
        return range(first, first + self.window)

    def replicates(self, budget: int, rung: int) -> int:
        return max(self.seeds, self.extra_seeds.get((budget, rung), 1))


def arm(
    structure: str | Structure,
    data: Data,
    *,
    S: int | None = None,
    T: int | None = None,
    loss: Literal["targets", "all"] = "targets",
    objective: Objective | None = None,
    **overrides: Any,
) -> Run:
    """A template: a structure on this data. Give S and T (inputs and targets of text; of encoder-only, tokens and how many are
    masked), or an objective. `overrides` are parts of a Run (options, optimizer, precision, ...)."""
    if isinstance(structure, str) and structure not in STRUCTURES:
        raise ValueError(f"structure = {structure!r}: {nearest(structure, list(STRUCTURES))}")
    chosen = STRUCTURES[structure] if isinstance(structure, str) else structure
    if objective is None:
        require(S is not None and T is not None, "S, T", (S, T), "give both, or an objective")
        name: Literal["lm", "masked_lm"] = "masked_lm" if chosen.encoder_only else "lm"
        objective = Objective(name=name, S=S, T=T, loss=loss)  # pyright: ignore[reportArgumentType]: checked above
    elif (S, T, loss) != (None, None, "targets"):
        raise ValueError(f"S, T, loss = {S}, {T}, {loss!r}: the objective has its own; give one or the other")
    template = Run(
        structure=chosen,
        shape=Shape(D=2, F=1, N=1, K=1, H=2, L=1, L_input=1),  # the plan sets it
        objective=objective,
        data=data,
        optimizer=Optimizer(learning_rate=1e-3),
        budget=Budget(amount=1.0),
        batch=1,
        evaluation=Evaluation(),
    )
    return replace(template, **overrides)


def corpus(
    name: str | Path = "python",
    path: str | Path | None = None,
    *,
    held_out: float | None = None,
    tokenizer: str | Path | None = None,
    column: str | None = None,
    source_column: str | None = None,
    target_column: str | None = None,
    config: str | None = None,
    split: str | None = None,
    report: Report | None = None,
    **settings: Any,
) -> Data:
    """The text as it is found on this machine: read and tokenized once, then known by its manifest's hash.

    name: a corpus (lab.data.CORPORA) that lies at `path`; or, without a path, any source: a corpus, a directory that
    `lab data prepare` or `mix` wrote (with the tokenizer and held-out documents that it has), a folder or a file of text,
    JSON-lines, parquet or ids, a data set's name on the Hugging Face hub. held_out: share of the documents (default: 0.05);
    tokenizer: default bytes; others than those of a prepared directory are refused. column, or source_column and
    target_column: of tables, which is the text. settings: fields of Data, such as allow_repeat. report: told how far
    preparation is.
    """
    given = dict(column=column, source_column=source_column, target_column=target_column, config=config, split=split)
    found, path = locate(name, path, **given)
    data = describe(found, path, held_out, tokenizer, report=report).data
    return replace(data, **settings) if settings else data


def shipped(directory: Path = SHIPPED) -> dict[str, Path]:
    return {path.stem: path for path in sorted(directory.glob("*.py")) if path.stem != "__init__"}


def load(name: str, preset: str = "small", data: Data | None = None, *, tokenizer: str | None = None) -> Study:
    """A shipped study by its name, or a file by its path. data: the text it is asked on, instead of its own; the study's
    name then ends in that of the text. tokenizer: as `corpus` was given it for that text, which the plan's command repeats."""
    if name in shipped(TUNINGS) and name not in shipped():
        raise ValueError(f"study {name!r}: this is a tuning; use `lab tune {name}`")
    made, source = define("study", Study, shipped(), name, preset, data, tokenizer)
    return (
        replace(made, source=source) if data is None else replace(made, source=source, name=named_on(made.name, data))
    )


def define(
    what: str,
    kind: type[T],
    known: Mapping[str, Path],
    name: str,
    preset: str,
    data: Data | None,
    tokenizer: str | None,
) -> tuple[T, str]:
    """What the function `what` of a file returns, which has to be of this kind, and the words by which it is found again. The
    file is one of the `known`, by its name, or any, by its path. Raises ValueError, naming the file, for whatever is wrong."""
    path = known.get(name)
    if path is None:
        path = Path(name)
        if path.suffix != ".py" or not path.exists():
            hint = nearest(name, list(known))
            raise ValueError(
                f"{what} {name!r}: no shipped {what} and no file of that name; {hint}, or give a path to a .py file"
            )
    spec = importlib.util.spec_from_file_location(f"bitterlab_{what}_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        make = getattr(module, what, None)
        if not callable(make):
            more = "; the README shows a whole study in 30 lines" if what == "study" else "; docs/tuning.md shows one"
            raise ValueError(f"defines no function `{what}(preset)`{more}")
        presets = list(getattr(module, "PRESETS", [preset]))
        require(preset in presets, "preset", preset, nearest(preset, presets))
        if data is not None and "data" not in inspect.signature(make).parameters:
            raise ValueError(
                f"takes no other data: let it be `def {what}(preset=..., data=None)`, and use `data or corpus(...)`"
            )
        made = make(preset) if data is None else make(preset, data=data)
    except Exception as error:
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from error
    if not isinstance(made, kind):
        raise ValueError(f"{path}: `{what}` returned {type(made).__name__}, not a sweeps.{kind.__name__}")
    words = [name, *(["--preset", preset] if preset != "small" else [])]
    words += ["--data", data.path or data.corpus] if data is not None else []
    return made, shlex.join([*words, "--tokenizer", tokenizer] if tokenizer else words)


def named_on(name: str, data: Data) -> str:
    return f"{name}-{name_of(data)}"


def name_of(data: Data) -> str:
    """A short name for a text: its last path component, or its corpus's, in letters that name a directory."""
    last = Path(data.path).name if data.path else data.corpus
    return re.sub(r"[^0-9A-Za-z]+", "_", last.split(".")[0] or last).strip("_") or "data"
