"""A Run: everything that decides what is trained, and nothing that does not.

A Run is frozen, checked when it is made, and written as complete JSON: every field is there, an unknown or missing one
is an error. Its id is a slug and a hash of that JSON; paths, devices and library versions are recorded with the result
but are not part of what a run is.

Letters: B examples in a batch, S input length, T target length, D model width, F feed-forward width, N query heads,
K key-value heads, H head width, L layers of the target stream, V vocabulary.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lab import seen
from lab import structure as structures
from lab.checks import check_choice, check_integer, check_number, require
from lab.forms import MOST_FORMS, Objective, forms
from lab.hyperparameters import ADAM_LIKE, Optimizer
from lab.parametrization import Parametrization
from lab.strict_json import Reader, encode
from lab.structure import Structure
from lab.technique import Technique

# Of run.json: 2 has the objective's forms, the vocabulary and the evaluation's splits; 3 the model's options, each optimizer's
# own hyperparameters, the parametrization, the technique and the budget's reference times.
SCHEMA = 3


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of one model. `L_input` is the depth of the input stream; it differs from L only in encoder-decoders."""

    D: int
    F: int
    N: int
    K: int
    H: int
    L: int
    L_input: int

    def __post_init__(self):
        for name in ("D", "F", "N", "K", "H", "L", "L_input"):
            check_integer(f"shape.{name}", getattr(self, name), 1)
        require(
            self.N % self.K == 0,
            "shape.K",
            self.K,
            f"use a divisor of shape.N = {self.N} (K=N is multi-head, K=1 multi-query)",
        )
        require(
            self.H % 2 == 0,
            "shape.H",
            self.H,
            "use an even head width: rotary positions turn pairs of channels",
        )


