"""What a study takes from a file of rules: `learning_rate="tuned:NAME"` gives each arm the rate of its own rule."""

import dataclasses
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from lab.spec import Run
from sweeps.grid import override
from sweeps.ladder import LEARNING_RATES, Size
from sweeps.study import OWN, TUNED, Study
from sweeps.tune.rules import Regret, Rule, Rules, Scalar, find, read, setup

# Without these alike a rate says nothing about another arm's; other differences are said in a note.
DECISIVE = ("structure", "objective", "loss", "optimizer", "technique", "parametrization.name")
# In what a study may differ from its tuning without its arms being others than those that were tuned.
OF_THE_STUDY = ("S", "T", "batch", "precision")


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The rule of each arm of a study: `of` names the arm of the file."""

    study: Study
    path: Path
    rules: Rules
    of: Mapping[str, str]

    def rule(self, arm: str) -> Rule:
        return self.rules.rules[self.of[arm]]

    def applied(self, arm: str, run: Run) -> Run:
        """The run with its rule's rate and settings; warns where the size or the tokens lie outside of what was fitted."""
        rule, size = self.rule(arm), Size.of(run, run.V)
        for name, value, (low, high) in (
            ("body forward FLOPs per token", size.body_flops, rule.fitted.size),
            ("tokens", size.tokens, rule.fitted.tokens),
        ):
            if not low * (1 - 1e-9) <= value <= high * (1 + 1e-9):
                self._extrapolates(name, f"{value:.3g} for {arm}, whose cells have {low:.3g} to {high:.3g}")
        depths = sorted({cell.L for cell in rule.cells})
        if run.shape.L not in depths:
            self._extrapolates("depth", f"L = {run.shape.L} for {arm}, whose cells have {', '.join(map(str, depths))}")
        rate = float(f"{rule.rate(size):.6g}")  # as sweeps.ladder.learning_rate
        return replace(run, optimizer=override(run.optimizer, {**rule.optimizer, "learning_rate": rate}))

    def _extrapolates(self, name: str, where: str) -> None:
        rule = self.study.learning_rate
        warnings.warn(f"learning-rate rule {rule!r} extrapolates in {name} and is asked at {where}", stacklevel=3)

    def borrowed(self, arm: str) -> tuple[str, ...]:
        """In what an arm differs from the one whose rule it takes, so that it was not tuned itself: "options.mixing
        'attention' there, 'dense' here"."""
        return tuple(
            f"{name} {was!r} there, {now!r} here"
            for name, was, now in self._setup_differences(arm)
            if name not in OF_THE_STUDY
        )

    def notes(self, runs: Iterable[tuple[str, Run]]) -> list[str]:
        """For the plan and the report: which rules, how well they are known at the runs of these arms, what tuning cost, what
        sharing one rule would have cost."""
        used = {arm: self.rule(arm) for arm in self.study.arms}
        each = "; ".join(
            f"{arm} {rule}" + (f" (the rule of {self.of[arm]})" if self.of[arm] != arm else "")
            + (f" with {', '.join(f'{k} {v}' for k, v in rule.optimizer.items())}" if rule.optimizer else "")
            for arm, rule in used.items()
        )  # fmt: skip
        rules = {name: self.rules.rules[name] for name in dict.fromkeys(self.of.values())}
        flops, hours = sum(r.flops for r in rules.values()), sum(r.hours for r in rules.values())
        own = [arm for arm in used if not self.borrowed(arm)]
        who = "arms" if len(own) == len(used) else ", ".join(own) or "the arms of these rules"
        trials = next(iter(rules.values())).trials
        said = [
            f"learning rates by the arms' own rules ({self.study.learning_rate}, size in body forward FLOPs per token): {each}",
            f"{who} were tuned alike, by {trials} trials each on seeds that no run of a study has: {flops:.3g} FLOPs and "
            f"{hours:.2g} hours of training, which are in no budget here ({self.rules.source.command})",
            *self._known(runs),
            *self._regret(),
        ]
        ours = {
            difference for arm in used for difference in self._setup_differences(arm) if difference[0] in OF_THE_STUDY
        }
        if outside := [f"{name} {was!r} there, {now!r} here" for name, was, now in sorted(ours, key=str)]:
            said.append(f"the rules were tuned with other settings than this study's: {'; '.join(outside)}")
        manifest = next(iter(self.study.arms.values())).data.manifest
        if manifest != self.rules.source.data["manifest"]:
            said.append(f"the rules were tuned on other text: {self.rules.source.data['summary']}")
        return said

    def _known(self, runs: Iterable[tuple[str, Run]]) -> list[str]:
        factors = {(arm, run.shape, run.budget.amount): self.rule(arm).within(Size.of(run, run.V)) for arm, run in runs}
        known = {where: factor for where, factor in factors.items() if factor is not None}
        if len(known) < len(factors):
            return ["how well the rules are known can not be said: their cells leave no degree of freedom"]
        (arm, shape, budget), factor = max(known.items(), key=lambda item: item[1])
        return [
            f"the rules' rates are known within a factor of {factor:.3g} (95%) at worst, {arm} D = {shape.D} at {budget:.3g}"
        ]

    def _regret(self) -> list[str]:
        tuned = [arm for arm in self.study.arms if not self.borrowed(arm)]
        own = {arm: self.rules.regret[self.of[arm]][self.of[arm]] for arm in tuned}
        donor = self.of[self.study.baseline]
        shared = {arm: self.rules.regret[donor][self.of[arm]] for arm in tuned}
        if not tuned:
            return []
        whose, all_of = ("arm's", "arms") if len(tuned) == len(self.study.arms) else ("tuned arm's", "of them")
        return [
            f"in the tuned cells each {whose} own rule costs {_words(own)} against its best rate, and {donor}'s rule for all "
            f"{all_of} would cost {_words(shared)}"
        ]

    def _setup_differences(self, arm: str) -> list[tuple[str, Scalar, Scalar]]:
        """Settings of an arm that are not those that its rule was tuned with: name, the rule's, the study's."""
        rule = self.rule(arm)
        here, there = setup(replace(self.study.arms[arm], batch=self.study.batch_of(arm))), rule.setup
        return [
            (name, there.get(name), here.get(name))
            for name in dict.fromkeys([*there, *here])
            if there.get(name) != here.get(name) and name.removeprefix("optimizer.") not in rule.optimizer
        ]


