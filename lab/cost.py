"""Parameters, FLOPs and cache bytes of a model: the only arithmetic of cost. Planner, trainer and analysis call it.

Conventions, all in FLOPs for one example (2 for a multiply-add), all whole numbers of arbitrary size:

    exact      matrix products that are executed, attention counted by the pairs that are attended. The matching unit.
    dense      the same, with every query-key pair of the reference path: what a walk over the program finds.
    textbook   the published formula: attended pairs, and no allowance for the last input layer of which only keys and
               values are needed (memory=same, loss on targets).
    6nd        6 * body parameters * tokens of text (2 forward), Kaplan et al. 2020; for comparison with the literature. Of
               parameters that layers share each use counts; matrices that mix tokens are left out, as pairs are.

Not counted, as everywhere: norms, softmax, rotations, activations, biases of scores, the optimizer. A lookup is free (of
a token table in two factors the second is a product, and charged), the head is charged at the positions that are predicted, and
training is 3 times the forward pass. Padding is executed, and is charged like any other token; of documents packed in a row
the pairs within each are charged, their mean over the corpus.

Letters: S input length, T target length, D model width, E width of a token table in two factors, F feed-forward width, N
query heads, K key-value heads, H head width, L layers, V vocabulary.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

from lab import seen
from lab.forms import Course, Form, forms
from lab.seen import BUCKETS, band
from lab.spec import Objective, Options, Run, Shape
from lab.structure import Structure

CONVENTIONS = ("exact", "dense", "6nd", "textbook")
UNITS = (*CONVENTIONS, "tokens", "steps")
MLP_MATRICES = {"swiglu": 3, "geglu": 3, "gelu": 2, "relu": 2, "relu2": 2}


@dataclass(frozen=True, kw_only=True)
class Parameters:
    total: int
    embedding: int  # tables of tokens, whole or in factors, and of learned positions; and an untied head
    body: int  # all the rest
    unused: int  # of the body: in the tree, but no scored prediction reads them (see `parameters`)
    mixing: int  # of the body: matrices that mix tokens, an entry of which acts once an example and not once a token


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
    reading: int  # of the layer's target stream, beside the keys and values of its memory: a cross-attention of its own
    embed: int  # of the model: what a token costs before the first layer
    head: int

    @property
    def layer(self) -> int:
        return self.query + self.key_value + self.out + self.mlp


def projections(structure: Structure, shape: Shape, options: Options, V: int) -> Projections:
    D, H, E, attention = shape.D, shape.H, options.embedding_width, options.mixing == "attention"
    query, out = D * shape.N * H if attention else 0, shape.N * H * D
    # In a parallel block tied cross-attention has self-attention's queries, and one product for what both mix.
    free = structure.cross == "merged" or (structure.cross == "tied" and options.block == "parallel")
    return Projections(
        query=query,
        key_value=(2 if attention else 1) * D * shape.K * H,
        out=out,
        mlp=MLP_MATRICES[options.mlp] * D * shape.F,
        reading=0 if free or structure.encoder_only else query + out,
        embed=0 if E is None else E * D,
        head=D * V if E is None else D * E + E * V,
    )


def pair_flops(shape: Shape, options: Options) -> int:
    """Of one query and key in one layer, all heads: their product (none where learned matrices mix) and a weighted value."""
    return (4 if options.mixing == "attention" else 2) * shape.N * shape.H


def triangle(n: int) -> int:
    """Pairs that n causal queries attend to."""
    return n * (n + 1) // 2


def parameters(structure: Structure, shape: Shape, options: Options, objective: Objective | Form, V: int) -> Parameters:
    """Counts that equal the parameter tree. A structure's tree does not depend on the objective, so with memory=same,
    separate stacks and loss on targets the last input layer's query, output and MLP matrices are there and idle. Matrices that
    mix tokens have all their N * A * A entries in the tree; those of pairs that are not attended at any depth are idle. Of
    learned positions there are as many as the longest form needs: ask with the objective, not with one of its forms."""
    p, D, serial = projections(structure, shape, options, V), shape.D, options.block == "serial"
    places = seen.places(objective, options)
    mixing = shape.N * places**2 if options.mixing == "dense" else 0
    qk_norm = 2 * shape.H if options.qk_norm else 0
    sublayer = (2 if options.norm_place == "sandwich" else 1) * D  # its norms
    first = final = 0 if options.norm_place == "post" else D  # before the first sublayer; at the end of a stack
    layer = p.layer + (2 * sublayer if serial else sublayer) + qk_norm + mixing
    table_of_distances = shape.N * BUCKETS if options.encoding == "t5" else 0
    stack = final + table_of_distances  # beside its layers
    cross_norm = sublayer if serial else 0
    reading = {
        "merged": 0,
        "none": 0,
        "tied": cross_norm,
        "separate": cross_norm + p.query + p.key_value + p.out + qk_norm,
    }[structure.cross]
    held, held_input = (1 if options.share_layers else depth for depth in (shape.L, shape.L_input))
    if structure.encoder_only or structure.stacks == "shared":
        body, tables = held * (layer + reading) + stack, 1
    else:
        body, tables = held_input * layer + stack + held * (layer + reading) + stack, 2
    unused = 0
    if structure.stacks == "separate" and structure.memory == "same" and objective.loss == "targets":
        # The last input layer but for the norm that the memory is read through, unless it serves at other depths; the
        # input stack's final norm; and the table of distances where no input attends to another.
        unused = final + (layer - first if held_input == shape.L_input else 0)
        unused += table_of_distances if shape.L_input == 1 else 0
    if mixing:
        unused += _idle_entries(structure, shape, options, objective, held, places)
    table = V * D if options.embedding_width is None else (V + D) * options.embedding_width
    embedding = table if options.tied_embeddings else table * (tables + 1)
    embedding += places * D if options.encoding == "learned" else 0
    return Parameters(total=body + embedding, embedding=embedding, body=body, unused=unused, mixing=held * mixing)


def _idle_entries(
    structure: Structure, shape: Shape, options: Options, objective: Objective | Form, held: int, places: int
) -> int:
    """Of the matrices that mix tokens, in the `held` layers that there are."""
    last = (
        held == shape.L
    )  # is a layer of its own, whose inputs may be read by nothing; else it serves at other depths too
    once = replace(shape, L=held, L_input=held)
    used = sum(item.attended for item in _attention(structure, Active.all(once), options, objective, skip=last))
    if last and objective.loss == "all":  # what comes out of the last input is not scored
        used -= band(objective.S, options.window) - band(objective.S - 1, options.window)
    return shape.N * (held * places**2 - used)


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
    p, S, T = projections(structure, shape, options, V), objective.S, objective.T
    scored = T + (S - 1 if objective.loss == "all" else 0)
    head = Item(name="head", linear=2 * scored * p.head)
    tokens = S if structure.encoder_only else S + T  # that enter
    items = [Item(name="embedding", linear=2 * tokens * p.embed)] if p.embed else []
    attention = _attention(structure, run, options, objective, skip=skip)
    if structure.encoder_only:
        return (*items, Item(name="input layers", linear=run.targets * 2 * S * p.layer), *attention, head)
    whole = _whole_input_layers(structure, run, objective, skip)
    if whole < run.all_inputs and structure.memory_is_free:
        items.append(Item(name="last input layer, keys and values", linear=2 * S * p.key_value))
    items += [
        Item(name="input layers", linear=whole * 2 * S * p.layer),
        attention[0],
        Item(name="target layers", linear=run.targets * 2 * T * p.layer),
        *attention[1:],
    ]
    if p.reading:
        items.append(Item(name="cross queries and outputs", linear=run.targets * 2 * T * p.reading))
    if not structure.memory_is_free:
        times = 1 if skip and structure.memory_is_one(options.share_layers) else run.targets
        items.append(Item(name="memory keys and values", linear=times * 2 * S * p.key_value))
    return (*items, head)


def _whole_input_layers(structure: Structure, run: Active, objective: Objective | Form, skip: bool) -> int:
    """Of the last one keys and values suffice, where memory=same and nothing reads what the inputs become."""
    return run.inputs if skip and structure.memory == "same" and objective.loss == "targets" else run.all_inputs


def _attention(
    structure: Structure, run: Active, options: Options, objective: Objective | Form, *, skip: bool = True
) -> tuple[Item, ...]:
    """Query-key pairs of all layers that run."""
    L, S, T = run.targets, objective.S, objective.T
    among_inputs = seen.among_inputs(structure, options).pairs(S)
    if structure.encoder_only:
        return (Item(name="input attention", attended=L * among_inputs, dense=L * S * S),)
    whole = _whole_input_layers(structure, run, objective, skip)
    of_targets = objective.attended or target_pairs(structure, options, S, T)
    return (
        Item(name="input attention", attended=whole * among_inputs, dense=whole * S * S),
        Item(name="target attention", attended=L * of_targets, dense=L * (T * S + T * T)),
    )


def target_pairs(structure: Structure, options: Options, S: int, T: int) -> int:
    """That T targets attend to among S inputs and themselves. A window does not narrow cross-attention of its own softmax."""
    if structure.cross == "merged":
        return band(S + T, options.window) - band(S, options.window)
    return T * S + band(T, options.window)


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
    pair = pair_flops(shape, options)
    executed = bill(structure, shape, options, objective, V, active=active)
    published = bill(structure, shape, options, objective, V, skip=False, active=active)
    used = _used(structure, shape, options, objective, V)
    if active is not None:
        used -= _skipped(structure, shape, options, objective, V, active)
    return {
        "exact": sum(item.linear + pair * item.attended for item in executed),
        "dense": sum(item.linear + pair * item.dense for item in executed),
        "6nd": 2 * used * objective.length,
        "textbook": sum(item.linear + pair * item.attended for item in published),
    }


def _used(structure: Structure, shape: Shape, options: Options, objective: Objective | Form, V: int) -> int:
    """Body parameters that act once a token, each as often as layers share it."""
    counted = parameters(structure, shape, replace(options, share_layers=False), objective, V)
    return counted.body - counted.mixing


def _skipped(
    structure: Structure, shape: Shape, options: Options, objective: Objective | Form, V: int, active: Active
) -> int:
    """Of `_used`, the parameters of layers that do not run."""

    def used(**depths: int) -> int:
        return _used(structure, replace(shape, **depths), options, objective, V)

    now = used()
    skipped = (shape.L - active.targets) * (used(L=shape.L + 1) - now)
    if not structure.encoder_only and structure.stacks == "separate":
        skipped += (shape.L_input - active.all_inputs) * (used(L_input=shape.L_input + 1) - now)
    return skipped


def body_per_token(structure: Structure, shape: Shape, options: Options, objective: Objective, V: int) -> float:
    """Exact forward FLOPs without embedding and head, for each token of text: the size that learning-rate rules are fitted in."""
    pair, flops, tokens = pair_flops(shape, options), 0, 0
    for form in forms(objective):
        items = bill(structure, shape, options, form, V)
        flops += form.share * sum(
            item.linear + pair * item.attended for item in items if item.name not in ("embedding", "head")
        )
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


# Products that a pass over the training loss executes, of a product with a matrix, of one of two activations, and of one of a
# table's rows with the table's second factor, forward being 1: the gradient; and a backward pass through the gradient, whose own
# products with the activations' gradient, and with that of the rows, are not needed.
GRADIENT, SECOND = (3, 3, 3), (8, 9, 7)
HESSIAN = {"gauss_newton": GRADIENT, "hutchinson": SECOND}


def refresh(run: Run, V: int) -> dict[str, int]:
    """What an optimizer's estimate of the Hessian spends each time, in every unit: it reads no tokens anew, and is no step."""
    if (kind := run.optimizer.curvature) is None:
        return dict.fromkeys((*CONVENTIONS, "tokens", "steps"), 0)
    (form,) = forms(run.objective)
    parts = (run.structure, run.shape, run.options, form, V)
    pair, (linear, pairs, rows) = pair_flops(run.shape, run.options), HESSIAN[kind]
    pairs = linear if run.options.mixing == "dense" else pairs  # of an activation and a matrix

    def whole(items: tuple[Item, ...], counted: str) -> int:
        return sum(
            (rows if item.name == "embedding" else linear) * item.linear + pairs * pair * getattr(item, counted)
            for item in items
        )

    executed, published = bill(*parts), bill(*parts, skip=False)
    flops = {
        "exact": whole(executed, "attended"),
        "dense": whole(executed, "dense"),
        "6nd": linear * 2 * _used(*parts) * form.length,
        "textbook": whole(published, "attended"),
    }
    examples = run.optimizer.hessian_examples(run.batch)
    return {convention: amount * examples for convention, amount in flops.items()} | {"tokens": 0, "steps": 0}


def refreshes(run: Run, steps: int) -> int:
    """How often the first `steps` steps make that estimate: the first does, and each `interval` after it."""
    return -(-steps // int(run.optimizer.extra["interval"])) if run.optimizer.curvature else 0


@lru_cache(maxsize=4096)
def _operation(run: Run, V: int, kind: str, form: int, active: Active | None) -> dict[str, int]:
    """Of one example; of an update, or an average, of the whole."""
    shape_of = forms(run.objective)[form]
    spends: dict[str, int] = {unit: 0 for unit in UNITS}
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
