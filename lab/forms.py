"""An objective in numbers: its lengths, the static forms that its steps take, and which step takes which.

Every step of a run is one form: fixed lengths S and T, so that one compiled program serves it. Most objectives have one;
an objective that draws split points, denoisers or length buckets has several, each so many times in a cycle of steps, in an
order that (seed, cycle) fixes. So what a run of so many steps costs is known before it is trained, to the last digit.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lab.checks import check_choice, check_integer, require

ObjectiveName = Literal["lm", "prefix_lm", "span_corruption", "ul2", "masked_lm", "causal_lm", "pairs"]
MOST_FORMS = 16


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Which tokens go in and which are predicted (lab.objectives; docs/data.md says whose losses may be compared).

    lm               S tokens of text are the inputs, the T that follow the targets; loss 'all' also scores inputs 2..S
    prefix_lm        S+T tokens of text are split anew at each step, at one of `splits`, each as often as the others
    span_corruption  `spans` spans of the text are replaced by sentinels, and are the targets (T5)
    ul2              S+T tokens of text go through one of seven denoisers at each step (UL2)
    masked_lm        T of S tokens are masked (BERT); encoder-only
    causal_lm        documents packed in rows of T, each token a target once; S = 0: there are no inputs
    pairs            sources and targets of their own lengths, in `buckets` of (S, T, share of the steps), padded

    S and T are lengths of the streams; of an objective of several forms, those of its reference form (prefix_lm, ul2: any
    that add up to the text) or its largest (pairs).
    """

    name: ObjectiveName = "lm"
    S: int
    T: int
    loss: Literal["targets", "all"] = "targets"
    splits: tuple[int, ...] = ()  # prefix_lm: input lengths
    spans: int = 0  # span_corruption
    buckets: tuple[tuple[int, int, int], ...] = ()  # pairs
    attended: int = 0  # causal_lm: query-key pairs of a row, the mean over the corpus (lab.data.packed)

    def __post_init__(self):
        check_choice("objective.name", self.name, ObjectiveName)
        check_choice("objective.loss", self.loss, Literal["targets", "all"])
        check_integer("objective.T", self.T, 1)
        if self.name == "causal_lm":
            require(self.S == 0, "objective.S", self.S, "causal_lm has no inputs: use 0")
            most = self.T * (self.T + 1) // 2
            require(self.T <= self.attended <= most, "objective.attended", self.attended,
                    f"use the query-key pairs of a row, {self.T} to {most}: lab.data.packed.causal_lm counts them")  # fmt: skip
        else:
            check_integer("objective.S", self.S, 1)
        for name, of in (("splits", "prefix_lm"), ("spans", "span_corruption"), ("buckets", "pairs")):
            wanted, value = self.name == of, getattr(self, name)
            require(
                bool(value) == wanted, f"objective.{name}", value, f"{self.name} needs {'them' if wanted else 'none'}"
            )
        require(self.name == "causal_lm" or not self.attended, "objective.attended", self.attended,
                f"{self.name} needs none: use 0")  # fmt: skip
        if self.loss == "all":
            require(self.name in ("lm", "prefix_lm", "pairs"), "objective.loss", self.loss,
                    f"{self.name} scores its targets: use 'targets'")  # fmt: skip
        checks = {"masked_lm": self._check_masked_lm, "prefix_lm": self._check_prefix_lm,
                  "span_corruption": self._check_span_corruption, "pairs": self._check_pairs}  # fmt: skip
        if self.name in checks:
            checks[self.name]()

    def _check_masked_lm(self) -> None:
        require(self.T <= self.S, "objective.T", self.T, f"mask at most the S = {self.S} tokens there are")

    def _check_prefix_lm(self) -> None:
        text, splits = self.S + self.T, self.splits
        ok = all(isinstance(s, int) and 1 <= s < text for s in splits) and len(set(splits)) == len(splits)
        require(ok and len(splits) <= MOST_FORMS, "objective.splits", splits,
                f"use 1 to {MOST_FORMS} different input lengths from 1 to {text - 1}")  # fmt: skip

    def _check_span_corruption(self) -> None:
        check_integer("objective.spans", self.spans, 1)
        noise, text = self.T - self.spans - 1, self.length
        require(
            self.spans <= noise and self.spans <= text - noise,
            "objective.spans",
            self.spans,
            f"S = {self.S} and T = {self.T} leave {noise} tokens for the spans and {text - noise} between them, and each "
            "span and gap needs one; lab.objectives.corrupted gives S, T and spans that fit",
        )

    def _check_pairs(self) -> None:
        for bucket in self.buckets:
            ok = len(bucket) == 3 and all(isinstance(n, int) and n >= 1 for n in bucket)
            require(ok, "objective.buckets", bucket, "use (S, T, share of the steps), whole numbers of at least 1")
        require(len(self.buckets) <= MOST_FORMS, "objective.buckets", len(self.buckets), f"use at most {MOST_FORMS}")
        largest = max(b[0] for b in self.buckets), max(b[1] for b in self.buckets)
        require(largest == (self.S, self.T), "objective.S, T", (self.S, self.T), f"use the largest buckets', {largest}")

    @property
    def specials(self) -> int:
        """Ids of its own that the objective needs beside SEP, MASK and PAD: sentinels, then UL2's modes."""
        if self.name == "ul2":
            return self.ul2_spans + len(UL2_MODES)
        return self.spans

    @property
    def ul2_spans(self) -> int:
        """Sentinels that UL2's denoisers share."""
        return max(noised(self.length, *denoiser)[1] for denoiser in UL2_DENOISERS.values() if denoiser[0])

    @property
    def length(self) -> int:
        """Tokens of text in one example; of pairs those of the largest bucket, padding and the end among them."""
        if self.name == "masked_lm":
            return self.S
        return self.S + self.T - (2 * self.spans + 1 if self.spans else 0)


