"""Parameters, FLOPs and cache bytes of a model: the only arithmetic of cost. Planner, trainer and analysis call it.

Conventions, all in FLOPs for one example (2 for a multiply-add), all whole numbers of arbitrary size:

    exact      matrix products that are executed, attention counted by the pairs that are attended. The matching unit.
    dense      the same, with every query-key pair of the reference path: what a walk over the program finds.
    textbook   the published formula: attended pairs, and no allowance for the last input layer of which only keys and
               values are needed (memory=same, loss on targets).
    6nd        6 * body parameters * tokens of text (2 forward), Kaplan et al. 2020; for comparison with the literature.

Not counted, as everywhere: norms, softmax, rotations, activations, biases, the optimizer. An embedding lookup is free,
the head is charged at the positions that are predicted, and training is 3 times the forward pass. Padding is executed, and
is charged like any other token; of documents packed in a row the pairs within each are charged, their mean over the corpus.

Letters: S input length, T target length, D model width, F feed-forward width, N query heads, K key-value heads, H head
width, L layers, V vocabulary.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from lab.forms import Course, Form, forms
from lab.spec import Objective, Options, Run, Shape
from lab.structure import Structure

CONVENTIONS = ("exact", "dense", "6nd", "textbook")
UNITS = (*CONVENTIONS, "tokens", "steps")
MLP_MATRICES = {"swiglu": 3, "gelu": 2}


@dataclass(frozen=True, kw_only=True)
class Parameters:
    total: int
    embedding: int  # token tables and an untied head
    body: int  # all the rest
    unused: int  # of the body: in the tree, but no scored prediction reads them (see `parameters`)


class Active(NamedTuple):
    """Layers that run, where some are skipped (lab.techniques): of the target stream (encoder-only: of the only one); of the
    input stream those before its last; and whether its last does."""

    targets: int
    inputs: int
    last_input: bool

    @classmethod
    def all(cls, shape: Shape) -> "Active":
        return cls(shape.L, shape.L_input - 1, True)

    @property
    def all_inputs(self) -> int:
        return self.inputs + self.last_input


@dataclass(frozen=True, kw_only=True)
class Projections:
    """Multiply-adds a token in one layer's matrices."""

    query: int
    key_value: int
    out: int
    mlp: int

    @property
    def layer(self) -> int:
        return self.query + self.key_value + self.out + self.mlp


def projections(shape: Shape, options: Options) -> Projections:
    D, H = shape.D, shape.H
    return Projections(
        query=D * shape.N * H,
        key_value=2 * D * shape.K * H,
        out=shape.N * H * D,
        mlp=MLP_MATRICES[options.mlp] * D * shape.F,
    )


def triangle(n: int) -> int:
    """Pairs that n causal queries attend to."""
    return n * (n + 1) // 2


def parameters(structure: Structure, shape: Shape, options: Options, objective: Objective | Form, V: int) -> Parameters:
    """Counts that equal the parameter tree. A structure's tree does not depend on the objective, so with memory=same,
    separate stacks and loss on targets the last input layer's query, output and MLP matrices are there and idle."""
    p, D = projections(shape, options), shape.D
    qk_norm = 2 * shape.H if options.qk_norm else 0
    layer = p.layer + 2 * D + qk_norm
    reading = {
        "merged": 0,
        "none": 0,
        "tied": D,
        "separate": D + p.query + p.key_value + p.out + qk_norm,
    }[structure.cross]
    if structure.encoder_only:
        body, tables = shape.L * layer + D, 1
    elif structure.stacks == "shared":
        body, tables = shape.L * (layer + reading) + D, 1
    else:
        body, tables = shape.L_input * layer + D + shape.L * (layer + reading) + D, 2
    unused = 0
    if structure.stacks == "separate" and structure.memory == "same" and objective.loss == "targets":
        unused = (layer - D) + D  # all of the last input layer but its attention norm; and the input stack's final norm
    embedding = V * D if options.tied_embeddings else V * D * (tables + 1)
    return Parameters(total=body + embedding, embedding=embedding, body=body, unused=unused)


@dataclass(frozen=True, kw_only=True)
class Item:
    """One line of the bill: FLOPs of products with weights, and query-key pairs, forward, for one example."""

    name: str
    linear: int = 0
    attended: int = 0
    dense: int = 0


