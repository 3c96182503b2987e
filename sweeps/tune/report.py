"""What a tuning found, as tables: for the terminal, tuning.md, and CSV."""

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lab import records
from sweeps.tune import rules as files
from sweeps.tune.conclude import ALL, DEFAULT, Tuned, rules_of
from sweeps.tune.rules import Regret, Rules, Source

RULES, PAGE, TRIALS, OPTIMA, REGRET = "rules.json", "tuning.md", "trials.csv", "optima.csv", "regret.csv"
MOST_IN_A_ROW = 10  # arms, beyond which a table of each rule for each arm can not be read


@dataclass(frozen=True, kw_only=True)
class Table:
    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def write(tuned: Tuned, source: Source, directory: Path) -> Rules:
    """rules.json, tuning.md, trials.csv, optima.csv and regret.csv; returns the rules."""
    rules = rules_of(tuned, source)
    directory.mkdir(parents=True, exist_ok=True)
    files.write(directory / RULES, rules)
    records.write_bytes(directory / PAGE, markdown(tuned, rules).encode())
    _csv(directory / TRIALS, ("arm", "budget", "D", "L", "held_out", "stage", "setting", "value", "learning_rate", "replicate",
                              "seed_init", "seed_data", "status", "loss", "flops", "seconds", "run_id"),
         _trial_rows(tuned))  # fmt: skip
    _csv(directory / OPTIMA, ("arm", "budget", "D", "held_out", "body_flops_per_token", "tokens", "rate", "low", "high", "loss",
                              "curvature", "cliff", "rule"),
         ((arm, c.budget, c.D, c.held_out, c.size, c.tokens, c.rate, c.low, c.high, c.loss, c.curvature, c.cliff,
           tuned.laws.of[arm].rate(tuned.sizes[arm, cell]))
          for arm, rule in rules.rules.items()
          for c, cell in zip(rule.cells, tuned.trials.tuning.cells, strict=True)))  # fmt: skip
    _csv(directory / REGRET, ("rule", "arm", "budget", "rung", "held_out", "regret"),
         ((name, arm, cell.budget, cell.rung, cell.held_out, "" if math.isnan(value) else value)
          for (name, arm, cell), value in tuned.excess.items()))  # fmt: skip
    return rules


def tables(tuned: Tuned, rules: Rules) -> list[Table]:
    found = [_rules(tuned, rules), _cells(rules), _regret(tuned, rules)]
    found += [_held_out(rules)] if tuned.held_out else []
    found += [_coordinates(rules)] if any(rule.coordinates for rule in rules.rules.values()) else []
    return found


def markdown(tuned: Tuned, rules: Rules) -> str:
    source = rules.source
    lines = [
        f"# Tuning {rules.name}",
        "",
        f"`{source.command}`; text: {source.data['summary']}. Plan {source.plan_sha256[:12]}, {source.device}.",
        "",
        f"Noise of a trial: {tuned.noise}. Intervals are 95%: of a best rate Fieller's, of that noise; of a rule from the "
        "scatter of the best rates about it.",
    ]
    for table in tables(tuned, rules):
        lines += ["", f"## {table.title}", "", _line(table.heads), _line("---" for _ in table.heads)]
        lines += [_line(row) for row in table.rows]
        lines += ["", table.note] if table.note else []
    return "\n".join(lines) + "\n"


def _rules(tuned: Tuned, rules: Rules) -> Table:
    form = next(iter(rules.rules.values())).form
    laws, scatter = tuned.laws, tuned.laws.scatter
    differ, rules_differ = laws.exponents_differ, laws.rules_differ
    alike = ""
    if not math.isnan(differ.p):
        alike += (f" Exponents are {'shared by all arms' if laws.shared else 'each arm its own'}: that they differ has "
                  f"F = {differ.F:.2f}, p = {differ.p:.2g}.")  # fmt: skip
    if not math.isnan(rules_differ.p):
        alike += (f" One rule for all arms: {_law(laws.one.c, rules, tuned)}; that arms differ from it has "
                  f"F = {rules_differ.F:.2f}, p = {rules_differ.p:.2g}.")  # fmt: skip
    return Table(
        title=f"Rules: rate = {form}",
        heads=("arm", "rule", "at the centre", "a", "b", "trials", "diverged", "FLOPs", "hours"),
        rows=tuple(
            (
                arm,
                str(rule),
                _with(rule.rate_at_centre, rule.rate_interval, True, ".3g"),
                _with(rule.a, rule.a_interval, "size" in form),
                _with(rule.b, rule.b_interval, "tokens" in form),
                str(rule.trials),
                str(tuned.diverged(arm)),
                f"{rule.flops:.3g}",
                f"{rule.hours:.3g}",
            )
            for arm, rule in rules.rules.items()
        ),
        note=f"Size is body forward FLOPs per token of text. Best rates scatter about their rules by "
        f"{_number(scatter.sd, '.2g')} in log rate ({scatter.dof} degrees of freedom, all arms).{alike} Tuning cost "
        f"{sum(r.flops for r in rules.rules.values()):.3g} FLOPs and {sum(r.hours for r in rules.rules.values()):.3g} hours of "
        "training in all.",
    )