# Tay et al. 2022 (UL2), table 1: mean span and share of the text that is noise, of R- and X-denoisers; the S-denoiser, of no
# mean span, predicts the last share from the rest. Each is as frequent as the others, and is told by its mode's token.
UL2_MODES = ("R", "S", "X")
UL2_DENOISERS: dict[str, tuple[float, float]] = {
    "R3": (3, 0.15), "R8": (8, 0.15), "S": (0, 0.25), "X3": (3, 0.5), "X8": (8, 0.5), "X64": (64, 0.15), "X64h": (64, 0.5),
}  # fmt: skip


def noised(text: int, mean_span: float, density: float) -> tuple[int, int]:
    """Of `text` tokens: how many are noise, and in how many spans (Raffel et al. 2020, random_spans_noise_mask)."""
    noise = min(max(round(text * density), 1), text - 1)
    return noise, min(max(round(noise / mean_span), 1), text - noise)


@dataclass(frozen=True, kw_only=True)
class Form:
    """What one step is made of. `share`: how often in a cycle. `mode`: which of UL2's mode tokens leads the inputs."""

    name: Literal["lm", "span_corruption", "masked_lm", "causal_lm", "pairs"]
    S: int
    T: int
    length: int  # tokens of text in one example
    loss: Literal["targets", "all"] = "targets"
    spans: int = 0
    attended: int = 0
    mode: int | None = None
    share: int = 1

    @property
    def scored(self) -> int:
        """P: positions at which logits are computed."""
        return self.T + (self.S - 1 if self.loss == "all" else 0)


@functools.lru_cache(maxsize=1024)
def forms(objective: Objective) -> tuple[Form, ...]:
    """The forms that steps of this objective take, each with its share of a cycle."""
    o = objective
    if o.name == "prefix_lm":
        return tuple(split(o.length, S, loss=o.loss) for S in o.splits)
    if o.name == "pairs":
        return tuple(Form(name="pairs", S=S, T=T, length=S + T, loss=o.loss, share=n) for S, T, n in o.buckets)
    if o.name == "ul2":
        return tuple(_denoiser(o.length, name) for name in UL2_DENOISERS)
    return (Form(name=o.name, S=o.S, T=o.T, length=o.length, loss=o.loss, spans=o.spans, attended=o.attended),)


def split(text: int, S: int, *, loss: Literal["targets", "all"] = "targets", mode: int | None = None) -> Form:
    """The first S of `text` tokens as inputs, the others as targets."""
    return Form(name="lm", S=S + (mode is not None), T=text - S, length=text, loss=loss, mode=mode)


def _denoiser(text: int, name: str) -> Form:
    mean_span, density = UL2_DENOISERS[name]
    mode = UL2_MODES.index(name[0])
    if not mean_span:
        return split(text, text - noised(text, 1, density)[0], mode=mode)
    noise, spans = noised(text, mean_span, density)
    return Form(
        name="span_corruption", S=text - noise + spans + 1, T=noise + spans + 1, length=text, spans=spans, mode=mode
    )


def evaluated(objective: Objective, splits: Sequence[int] = ()) -> tuple[Form, ...]:
    """The forms that the held-out loss is of: `splits` of the text, or the objective's own."""
    if not splits:
        return forms(objective)
    mode = UL2_MODES.index("S") if objective.name == "ul2" else None
    return tuple(split(objective.length, S, mode=mode) for S in splits)


class Course:
    """Which form each step takes: in every cycle each form as often as its share, in an order of the seed's."""

    def __init__(self, objective: Objective, seed: int):
        self.forms, self.seed = forms(objective), seed
        self.shares = np.array([form.share for form in self.forms])
        self.cycle = int(self.shares.sum())

    def form(self, step: int) -> int:
        """Of step `step` (from 0): an index into `forms`."""
        if len(self.forms) == 1:
            return 0
        return int(self._order(step // self.cycle)[step % self.cycle])

    def counts(self, steps: int) -> list[int]:
        """How many of the first `steps` steps take each form."""
        cycles, rest = divmod(steps, self.cycle)
        begun = np.bincount(self._order(cycles)[:rest], minlength=len(self.forms)) if rest else 0 * self.shares
        return [int(n) for n in cycles * self.shares + begun]

    def _order(self, cycle: int) -> np.ndarray:
        return _order(tuple(self.shares.tolist()), self.seed, cycle)


@functools.lru_cache(maxsize=256)
def _order(shares: tuple[int, ...], seed: int, cycle: int) -> np.ndarray:
    """The form of each step of a cycle."""
    every = np.repeat(np.arange(len(shares)), shares)
    return np.random.Generator(np.random.PCG64([seed, cycle, len(shares)])).permutation(every)
