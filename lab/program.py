"""What is compiled for a run, once for each shape: the initial state, several training steps in one call, the evaluation.

Learning rates, seeds and decay are arrays, and budgets are the host's business: none of them is part of the program, so
runs that differ in nothing else share it. Flax modules are taken apart once; what is traced are plain pytrees.

Letters: B batch, S input length, T target length, P predicted positions, V vocabulary, k steps in one dispatch, R runs
that train side by side (with none beside it, a run's arrays have no such axis).
"""

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lab import generations, hardware, seen
from lab.attention import ATTENTION
from lab.checks import nearest
from lab.curvature import ESTIMATES
from lab.execution import Execution
from lab.forms import Form, evaluated, forms
from lab.hyperparameters import CURVATURE
from lab.ledger import method_of
from lab.memory import LOGITS_AT_ONCE
from lab.mesh import ONE_DEVICE, Mesh, by_batch
from lab.method import Inside, Tools
from lab.objectives import Batch
from lab.optimizers import OPTIMIZERS, Hyperparameters, eval_params, no_numbers, scales
from lab.spec import Run
from lab.transformer import KEEP, Params, Transformer
from lab.versions import versions


@dataclass(frozen=True, kw_only=True)
class Program:
    """Everything static. Seeds, learning rates, decay, budgets are arrays or numbers of the host: none of them is here."""

    model: Transformer
    forms: tuple[Form, ...]  # that steps take
    evaluated: tuple[Form, ...]
    batch: int
    optimizer: str
    hessian_examples: int  # of a batch, that an optimizer's estimate of the Hessian reads
    execution: Execution
    inside: Inside  # of a step
    doublings: int = 0  # of the depth, until now: so many generations of layers joined (lab.generations)
    whole: Transformer | None = None  # where `model` is a part of it: the first layers start as its do
    mesh: Mesh = ONE_DEVICE
    pack: int = 1

    @property
    def key(self) -> str:
        return hashlib.sha256(repr((self, versions()["jax"])).encode()).hexdigest()[:16]