def _law(c: float, rules: Rules, tuned: Tuned) -> str:
    powers = zip(tuned.laws.one.columns, tuned.laws.one.exponents, strict=True)
    return f"{c:.3g}" + "".join(f" {name}^{power:.3f}" for name, power in powers)


def _cells(rules: Rules) -> Table:
    return Table(
        title="Best rates",
        heads=("arm", "budget", "D", "best rate", "95% interval", "loss there"),
        rows=tuple(
            (
                arm,
                f"{c.budget:.3g}",
                f"{c.D}" + (" (held out)" if c.held_out else ""),
                f"{c.rate:.4g}",
                f"{_number(c.low, '.3g')} to {_number(c.high, '.3g')}"
                + (" (beside a rate that diverged)" if c.cliff else ""),
                f"{c.loss:.4f}",
            )
            for arm, rule in rules.rules.items()
            for c in rule.cells
        ),
        note="A trial that diverged counts as an infinite loss and is never left out.",
    )


def _regret(tuned: Tuned, rules: Rules) -> Table:
    note = (
        "From each cell's measured losses: its parabola between the neighbours of the best rate, straight lines between "
        f"measured rates beyond. `{DEFAULT}` is the default rule. '+n' counts cells where the rate lies outside of what was "
        "tried, '!n' those where it is one that diverges."
    )
    title = "loss at its rate less the loss at the arm's best rate (nats), mean and worst of cells"
    if len(tuned.arms) > MOST_IN_A_ROW:
        shared = (tuned.arms[0], ALL, DEFAULT)
        return Table(
            title=f"Regret of sharing a rule: {title}",
            heads=("arm", "own rule", *(f"rule of {name}" if name in tuned.arms else name for name in shared)),
            rows=tuple((arm, *(_regretted(rules.regret[name][arm]) for name in (arm, *shared))) for arm in tuned.arms),
            note=f"{note} Every arm's rule used for every other: {REGRET}.",
        )
    return Table(
        title=f"Regret of sharing a rule: {title}",
        heads=("rule of \\ used for", *tuned.arms),
        rows=tuple(
            (name, *(_regretted(rules.regret[name][arm]) for arm in tuned.arms)) for name in (*tuned.arms, ALL, DEFAULT)
        ),
        note=note,
    )


def _held_out(rules: Rules) -> Table:
    held = {arm: (rule.held_out, rule.cells[-1]) for arm, rule in rules.rules.items() if rule.held_out is not None}
    return Table(
        title="Held out: the rule at a size that it was not fitted to",
        heads=("arm", "rule's rate", "best rate", "off by", "loss that costs", "95% of the rule", "best inside"),
        rows=tuple(
            (
                arm,
                f"{h.rate:.4g}",
                f"{c.rate:.4g}",
                f"{math.exp(h.log_off):.2f} times",
                _number(h.excess, ".2g", "not measured"),
                "" if h.interval is None else f"{h.interval[0]:.3g} to {h.interval[1]:.3g}",
                {True: "yes", False: "no", None: ""}[h.inside],
            )
            for arm, (h, c) in held.items()
            if h is not None
        ),
    )


def _coordinates(rules: Rules) -> Table:
    return Table(
        title="Other settings, one at a time at the best rates: difference in loss (nats)",
        heads=("arm", "setting", "value", "difference", "interval", "adopted"),
        rows=tuple(
            (
                arm,
                c.path,
                str(c.value),
                _number(c.difference, "+.4f", "diverges"),
                f"{_number(c.low, '+.4f')} to {_number(c.high, '+.4f')}",
                "yes" if c.adopted else "no",
            )
            for arm, rule in rules.rules.items()
            for c in rule.coordinates
        ),
        note="Paired by cell and seed; 95% over all values tried for all arms. A setting of the optimizer that is better beyond "
        "its interval goes into the arm's rule; a batch is the study's to change.",
    )


def _trial_rows(tuned: Tuned) -> Iterable[tuple[object, ...]]:
    for t in tuned.trials.trials:
        run, how = t.row.run, tuned.outcomes[t.row.run_id]
        lost = math.isinf(how.loss)
        yield (t.arm, t.cell.budget, run.shape.D, run.shape.L, t.cell.held_out, t.stage, t.path,
               "" if t.value is None else t.value, t.rate, t.row.replicate, run.seed.init, run.seed.data,
               "diverged" if lost else "done", "inf" if lost else how.loss, how.flops, how.seconds, t.row.run_id)  # fmt: skip


def _regretted(r: Regret) -> str:
    said = "" if r.mean is None or r.worst is None else f"{r.mean:.2g} / {r.worst:.2g}"
    return " ".join(filter(None, [said, f"+{r.beyond}" if r.beyond else "", f"!{r.diverged}" if r.diverged else ""]))


def _with(value: float, interval: tuple[float, float] | None, there: bool, form: str = ".3f") -> str:
    if not there:
        return ""
    return f"{value:{form}}" + (f" ({interval[0]:{form}} to {interval[1]:{form}})" if interval else "")


def _number(value: float | None, form: str, missing: str = "open") -> str:
    return missing if value is None or math.isnan(value) else format(value, form)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _csv(path: Path, heads: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(heads)
        writer.writerows(rows)
