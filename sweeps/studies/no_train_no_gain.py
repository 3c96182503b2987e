"""What claims to train faster: does it, when its baseline is tuned, fully decayed, and given the same budget?

command    lab tune gains --rules sweeps/rules/gains.json
           lab run no_train_no_gain && lab report no_train_no_gain
cost       small: 1.9e13 FLOPs in 540 runs; planned 13 minutes on 2 CPU cores, measured 17 min 20 s
           (its tuning: 7.7e13 FLOPs in 1,386 trials, 2.75 hours of training). smoke: 54 runs, 3 minutes on one busy core
           gpu, bert, t5: plans, `lab plan` says what they cost
expected   docs/studies/no_train_no_gain.md

The protocol of No Train No Gain (Kaddour et al. 2023, arXiv 2307.06440) on its two model families and a decoder-only one, in one
plan: arms x families x three budgets, each its own fully decayed run, x seeds. An arm is one line in ARMS: what it changes of
its family's baseline. Each family has two controls whose answer is known: the baseline again, and the baseline with a
tenth more budget.

smoke, small, gpu: all families, scaled down. bert, t5: the original's settings, at the updates that its reference times buy in 6,
12 and 24 hours; give them text with --data (it had C4 in 32,768 and 32,128 ids).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lab import cost
from lab.data.packed import causal_lm
from lab.hyperparameters import Numbers
from lab.objectives import corrupted
from lab.spec import Budget, Data, Evaluation, Objective, Optimizer, Options, Run, Shape
from lab.technique import Technique
from sweeps.ladder import shape
from sweeps.study import OWN, Gains, Study, arm, corpus

BASELINE, NO_OP, MORE = "adamw", "no_op", "plus_10"
MASKED = 0.15  # of BERT's tokens


@dataclass(frozen=True, kw_only=True)
class Family:
    """A kind of model with its objective on so many tokens of text, and its baseline's optimizer: its settings, the learning
    rate excepted, and at width D what multiple of AdamW's rate it takes."""

    structure: str
    objective: Callable[[Data, int], Objective]
    options: Options
    optimizer: Mapping[str, Any]
    multiple: Callable[[int], float] = lambda D: 1.0


FAMILIES = {
    # Cramming's one-cycle: up for half of the budget, down to 0.
    "bert": Family(
        structure="encoder_only",
        objective=lambda data, text: Objective(name="masked_lm", S=text, T=round(MASKED * text)),
        options=Options(norm="layer", mlp="geglu", qk_norm=False, encoding="sinusoidal"),
        optimizer=dict(beta2=0.98, eps=1e-12, weight_decay=0.01, clip=0.5, schedule="linear", warmup=0.5),
    ),
    # nanoT5's AdamW, which multiplies the rate by the RMS of what it updates, some D^-0.5; its cosine, whose warm-up begins at
    # half of the peak there and at 0 here.
    "t5": Family(
        structure="encoder_decoder",
        objective=lambda data, text: corrupted(text),
        options=Options(mlp="geglu", qk_norm=False, tied_embeddings=False, encoding="t5"),
        optimizer=dict(name="adamw_scale", warmup=0.15, final=1e-5),
        multiple=lambda D: D**0.5,
    ),
    "decoder": Family(structure="decoder_only", objective=causal_lm, options=Options(), optimizer=dict(beta2=0.95)),
}


# What an arm is, of its family's baseline and AdamW's rate there.
Change = Callable[[Run, float], Run]


def _schedule(**changes: Any) -> Change:
    return lambda base, rate: replace(base, optimizer=replace(base.optimizer, **changes))


def _other(name: str, times: float, **changes: Any) -> Change:
    """Another optimizer with its own defaults, at so many times AdamW's rate, on the baseline's schedule."""

    def changed(base: Run, rate: float) -> Run:
        old = base.optimizer
        kept: dict[str, Any] = dict(schedule=old.schedule, warmup=old.warmup, final=old.final, decay=old.decay)
        return replace(base, optimizer=Optimizer(name=name, learning_rate=times * rate, **kept | changes))

    return changed


def _technique(name: str, *, charged: bool = True, **settings: float) -> Change:
    technique = Technique(name=name, charged=charged, settings=Numbers(settings))
    return lambda base, rate: replace(base, technique=technique)


# Rates are where tuning starts from.
ARMS: dict[str, Change] = {
    "stacking": _technique("stacking"),
    "layer_dropping": _technique("layer_dropping"),
    "selective_backprop": _technique("selective_backprop"),
    "rho_loss": _technique("rho_loss"),
    "rho_loss_free": _technique("rho_loss", charged=False),
    "ema": _technique("ema"),
    "lion": _other("lion", 0.2),
    "sophia_g": _other("sophia_g", 0.5),
    "muon": _other("muon", 1.0),
    "linear": _schedule(schedule="linear", warmup=0.05, final=0.0),
    "cosine": _schedule(schedule="cosine", warmup=0.05, final=0.0),
    "wsd": _schedule(schedule="wsd", warmup=0.05, decay=0.2, final=0.0),
}
FREE = ("rho_loss_free",)  # ablations: not all that they execute is charged
ONCE = ("rho_loss", "rho_loss_free")  # no text may come again: they join where a user's own text has enough