def program(run: Run, execution: Execution, *, on: Mesh = ONE_DEVICE, pack: int = 1, stage: int = -1) -> Program:
    """stage: of the run's method, the last by default. Raises ValueError for settings that no program has."""
    on.check(run.batch // execution.microbatches, pack)
    method = method_of(run)
    method.refuse(devices=on.devices, pack=pack)
    stage %= len(method.stages)
    if method.dependent:  # what a step spends has to be known before the next
        execution = replace(execution, steps_per_dispatch=1)
    if pack > 1 and len(forms(run.objective)) > 1:
        raise ValueError(f"pack = {pack}: steps of {run.objective.name} take several forms, and run side by side they would all "
                         "be computed: use 1")  # fmt: skip
    if pack > 1 and run.optimizer.curvature:
        raise ValueError(f"pack = {pack}: of runs side by side {run.optimizer.name}'s extra pass would be computed at every "
                         "step: use 1")  # fmt: skip
    if execution.attention not in ATTENTION:
        raise ValueError(
            f"execution.attention = {execution.attention!r}: {nearest(execution.attention, list(ATTENTION))}"
        )
    if run.batch % execution.microbatches:
        raise ValueError(f"execution.microbatches = {execution.microbatches}: use a divisor of batch = {run.batch}")
    whole = Transformer(
        structure=run.structure,
        shape=run.shape,
        options=run.options,
        V=run.V,
        sep=run.data.vocabulary,
        pad=run.data.vocabulary + 2,
        precision=run.precision,
        scan=execution.scan,
        unroll=execution.unroll,
        remat=execution.remat,
        attention=execution.attention,
        places=seen.places(run.objective, run.options),
    )
    model = replace(whole, shape=method.stages[stage].shape)
    return Program(
        model=model,
        forms=tuple(replace(form, share=1) for form in forms(run.objective)),
        evaluated=tuple(replace(form, share=1) for form in evaluated(run.objective, run.evaluation.splits)),
        batch=run.batch,
        optimizer=run.optimizer.name,
        hessian_examples=run.optimizer.hessian_examples(run.batch),
        execution=execution,
        inside=method.inside(stage),
        doublings=method.doublings(stage),
        whole=None if model == whole else whole,
        mesh=on,
        pack=pack,
    )


def token_losses(
    model: Transformer,
    form: Form,
    params: Params,
    batch: Batch,
    *,
    at_once: int = LOGITS_AT_ONCE,
    drawn: jax.Array | None = None,
) -> jax.Array:
    """(B, P) negative log-likelihoods in nats, float32, of every scored position; 0 where the label is PAD. Their gradient
    is that of likelihood and z-loss (PaLM, arXiv 2204.02311), where options.z_loss has a weight.

    Where there are more than `at_once` logits the head runs over equal parts of the positions, and again over each in
    the backward pass: the logits of all of them are never there together. drawn: a key; the labels are then not the
    batch's, but drawn from what the model predicts.
    """
    hidden_BPD = model.hidden(params, form, jnp.asarray(batch.inputs), jnp.asarray(batch.targets))
    labels_BP = jnp.asarray(batch.labels)

    def losses(part: tuple[jax.Array, ...]) -> jax.Array:
        hidden, labels, *key = part
        logits = model.head(params, hidden)
        told = labels if drawn is None else jax.random.categorical(key[0], jax.lax.stop_gradient(logits))
        chosen = jnp.take_along_axis(logits, told[..., None], axis=-1)[..., 0]
        log_Z = jax.nn.logsumexp(logits, axis=-1)
        losses = log_Z - chosen
        if drawn is None and (weight := model.options.z_loss):  # labels are drawn for the likelihood's curvature alone
            z_loss = weight * jnp.square(log_Z)
            losses += z_loss - jax.lax.stop_gradient(z_loss)
        return jnp.where(labels == model.pad, 0.0, losses) if form.name == "pairs" else losses

    parts = _parts(labels_BP.size, at_once // model.V)
    if parts == 1:
        return losses((hidden_BPD, labels_BP) if drawn is None else (hidden_BPD, labels_BP, drawn))
    cut = by_batch(hidden_BPD.reshape(parts, -1, hidden_BPD.shape[-1]), axis=1), labels_BP.reshape(parts, -1)
    if drawn is not None:
        cut = *cut, jax.random.split(drawn, parts)
    return jax.lax.map(jax.checkpoint(losses), cut).reshape(labels_BP.shape)


def _parts(rows: int, most: int) -> int:
    """The least number of equal parts of at most `most` rows."""
    return next(n for n in range(max(1, -(-rows // max(most, 1))), rows + 1) if rows % n == 0)


# Of each stream which layers run (lab.transformer.KEEP); None: all.
Keep = dict[str, jax.Array] | None


def loss_and_gradient(
    p: Program, params: Params, batch: Batch, form: Form | None = None, keep: Keep = None
) -> tuple[jax.Array, Params]:
    """Mean loss over all scored tokens of a batch in this form (default: the only one). Sums over microbatches are divided
    once, so that 1x8 = 2x4 = 8x1."""
    form = form or p.forms[0]
    scored = _scored(p, form, batch)

    def total(params: Params, part: Batch) -> jax.Array:
        return _total(p, form, params if keep is None else {**params, KEEP: keep}, part)

    parts = p.execution.microbatches
    if parts == 1:
        value, gradient = jax.value_and_grad(total)(params, batch)
    else:
        split = jax.tree.map(lambda a: by_batch(a.reshape(parts, p.batch // parts, *a.shape[1:]), axis=1), batch)
        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))

        def add(carry, part):
            return jax.tree.map(jnp.add, carry, jax.value_and_grad(total)(params, part)), None

        (value, gradient), _ = jax.lax.scan(add, zero, split)
    return value / scored, jax.tree.map(lambda g: g / scored, gradient)


def _scored(p: Program, form: Form, batch: Batch) -> Any:
    """Positions of this batch that carry loss."""
    return jnp.sum(batch.labels != p.model.pad) if form.name == "pairs" else len(batch.labels) * form.scored


def _total(p: Program, form: Form, params: Params, part: Batch, drawn: jax.Array | None = None) -> jax.Array:
    at_once = LOGITS_AT_ONCE * p.mesh.devices // p.pack
    return jnp.sum(token_losses(p.model, form, params, part, at_once=at_once, drawn=drawn))


def example_losses(p: Program, params: Params, batch: Batch) -> jax.Array:
    """[examples] of a batch in the program's form: nats, the mean over an example's scored tokens. As many at a time as a
    gradient is taken of."""
    (form,) = p.forms
    parts = _parts(len(batch.labels), p.batch // p.execution.microbatches)

    def of(part: Batch) -> jax.Array:
        losses_BP = token_losses(p.model, form, params, part)
        scored_B = jnp.sum(part.labels != p.model.pad, axis=1) if form.name == "pairs" else form.scored
        return jnp.sum(losses_BP, axis=1) / scored_B

    if parts == 1:
        return of(batch)
    return jax.lax.map(of, jax.tree.map(lambda a: a.reshape(parts, len(a) // parts, *a.shape[1:]), batch)).reshape(-1)


def curvature(p: Program, params: Params, batch: Batch, key: jax.Array) -> Params:
    """The estimate of the Hessian's diagonal that the program's optimizer takes, on the first examples of the batch."""
    (form,) = p.forms
    read = Batch(*(array[: p.hessian_examples] for array in batch))
    estimate = ESTIMATES[CURVATURE[p.optimizer]]
    parts = _parts(p.hessian_examples, p.batch // p.execution.microbatches)
    return estimate(functools.partial(_total, p, form), params, read, _scored(p, form, read), key, parts)


def _of_form(
    p: Program, params: Params, batch: Batch, form: jax.Array | None, keep: Keep = None
) -> tuple[jax.Array, Params]:
    """As loss_and_gradient, where the program has several forms: arrays have room for the largest, and `form`, a scalar,
    says which it is."""
    if form is None:
        return loss_and_gradient(p, params, batch, keep=keep)

    def branch(one: Form) -> Callable[[Params, Batch], tuple[jax.Array, Params]]:
        lengths = (one.S, one.T, one.scored)
        return lambda params, batch: loss_and_gradient(
            p, params, Batch(*(array[:, :n] for array, n in zip(batch, lengths, strict=True))), one, keep
        )

    return jax.lax.switch(form, [branch(one) for one in p.forms], params, batch)


def train_step(
    p: Program,
    state: dict[str, Any],
    batch: Batch,
    hyper: Hyperparameters,
    rate: jax.Array,
    form: jax.Array | None = None,
    fed: dict[str, jax.Array] | None = None,
):
    """One step of the run's method: (state, loss, gradient norm before clipping). fed: what the method hands each step."""

    def plain(state: dict[str, Any], batch: Batch, keep: Keep = None) -> tuple[dict[str, Any], jax.Array, jax.Array]:
        return _plain_step(p, state, batch, hyper, rate, form, keep)

    return p.inside.step(tools(p, plain), state, batch, fed or {})


def tools(p: Program, plain: Callable[..., Any] | None = None) -> Tools:
    return Tools(plain=plain or _no_step, losses=functools.partial(example_losses, p),
                 start=functools.partial(initial_optimizer, p))  # fmt: skip


def _no_step(*_: Any) -> Any:
    raise AssertionError("no step is taken here")


def _plain_step(
    p: Program,
    state: dict[str, Any],
    batch: Batch,
    hyper: Hyperparameters,
    rate: jax.Array,
    form: jax.Array | None,
    keep: Keep,
) -> tuple[dict[str, Any], jax.Array, jax.Array]:
    """One optimizer step: parameters and optimizer, loss, gradient norm before clipping."""
    loss, gradient = _of_form(p, state["params"], batch, form, keep)
    extra = {"curvature": functools.partial(curvature, p, state["params"], batch)} if p.hessian_examples else {}
    return updated(p, state, gradient, hyper, rate, **extra), loss, optax.tree.norm(gradient)


def updated(
    p: Program, state: dict[str, Any], gradient: Params, hyper: Hyperparameters, rate: jax.Array, **extra: Any
) -> dict[str, Any]:
    """Parameters and optimizer after an update by this gradient."""
    if p.doublings:
        return _of_generations(p, state, gradient, hyper, rate)
    optimizer = _optimizer(p, hyper, rate, state["params"])
    update, inner = optimizer.update(gradient, state["optimizer"], state["params"], **extra)
    return {"params": optax.apply_updates(state["params"], update), "optimizer": inner}


def _of_generations(
    p: Program, state: dict[str, Any], gradient: Params, hyper: Hyperparameters, rate: jax.Array
) -> dict[str, Any]:
    """As `updated`, of layers that joined at different times: each generation by the state of its own, all clipped as one."""
    params = generations.split(state["params"], p.doublings)
    gradients = generations.split(generations.clipped(gradient, hyper["clip"]), p.doublings)
    moved, states = [], []
    for own, g, inner in zip(params, gradients, (state["optimizer"], *state["grown"]), strict=True):
        update, inner = _optimizer(p, hyper, rate, own).update(g, inner, own)
        moved.append(optax.apply_updates(own, update))
        states.append(inner)
    optimizer, *grown = states
    return {"params": generations.join(moved), "optimizer": optimizer, "grown": tuple(grown)}


def _optimizer(p: Program, hyper: Hyperparameters, rate: Any, params: Params) -> Any:
    return OPTIMIZERS[p.optimizer](hyper, rate, scales(p.model.options, p.model.shape, params))


def initial_optimizer(p: Program, params: Params) -> Any:
    return _optimizer(p, no_numbers(p.optimizer), 0.0, params).init(params)


def beside_params(p: Program, params: Params) -> dict[str, Any]:
    """The rest of a state that starts with these."""
    parts = generations.split(params, p.doublings) if p.doublings else [params]
    optimizer, *grown = [initial_optimizer(p, part) for part in parts]
    state = {"optimizer": optimizer} | ({"grown": tuple(grown)} if grown else {})
    return state | p.inside.start(params, shapes(p.forms, (p.inside.examples,)))


def abstract_state(p: Program) -> dict[str, Any]:
    """Shapes and dtypes of the training state."""
    params = p.model.abstract()
    return {"params": params, **jax.eval_shape(functools.partial(beside_params, p), params)}


def reported(p: Program, run: Run, state: dict[str, Any]) -> Params:
    """The parameters that a training state of this program stands for: what is evaluated, hashed and handed on."""
    places = jax.tree.map(lambda leaf: getattr(leaf, "sharding", None), state["params"])
    if jax.eval_shape(p.inside.average, state) is not None:
        return jax.jit(p.inside.average, out_shardings=places)(state)
    if not p.doublings:
        return eval_params(run.optimizer, state)
    parts = generations.split(state["params"], p.doublings)
    inner = (state["optimizer"], *state["grown"])
    each = [eval_params(run.optimizer, {"params": own, "optimizer": of}) for own, of in zip(parts, inner, strict=True)]
    return generations.join(each)


def advance(
    p: Program,
    state,
    batches: Batch,
    hyper: Hyperparameters,
    rates: jax.Array,
    count: jax.Array,
    chosen: jax.Array | None = None,
    fed: dict[str, jax.Array] | None = None,
):
    """`count` steps in one call; arrays have room for `steps_per_dispatch`: batches [k, B, ...] and rates [k], of runs side
    by side [k, R, B, ...] and [k, R], and state and hyper lead with R. chosen: [k], the form of each step, where there are
    several. fed: what the run's method hands each step, [k, ...]. Returns losses and gradient norms by step."""
    step = functools.partial(train_step, p)
    if p.pack > 1:
        step = jax.vmap(step)

    def body(index, carry):
        state, losses, norms = carry
        batch = Batch(*(array[index] for array in batches))
        form = None if chosen is None else chosen[index]
        given = jax.tree.map(lambda array: array[index], fed)
        state, loss, norm = step(state, batch, hyper, rates[index], form, given)
        return state, losses.at[index].set(loss), norms.at[index].set(norm)

    empty = jnp.full(rates.shape, jnp.nan, jnp.float32)
    return jax.lax.fori_loop(0, count, body, (state, empty, empty))


def shapes(of: Sequence[Form], leading: tuple[int, ...], where: Any = None) -> Batch:
    """A batch that has room for each of these forms."""
    room = max(form.S for form in of), max(form.T for form in of), max(form.scored for form in of)
    return Batch(*(jax.ShapeDtypeStruct((*leading, n), jnp.int32, sharding=where) for n in room))


def program_key(run: Run) -> str:
    """What two runs must share for one compiled program to serve both, on the device at hand."""
    return program(run, hardware.choose(run, run.V, jax.default_backend(), limit=hardware.memory_limit())).key