def chosen(study: Study) -> Chosen | None:
    """The rules that the study names; None where it names none. Raises ValueError for an arm without a rule, or with one of
    another structure, objective or optimizer. That arms were tuned alike is a guard's (analysis.guards)."""
    if not (isinstance(study.learning_rate, str) and study.learning_rate.startswith(TUNED)):
        return None
    path = find(study.learning_rate.removeprefix(TUNED))
    found = _read_once(path, path.stat().st_mtime_ns if path.exists() else 0)
    controls = study.gains.controls if study.gains else {}
    same = {arm: study.baseline_of(arm) if arm in controls else arm for arm in study.arms}
    of = {arm: study.rules.get(arm, study.rules.get(same[arm], same[arm])) for arm in study.arms}
    one = Chosen(study=study, path=path, rules=found, of=of)
    for arm, name in one.of.items():
        _check(study, arm, name, found, path)
    return one


@cache
def _read_once(path: Path, modified: int) -> Rules:
    return read(path)


def _check(study: Study, arm: str, name: str, found: Rules, path: Path) -> None:
    here = setup(study.arms[arm])
    if name not in found.rules:
        alike = [other for other, rule in found.rules.items() if all(rule.setup[k] == here[k] for k in DECISIVE)]
        way = f"rules={{{arm!r}: {(alike or list(found.rules))[0]!r}}} takes another arm's"
        raise ValueError(
            f"study {study.name}: arm {name!r} has no rule in {path}, which has {', '.join(found.rules)}; {way}, or tune it "
            "with the others (`lab tune`)"
        )
    there = found.rules[name].setup
    for key in DECISIVE:
        if here[key] != there[key] and (key == "optimizer" or arm not in study.rules):
            way = (
                "tune it with this optimizer"
                if key == "optimizer"
                else f"say so with rules={{{arm!r}: {name!r}}} if it is meant"
            )
            raise ValueError(
                f"study {study.name}: {key} of arm {arm!r} is {here[key]!r}, but its rule in {path} is of {there[key]!r}; {way}"
            )


def described(study: Study) -> dict[str, Any]:
    """What plan.json says about a study's learning rates."""
    rate = study.learning_rate
    if (one := chosen(study)) is not None:
        donor = one.of[study.baseline]
        return {
            "rule": rate,
            "source": dataclasses.asdict(one.rules.source),
            "arms": {arm: {"rule": name, "c": one.rule(arm).c, "a": one.rule(arm).a, "b": one.rule(arm).b,
                           "optimizer": dict(one.rule(arm).optimizer), "trials": one.rule(arm).trials,
                           "flops": one.rule(arm).flops, "hours": one.rule(arm).hours,
                           "borrowed": list(one.borrowed(arm)),
                           "regret": None if one.borrowed(arm) else dataclasses.asdict(one.rules.regret[name][name]),
                           "regret_of_sharing": dataclasses.asdict(one.rules.regret[donor][name])}
                     for arm, name in one.of.items()},
        }  # fmt: skip
    if rate == OWN:
        return {"rule": rate, "rates": {arm: template.optimizer.learning_rate for arm, template in study.arms.items()}}
    if isinstance(rate, str):
        return {"rule": rate, "source": LEARNING_RATES[rate].source if rate in LEARNING_RATES else ""}
    return {"rates": list(rate)} if isinstance(rate, tuple) else {"rate": float(rate)}


def _words(of: Mapping[str, Regret]) -> str:
    known = {arm: r for arm, r in of.items() if r.worst is not None and r.mean is not None}
    lost = [arm for arm, r in of.items() if r.beyond or r.diverged]
    more = f" (not measured everywhere for {', '.join(lost)})" if lost else ""
    if not known:
        return "what was not measured"
    worst = max(known, key=lambda arm: known[arm].worst or 0.0)
    mean = sum((r.mean or 0.0) * r.cells for r in known.values()) / sum(r.cells for r in known.values())
    return f"{mean:.2g} nats on average and {known[worst].worst:.2g} at worst ({worst}){more}"