@dataclass(frozen=True, kw_only=True)
class Preset:
    """shape of every family's stacks; text: tokens of an example. budgets: exact FLOPs, or `updates` of the baseline. rate:
    AdamW's, where no rule was tuned. tuned_at: where arms are tuned (sweeps.tunings.gains), if not at these budgets."""

    families: tuple[str, ...] = tuple(FAMILIES)
    arms: tuple[str, ...] = tuple(ARMS)
    shape: Shape
    text: int
    batch: int
    budgets: tuple[float, ...] = ()
    updates: tuple[int, ...] = ()
    tuned_at: tuple[float, ...] = ()
    rate: float
    seeds: int
    examples: int = 512
    learning_rate: str = OWN
    settings: Mapping[str, Any] = field(default_factory=dict)  # parts of a Run


BERT = Shape(D=768, F=1536, N=12, K=12, H=64, L=16, L_input=16)  # its 3072 is both halves of GeGLU's first product
T5 = Shape(D=768, F=2048, N=12, K=12, H=64, L=12, L_input=12)  # v1.1's
PRESETS = {
    "smoke": Preset(shape=shape(16, 4), text=32, batch=2, budgets=(1e9, 2e9, 4e9), rate=0.01, seeds=2, examples=64,
                    arms=("wsd",)),
    "small": Preset(shape=shape(16, 4), text=64, batch=4, budgets=(8e9, 2.4e10, 7.2e10), tuned_at=(8e9, 3.2e10, 1.28e11),
                    rate=0.02, seeds=5,
                    arms=tuple(name for name in ARMS if name not in ("linear", "cosine")), learning_rate="tuned:gains"),
    "gpu": Preset(shape=shape(256, 8, head_width=64), text=256, batch=64, budgets=(1.2e14, 4.8e14, 1.92e15), rate=2e-3, seeds=5,
                  examples=4096, settings=dict(precision="bf16")),
    "bert": Preset(families=("bert",), shape=BERT, text=128, batch=1536, updates=(7989, 15978, 31957), rate=1e-3, seeds=3,
                   examples=10_000, settings=dict(precision="bf16")),
    "t5": Preset(families=("t5",), shape=T5, text=568, batch=144, updates=(20950, 41901, 83802), rate=1e-3, seeds=3,
                 examples=10_000, settings=dict(precision="bf16")),
}  # fmt: skip


def templates(preset: str, data: Data) -> dict[str, Run]:
    """Every family's baseline and arms, as "family/arm"; controls are among them."""
    chosen, made = PRESETS[preset], {}
    for name in chosen.families:
        family = FAMILIES[name]
        base = arm(
            family.structure,
            data,
            objective=family.objective(data, chosen.text),
            options=family.options,
            optimizer=Optimizer(learning_rate=family.multiple(chosen.shape.D) * chosen.rate, **family.optimizer),
            evaluation=Evaluation(examples=chosen.examples),
            **chosen.settings,
        )
        made[f"{name}/{BASELINE}"] = base
        arms = [other for other in chosen.arms if not (data.allow_repeat and other in ONCE)]
        changed = {other: ARMS[other](base, chosen.rate) for other in arms}
        made |= {f"{name}/{other}": run for other, run in changed.items() if run != base}
        made |= {f"{name}/{NO_OP}": base, f"{name}/{MORE}": base}
    return made


def against(arms: Iterable[str]) -> dict[str, str]:
    """Each arm's own family's baseline; of baselines nothing."""
    return {name: f"{name.split('/')[0]}/{BASELINE}" for name in arms if not name.endswith(f"/{BASELINE}")}


def budgets(preset: str, data: Data) -> tuple[float, ...]:
    """Exact FLOPs: of so many updates of the first family's baseline where a preset counts those."""
    chosen = PRESETS[preset]
    if not chosen.updates:
        return chosen.budgets
    first = next(iter(templates(preset, data).values()))
    run = replace(first, shape=chosen.shape, batch=chosen.batch, budget=Budget(unit="steps", amount=1))
    return tuple(float(updates * cost.train_step(run, run.V)["exact"]) for updates in chosen.updates)


def study(preset: str = "small", data: Data | None = None) -> Study:
    chosen = PRESETS[preset]
    published = bool(chosen.updates)
    allow = ("repeated_text",) if published and data is None else ()
    data = data or corpus("python", allow_repeat=published)
    arms = templates(preset, data)
    first = f"{chosen.families[0]}/{BASELINE}"
    return Study(
        name="no_train_no_gain",
        question="What that claims to train faster does so, against a tuned and fully decayed baseline of the same budget?",
        arms=arms,
        baseline=first,
        against=against(arms),
        budgets=budgets(preset, data),
        sizes=(chosen.shape,),
        window=1,
        batch=chosen.batch,
        seeds=chosen.seeds,
        learning_rate=chosen.learning_rate,
        gains=Gains(controls={name: 1.1 if name.endswith(MORE) else 1.0 for name in arms
                              if name.split("/")[1] in (NO_OP, MORE)},
                    free=tuple(name for name in arms if name.split("/")[1] in FREE), allow=allow),
    )  # fmt: skip