def bill(
    structure: Structure,
    shape: Shape,
    options: Options,
    objective: Objective | Form,
    V: int,
    *,
    skip: bool = True,
    active: Active | None = None,
) -> tuple[Item, ...]:
    """Forward cost of one example, item by item. skip: leave out what the trainer does not execute. active: the layers that run
    (default: all)."""
    run = active or Active.all(shape)
    p, S, T = projections(shape, options), objective.S, objective.T
    input_pairs = triangle(S) if structure.inputs == "causal" else S * S
    scored = T + (S - 1 if objective.loss == "all" else 0)
    head = Item(name="head", linear=2 * scored * shape.D * V)
    if structure.encoder_only:
        L = run.targets
        return (
            Item(name="input layers", linear=L * 2 * S * p.layer),
            Item(name="input attention", attended=L * S * S, dense=L * S * S),
            head,
        )
    own_softmax = structure.cross in ("separate", "tied")
    whole = run.all_inputs
    items = []
    if skip and structure.memory == "same" and objective.loss == "targets":
        whole = run.inputs
        if structure.memory_is_free and run.last_input:
            items.append(Item(name="last input layer, keys and values", linear=2 * S * p.key_value))
    items += [
        Item(name="input layers", linear=whole * 2 * S * p.layer),
        Item(name="input attention", attended=whole * input_pairs, dense=whole * S * S),
        Item(name="target layers", linear=run.targets * 2 * T * p.layer),
        Item(
            name="target attention",
            attended=run.targets * (objective.attended or T * S + triangle(T)),
            dense=run.targets * (T * S + T * T),
        ),
    ]
    if own_softmax:
        items.append(Item(name="cross queries and outputs", linear=run.targets * 2 * T * (p.query + p.out)))
    if not structure.memory_is_free:
        items.append(Item(name="memory keys and values", linear=run.targets * 2 * S * p.key_value))
    return (*items, head)


def forward(
    structure: Structure,
    shape: Shape,
    options: Options,
    objective: Objective | Form,
    V: int,
    active: Active | None = None,
) -> dict[str, int]:
    """FLOPs of one example's forward pass under each convention. objective: of one form, or a form of it. active: the layers
    that run (default: all)."""
    pair = 4 * shape.N * shape.H  # a query-key product and a weighted value
    executed = bill(structure, shape, options, objective, V, active=active)
    published = bill(structure, shape, options, objective, V, skip=False, active=active)
    body = parameters(structure, shape, options, objective, V).body
    if active is not None:
        body -= _skipped(structure, shape, options, objective, V, active)
    return {
        "exact": sum(item.linear + pair * item.attended for item in executed),
        "dense": sum(item.linear + pair * item.dense for item in executed),
        "6nd": 2 * body * objective.length,
        "textbook": sum(item.linear + pair * item.attended for item in published),
    }


def _skipped(
    structure: Structure, shape: Shape, options: Options, objective: Objective | Form, V: int, active: Active
) -> int:
    """Parameters of the layers that do not run."""

    def body(**depths: int) -> int:
        return parameters(structure, replace(shape, **depths), options, objective, V).body

    now = body()
    skipped = (shape.L - active.targets) * (body(L=shape.L + 1) - now)
    if not structure.encoder_only and structure.stacks == "separate":
        skipped += (shape.L_input - active.all_inputs) * (body(L_input=shape.L_input + 1) - now)
    return skipped


def body_per_token(structure: Structure, shape: Shape, options: Options, objective: Objective, V: int) -> float:
    """Exact forward FLOPs without the head, for each token of text: the size that learning-rate rules are fitted in."""
    pair, flops, tokens = 4 * shape.N * shape.H, 0, 0
    for form in forms(objective):
        items = bill(structure, shape, options, form, V)
        flops += form.share * sum(item.linear + pair * item.attended for item in items if item.name != "head")
        tokens += form.share * form.length
    return flops / tokens


def prices(run: Run, V: int) -> tuple[dict[str, int], ...]:
    """What a step of each form (lab.forms) spends, in every unit: FLOPs by convention, tokens of text, steps; what an optimizer
    spends beside it now and then is `refresh`'s."""
    found = []
    for form in forms(run.objective):
        flops = forward(run.structure, run.shape, run.options, form, V)
        step = {convention: 3 * amount * run.batch for convention, amount in flops.items()}
        found.append(step | {"tokens": run.batch * form.length, "steps": 1})
    return tuple(found)


# Products that a pass over the training loss executes, of a product with a matrix and of one of two activations, forward being 1:
# the gradient; and a backward pass through the gradient, whose own products with the activations' gradient are not needed.
GRADIENT, SECOND = (3, 3), (8, 9)
HESSIAN = {"gauss_newton": GRADIENT, "hutchinson": SECOND}