Mlp = Literal["swiglu", "geglu", "gelu", "relu", "relu2"]
Norm = Literal["rms", "layer", "scale"]
NormPlace = Literal["pre", "post", "sandwich"]
Block = Literal["serial", "parallel"]
Encoding = Literal["rope", "learned", "sinusoidal", "alibi", "t5", "none"]
Mixing = Literal["attention", "dense"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What all structures share (docs/options.md has sources and costs); what a structure or an objective can not carry is
    refused by the run (lab.seen.check). A kind of MLP, norm or encoding is one function and one dict line: lab.mlps, lab.norms,
    lab.positions."""

    mlp: Mlp = "swiglu"
    norm: Norm = "rms"  # every norm but QK-norm, which is RMS
    norm_place: NormPlace = "pre"
    block: Block = "serial"  # parallel: the sublayers of a layer read one norm of its input, and are added
    share_layers: bool = False  # one set of weights for all layers of a stack
    qk_norm: bool = True
    tied_embeddings: bool = True
    embedding_width: int | None = None  # E: a token table is a product of V x E and E x D
    logit_softcap: float | None = None
    z_loss: float = 0.0  # times log(Z)^2 of each scored token, in the gradient alone
    # Whether the targets' positions go on where the inputs end, or start again at 0.
    positions: Literal["continue", "restart"] = "continue"
    encoding: Encoding = "rope"  # how positions enter: lab.positions
    window: int | None = None  # a query sees no key at this distance or beyond
    turn: int | None = None  # bidirectional inputs see no later turn of so many tokens
    mixing: Mixing = "attention"  # how tokens reach each other: lab.layers.MIXINGS
    parametrization: Parametrization = field(default_factory=Parametrization)

    def __post_init__(self):
        for name, kind in (("mlp", Mlp), ("norm", Norm), ("norm_place", NormPlace), ("block", Block)):
            check_choice(f"options.{name}", getattr(self, name), kind)
        check_choice("options.positions", self.positions, Literal["continue", "restart"])
        check_choice("options.encoding", self.encoding, Encoding)
        check_choice("options.mixing", self.mixing, Mixing)
        if self.window is not None:
            check_integer("options.window", self.window, 1)
        if self.turn is not None:
            check_integer("options.turn", self.turn, 2)  # of 1 are causal inputs
        for name in ("share_layers", "qk_norm", "tied_embeddings"):
            require(
                isinstance(getattr(self, name), bool),
                f"options.{name}",
                getattr(self, name),
                "use true or false",
            )
        if self.embedding_width is not None:
            check_integer("options.embedding_width", self.embedding_width, 1)
        if self.logit_softcap is not None:
            check_number("options.logit_softcap", self.logit_softcap, 0.0, 1e6, open_low=True)
        check_number("options.z_loss", self.z_loss, 0.0, 1.0)
        self._check_parametrization()

    def _check_parametrization(self) -> None:
        name, where = self.parametrization.name, "options.parametrization.name"
        if name == "completep":
            require(self.norm_place != "post", where, name,
                    "its table of depth is derived for a residual stream that nothing divides, and norm_place='post' normalises "
                    "every sum: use norm_place 'pre' or 'sandwich', or mup")  # fmt: skip
            require(not self.share_layers, where, name,
                    "its table of depth is derived for layers that have weights of their own, and share_layers adds up their "
                    "gradients: use share_layers=False, or mup")  # fmt: skip

    def __str__(self) -> str:
        """Those that are not the default: 'mlp gelu, norm layer'."""
        plain, said = Options(), []
        for name in (f.name for f in dataclasses.fields(self)):
            if (value := getattr(self, name)) != getattr(plain, name):
                said.append(f"{name} {getattr(value, 'name', value)}")
        return ", ".join(said)


@dataclass(frozen=True, kw_only=True)
class Data:
    """A corpus, fixed by its manifest's hash. `path` says where it lies here and is not part of the run's identity."""

    corpus: str = "python"
    path: str | None = None
    manifest: str  # SHA-256 of the corpus's manifest (lab.data.manifest)
    train_tokens: int  # tokens of text in the training split, as the manifest counts them: what epochs are planned from
    tokenizer: str = "bytes"
    vocabulary: int = 256  # ids of text that the tokenizer has, its specials not among them
    held_out: float = 0.05  # share of the documents
    allow_repeat: bool = False  # more than 4 epochs

    def __post_init__(self):
        require(bool(self.corpus) and isinstance(self.corpus, str), "data.corpus", self.corpus, "name a corpus")
        require(
            isinstance(self.manifest, str) and len(self.manifest) == 64,
            "data.manifest",
            self.manifest,
            "use the SHA-256 that lab.data.describe gives",
        )
        check_integer("data.train_tokens", self.train_tokens, 1)
        require(
            bool(self.tokenizer) and isinstance(self.tokenizer, str),
            "data.tokenizer",
            self.tokenizer,
            "name a tokenizer",
        )
        check_integer("data.vocabulary", self.vocabulary, 2)
        check_number("data.held_out", self.held_out, 0.0, 0.5, open_low=True)
        require(isinstance(self.allow_repeat, bool), "data.allow_repeat", self.allow_repeat, "use true or false")


BudgetUnit = Literal["flops", "reference_seconds", "tokens", "steps"]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much, in one unit. Stop and schedules are functions of the spent share of it.

    reference: the SHA-256 of a table of reference times (lab.reference_times), which lies at `reference_path` (null: it is one
    that is shipped) and whose seconds are counted; a budget of reference_seconds needs one. The path is not part of the run's
    identity.
    """

    unit: BudgetUnit = "flops"
    amount: float
    convention: Literal["exact", "dense", "6nd", "textbook"] = "exact"  # how flops are counted: lab.cost
    reference: str | None = None
    reference_path: str | None = None

    def __post_init__(self):
        check_choice("budget.unit", self.unit, BudgetUnit)
        known = self.reference is None or (isinstance(self.reference, str) and len(self.reference) == 64)
        require(known, "budget.reference", self.reference, "use the SHA-256 that lab.reference_times.read gives")
        require(self.unit != "reference_seconds" or self.reference is not None, "budget.reference", self.reference,
                "a budget of reference_seconds is counted by a table of reference times: `lab calibrate` makes one, and "
                "lab.reference_times.budget refers to it")  # fmt: skip
        require(self.reference_path is None or (self.reference is not None and isinstance(self.reference_path, str)),
                "budget.reference_path", self.reference_path, "give the table's SHA-256 as budget.reference too")  # fmt: skip
        check_number("budget.amount", self.amount, 0.0, 1e40, open_low=True)
        check_choice("budget.convention", self.convention, Literal["exact", "dense", "6nd", "textbook"])


@dataclass(frozen=True, kw_only=True)
class Seed:
    init: int = 0
    data: int = 0

    def __post_init__(self):
        for name in ("init", "data"):
            check_integer(f"seed.{name}", getattr(self, name), 0)
            require(getattr(self, name) < 2**31, f"seed.{name}", getattr(self, name), "use a number below 2^31")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """`examples` held-out examples, the same for every arm, `times` times at equal shares, the last at the end."""

    examples: int = 512
    times: int = 1
    # Objectives on text: score targets after so many tokens of inputs, whatever the run was trained on. Losses of runs that
    # are evaluated alike can be compared. None given: the objective's own.
    splits: tuple[int, ...] = ()

    def __post_init__(self):
        check_integer("evaluation.examples", self.examples, 1)
        check_integer("evaluation.times", self.times, 1)
        for split in self.splits:
            check_integer("evaluation.splits", split, 1)
        ok = list(self.splits) == sorted(set(self.splits)) and len(self.splits) <= MOST_FORMS
        require(
            ok,
            "evaluation.splits",
            self.splits,
            f"use at most {MOST_FORMS} different input lengths, the shortest first",
        )


@dataclass(frozen=True, kw_only=True)
class Run:
    structure: Structure
    shape: Shape
    options: Options = field(default_factory=Options)
    objective: Objective
    data: Data
    optimizer: Optimizer
    budget: Budget
    batch: int  # examples a step
    technique: Technique | None = None
    seed: Seed = field(default_factory=Seed)
    evaluation: Evaluation = field(default_factory=Evaluation)
    precision: Literal["f32", "bf16"] = "f32"  # of the computation; parameters, softmax and loss are f32
    revision: int = 0  # raise it to run again what was run before

    def __post_init__(self):
        check_integer("batch", self.batch, 1)
        check_choice("precision", self.precision, Literal["f32", "bf16"])
        check_integer("revision", self.revision, 0)
        structures.check(
            self.structure,
            L=self.shape.L,
            L_input=self.shape.L_input,
            loss=self.objective.loss,
            objective=self.objective.name,
        )
        seen.check(self.structure, self.options, self.objective, self.evaluation.splits)
        self._check_optimizer()
        self._check_technique()
        if self.objective.name == "pairs":
            require(self.options.positions == "continue", "options.positions", self.options.positions,
                    "pairs are padded before their sources: counted anew, the targets' positions would depend on the padding; "
                    "use 'continue'")  # fmt: skip
        if self.evaluation.splits:
            text = self.objective.length
            ok = (
                self.objective.name in ("lm", "prefix_lm", "span_corruption", "ul2")
                and max(self.evaluation.splits) < text
            )
            require(ok, "evaluation.splits", self.evaluation.splits,
                    f"{self.objective.name} on {text} tokens of text: use input lengths below that, and none for masked_lm, "
                    "causal_lm and pairs")  # fmt: skip

    def _check_optimizer(self) -> None:
        name, scaling = self.optimizer.name, self.options.parametrization.name
        require(scaling == "standard" or name in ADAM_LIKE, "options.parametrization.name", scaling,
                f"its table is derived for updates whose entries are of size 1 whatever the width, and how {name}'s should scale "
                f"is not known: use 'standard', or one of {', '.join(ADAM_LIKE)}")  # fmt: skip
        require(self.optimizer.curvature is None or len(forms(self.objective)) == 1, "optimizer.name", name,
                f"its estimate of the Hessian is of steps of one form, and those of {self.objective.name} take several: use "
                "another optimizer or objective")  # fmt: skip

    def _check_technique(self) -> None:
        name = self.technique.name if self.technique else None
        if name in ("stacking", "selective_backprop", "rho_loss"):
            require(self.optimizer.curvature is None, "technique.name", name,
                    f"{self.optimizer.name}'s extra pass comes at steps that are counted from the start, by one state for all "
                    "parameters: use another optimizer")  # fmt: skip
        if name in ("selective_backprop", "rho_loss"):
            require(len(forms(self.objective)) == 1, "technique.name", name,
                    f"it selects among examples of one form, and steps of {self.objective.name} take several: use another "
                    "technique or objective")  # fmt: skip
        if name in ("ema", "lawa", "rho_loss"):
            require(self.optimizer.name != "schedule_free_adamw", "technique.name", name,
                    "schedule_free_adamw's model is an average, and not what it trains: use another optimizer")  # fmt: skip
        if self.technique is not None and name == "stacking":
            require(not self.options.share_layers, "options.share_layers", True,
                    "stacking copies layers to a greater depth, and one layer serves at all depths here: use false")  # fmt: skip
            scaling = self.options.parametrization.name
            require(not self.technique.boundaries or scaling != "completep", "options.parametrization.name", scaling,
                    "its multipliers follow the depth, which stacking changes: use 'standard' or 'mup'")  # fmt: skip

    @property
    def measure(self) -> str:
        """What the reported loss is the loss of. Losses of one corpus in one tokenizer, of one measure, on as many held-out
        examples can be compared, and no others."""
        o, splits = self.objective, self.evaluation.splits
        if o.name == "lm" and not splits:
            splits = (o.S,)
        if o.name == "prefix_lm" and not splits:
            splits = o.splits
        if splits:
            return f"{o.length} tokens of text, targets after {', '.join(map(str, sorted(splits)))}"
        if o.name == "pairs":
            return "targets of pairs, in buckets " + ", ".join(f"{S}+{T}" for S, T, _ in sorted(o.buckets))
        if o.name == "causal_lm":
            return f"all tokens, packed in rows of {o.T}"
        if o.name == "ul2":
            return f"ul2's own, {o.length} tokens of text"
        return f"{o.name}'s own, {o.S} inputs and {o.T} targets" + (f" in {o.spans} spans" if o.spans else "")

    @property
    def V(self) -> int:
        """Ids that the model embeds and predicts: those of text, SEP, MASK and PAD, and the objective's own; rounded up to a
        multiple of 4, so that embedding and head split evenly over 2 or 4 devices. A rounder number would cost small models
        half of their head's FLOPs again."""
        return -(-(self.data.vocabulary + 3 + self.objective.specials) // 4) * 4

    @property
    def run_id(self) -> str:
        """Slug for people, and ten hexadecimal digits of the content's SHA-256 for machines."""
        content = to_json(self)
        del content["data"]["path"], content["budget"]["reference_path"]
        digest = hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
        amount = f"{self.budget.amount:.2e}".replace("e+", "e")
        loss = "-all" if self.objective.loss == "all" else ""
        loss += f"-{self.technique.name}" if self.technique else ""
        return f"{self.structure.name}{loss}-d{self.shape.D}-l{self.shape.L}-{amount}{self.budget.unit}-{digest[:10]}"


RUN = Reader(what="run", complete="a run's JSON is complete; `lab describe` shows a whole one")


def to_json(value: Run) -> dict[str, Any]:
    """Complete JSON of a Run; numbers are written in their declared type, so that 1 and 1.0 hash alike."""
    return {"schema": SCHEMA, **encode(value)}


def from_json(content: object) -> Run:
    """The Run that `to_json` wrote; raises ValueError naming the key for anything unknown, missing or ill-typed."""
    if not isinstance(content, dict):
        raise ValueError(f"a run is a JSON object, not {type(content).__name__}; `lab describe` shows a complete one")
    content = dict(content)
    schema = content.pop("schema", None)
    require(schema == SCHEMA, "schema", schema, f"this version reads {SCHEMA}")
    return RUN.read(Run, content)


def read_run(path: Path) -> Run:
    """Reads run.json; errors name the file."""
    path = Path(path)
    try:
        text = path.read_bytes()
    except FileNotFoundError as error:
        raise ValueError(
            f"{path}: no such file; `lab plan STUDY --out DIR` writes plans, and each run's directory holds a run.json"
        ) from error
    except OSError as error:
        raise ValueError(f"{path}: not a JSON file ({error})") from error
    return from_text(text, path)


def from_text(text: bytes, path: Path | str) -> Run:
    """As read_run, of what was read from `path`."""
    try:
        content = json.loads(text.decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a JSON file ({error})") from error
    try:
        return from_json(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