def refresh(run: Run, V: int) -> dict[str, int]:
    """What an optimizer's estimate of the Hessian spends each time, in every unit: it reads no tokens anew, and is no step."""
    if (kind := run.optimizer.curvature) is None:
        return dict.fromkeys((*CONVENTIONS, "tokens", "steps"), 0)
    (form,) = forms(run.objective)
    parts = (run.structure, run.shape, run.options, form, V)
    examples, pair, (linear, pairs) = (
        run.optimizer.hessian_examples(run.batch),
        4 * run.shape.N * run.shape.H,
        HESSIAN[kind],
    )
    executed, published = bill(*parts), bill(*parts, skip=False)
    flops = {
        "exact": sum(linear * item.linear + pairs * pair * item.attended for item in executed),
        "dense": sum(linear * item.linear + pairs * pair * item.dense for item in executed),
        "6nd": linear * 2 * parameters(*parts).body * form.length,
        "textbook": sum(linear * item.linear + pairs * pair * item.attended for item in published),
    }
    return {convention: amount * examples for convention, amount in flops.items()} | {"tokens": 0, "steps": 0}


def refreshes(run: Run, steps: int) -> int:
    """How often the first `steps` steps make that estimate: the first does, and each `interval` after it."""
    return -(-steps // int(run.optimizer.extra["interval"])) if run.optimizer.curvature else 0


@lru_cache(maxsize=4096)
def _operation(run: Run, V: int, kind: str, form: int, active: Active | None) -> dict[str, int]:
    """Of one example; of an update, or an average, of the whole."""
    shape_of = forms(run.objective)[form]
    spends = dict.fromkeys(UNITS, 0)
    if kind == "update":
        return spends | {"steps": 1}
    if kind == "average":
        return spends
    flops = forward(run.structure, run.shape, run.options, shape_of, V, active)
    if kind == "forward":
        return spends | flops
    assert kind == "train", kind
    return spends | {convention: 3 * amount for convention, amount in flops.items()} | {"tokens": shape_of.length}


def operation(
    run: Run, V: int, kind: str, examples: int, form: int = 0, active: Active | None = None
) -> dict[str, int]:
    """What an operation (lab.method) on so many examples spends, in every unit: tokens are those that are trained on, steps are
    updates. active: the layers that run (default: all)."""
    if kind == "hessian":
        return refresh(run, V)
    spends = _operation(run, V, kind, form, active)
    return {unit: amount * examples for unit, amount in spends.items()} if examples else spends


def train_step(run: Run, V: int) -> dict[str, float]:
    """What one step spends, in every unit; the mean over a cycle where steps take several forms, or not all make an estimate, and
    over the whole run where it has a technique or a table of reference times."""
    if _by_ledger(run):
        spends = planned(run, V)
        return {unit: amount / steps(run, V) for unit, amount in spends.items()}
    if run.optimizer.curvature:
        interval, extra = int(run.optimizer.extra["interval"]), refresh(run, V)
        return {unit: price + extra[unit] / interval for unit, price in prices(run, V)[0].items()}
    if len(each := prices(run, V)) == 1:
        return dict(each[0])
    shares = [form.share for form in forms(run.objective)]
    return {unit: sum(n * p[unit] for n, p in zip(shares, each, strict=True)) / sum(shares) for unit in each[0]}


def budget_unit(run: Run) -> str:
    """The unit of `prices` that the run's budget is counted in."""
    return run.budget.convention if run.budget.unit == "flops" else run.budget.unit


def _by_ledger(run: Run) -> bool:
    """Whether what a run spends is no sum over its steps' forms: the ledger is asked, step by step."""
    return run.technique is not None or run.budget.reference is not None


def spent(run: Run, V: int, steps: int) -> dict[str, int]:
    """What the first `steps` steps of a run without a technique spend, in every unit."""
    assert not _by_ledger(run)
    each = prices(run, V)
    counts = [steps] if len(each) == 1 else Course(run.objective, run.seed.data).counts(steps)
    extra, times = refresh(run, V), refreshes(run, steps)
    return {
        unit: sum(n * price[unit] for n, price in zip(counts, each, strict=True)) + times * extra[unit]
        for unit in extra
    }


def steps(run: Run, V: int) -> int:
    """Whole steps nearest to the budget; raises ValueError where not even one fits."""
    if _by_ledger(run):
        from lab.ledger import simulated  # which counts with this module

        return simulated(run, V).steps
    unit, course = budget_unit(run), Course(run.objective, run.seed.data)
    each, extra = [price[unit] for price in prices(run, V)], refresh(run, V)[unit]
    if len(each) == 1 and not extra and run.budget.amount >= each[0] / 2:
        return int(run.budget.amount / each[0] + 0.5)

    def fits(step: int) -> bool:
        """Whether that step ends nearer to the budget than stopping before it does (lab.ledger)."""
        before = sum(n * price for n, price in zip(course.counts(step), each, strict=True))
        again = refreshes(run, step + 1) - refreshes(run, step)
        now = each[course.form(step)] + again * extra
        return before + refreshes(run, step) * extra + now / 2 <= run.budget.amount

    if not fits(0):
        raise ValueError(
            f"budget.amount = {run.budget.amount:g} {unit} is less than one step of {each[course.form(0)] + extra:g}: "
            f"raise the budget, or lower batch = {run.batch} or the shape"
        )
    low, high = 0, int(run.budget.amount / min(each)) + 2  # the step `low` fits, `high` does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low + 1


def planned(run: Run, V: int) -> dict[str, Any]:
    """Everything the run will spend, in every unit; whole numbers, but reference seconds. Where a technique's steps depend on
    what they find (selective_backprop) it is what is expected (`is_expected`), else what is spent, to the last digit."""
    if _by_ledger(run):
        from lab.ledger import simulated

        return dict(simulated(run, V).spent)
    return spent(run, V, steps(run, V))


def is_expected(run: Run) -> bool:
    """Whether `planned` is no more than what is expected."""
    return run.technique is not None and run.technique.name == "selective_backprop"


# ---- serving: what a conversation costs --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One turn of a conversation: FLOPs before the first reply token, FLOPs of the reply, bytes of keys and values."""

    prefill: int
    decode: int
    cache_bytes: int


def conversation(
    structure: Structure,
    shape: Shape,
    options: Options,
    V: int,
    *,
    turns: int,
    user: int,
    reply: int,
    bytes_per_element: int = 2,
    convention: Literal["textbook", "exact", "dense"] = "textbook",
) -> tuple[Turn, ...]:
    """Cost of `turns` turns in which a user writes `user` tokens and the model answers with `reply` tokens.

    A bidirectional input is encoded again at each turn, since every earlier token may now see the new ones; a causal
    one is only extended. A reply was made in the target stream: only where that stream's layers do just what the
    input stream's do (joint, merged, positions that go on) do its keys and values remain; else it is encoded as input in
    the next turn. A reply's t tokens are the t that the target stream is fed with, SEP first: its last one ends it, and no
    later turn reads it. `textbook` charges every input layer whole, `exact` and `dense` what lab.serving executes, by
    the pairs that are attended or that are computed where arrays have the very lengths of the turn. The cache holds what
    the next token or the next turn needs.
    """
    if structure.encoder_only:
        raise ValueError("structure.cross = 'none': encoder-only has no target stream and can not reply")
    p, pair = projections(shape, options), 4 * shape.N * shape.H
    causal, free = structure.inputs == "causal", structure.memory_is_free
    replies_stay = structure.keeps_replies(options.positions)
    # With memory=same nothing reads what comes out of the last input layer, only the keys and values of what goes in.
    needed = shape.L_input - (structure.memory == "same")
    whole = shape.L_input if convention == "textbook" else needed
    token_bytes = 2 * shape.K * shape.H * bytes_per_element
    result, history, cached = [], 0, 0
    for _ in range(turns):
        n = history + user
        kept = cached if causal else 0
        new = n - kept
        among = (lambda count: count * count) if convention == "dense" else triangle
        pairs = new * kept + among(new) if causal else n * n
        prefill = whole * (2 * new * p.layer + pair * pairs)
        if not free:
            prefill += shape.L * 2 * new * p.key_value
        elif whole < shape.L_input:
            prefill += 2 * new * p.key_value
        own_softmax = 2 * reply * (p.query + p.out) if structure.cross != "merged" else 0
        decode = shape.L * (2 * reply * p.layer + own_softmax + pair * (reply * n + among(reply)))
        decode += 2 * reply * shape.D * V
        layers_of_inputs = shape.L
        if causal and not free:
            layers_of_inputs += needed  # the input stream's own, to go on from
        cache = token_bytes * (layers_of_inputs * n + shape.L * reply)
        result.append(Turn(prefill=prefill, decode=decode, cache_bytes=cache))
        history = n + reply
        cached = history if replies_stay else n
    return tuple(result)
