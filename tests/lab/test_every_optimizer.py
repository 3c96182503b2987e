"""One contract over every entry of OPTIMIZERS: its published update, its numbers, its state."""

import functools
import inspect
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lab import memory
from lab.checkpoint import Checkpoints
from lab.data.tokenizers import TOKENIZERS
from lab.execution import Execution
from lab.forms import forms
from lab.hyperparameters import COMMON, DEFAULTS, RANGES, Numbers
from lab.objectives import build
from lab.optimizers import OPTIMIZERS, decay_mask, eval_params, hyperparameters, no_numbers
from lab.program import abstract_state, curvature, initial_optimizer, loss_and_gradient, program
from lab.spec import Optimizer, Shape, from_json, to_json
from reference_updates import REFERENCES, estimated_diagonal
from runs import make_run
from sweeps.grid import override

STEPS = 7
# Leaves as a model has them, and each as its blocks: so many, of this shape, of this kind.
LEAVES = {
    ("shared", "layers", "attn", "q_DNH"): ((2, 3, 2, 2), (2, 3, 4), "matrix"),
    ("shared", "layers", "attn", "o_NHD"): ((2, 2, 2, 3), (2, 4, 3), "matrix"),
    ("shared", "layers", "mlp", "gate_DF"): ((2, 3, 4), (2, 3, 4), "matrix"),
    ("shared", "layers", "attn_norm_D"): ((2, 3), (2, 3), "vector"),
    ("shared", "norm_D"): ((3,), (1, 3), "vector"),
    ("embedding_VD",): ((6, 3), (1, 6, 3), "table"),
}
# Other than the defaults, so that a default in use would show; and often enough within STEPS.
SETTINGS = {name: dict(beta1=0.8, beta2=0.9, weight_decay=0.3, clip=0.5) for name in OPTIMIZERS}
EXTRA = dict(
    interval=3, alpha=3.0, beta3=0.97, slow_warmup=0.6, weight_power=1.5, rms=0.3, iterations=4, adam_rate=0.5, adam_beta1=0.7,
    adam_beta2=0.85, shampoo_beta=0.7, d0=1e-2, d_coefficient=1.3, gamma=0.4, decay_exponent=0.7, clip_update=0.9, least_rms=0.02,
)  # fmt: skip


def settings_of(name: str, *, other: bool = False) -> Optimizer:
    given = {k: v for k, v in SETTINGS[name].items() if k in DEFAULTS[name]}
    extra = {k: v for k, v in EXTRA.items() if k in DEFAULTS[name]}
    if other:
        given |= dict(weight_decay=0.05, clip=2.0) | ({"beta1": 0.6} if "beta1" in given else {})
        extra = {k: v for k, v in extra.items() if k != "interval"} | ({"interval": 2} if "interval" in extra else {})
    return Optimizer(name=name, learning_rate=0.1, **given, extra=Numbers(extra), schedule=constant_if_free(name))


def nested(flat: dict) -> dict:
    tree: dict = {}
    for path, leaf in flat.items():
        *above, last = path
        part = tree
        for name in above:
            part = part.setdefault(name, {})
        part[last] = leaf
    return tree


def blocks_of(tree: dict) -> list[np.ndarray]:
    found = []
    for path, (_, view, _) in LEAVES.items():
        leaf = tree
        for name in path:
            leaf = leaf[name]
        found += list(np.asarray(leaf, np.float64).reshape(view))
    return found


KINDS = [kind for _, view, kind in LEAVES.values() for _ in range(view[0])]


def drawn(rng, size=1.0):
    return nested({path: np.float32(size * rng.normal(size=shape)) for path, (shape, _, _) in LEAVES.items()})


@pytest.mark.first(7)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_is_its_published_update(name):
    """Two runs side by side, of other hyperparameters and rates: each is its own reference, through warm-up and fall."""
    rng = np.random.default_rng(0)
    both = [settings_of(name), settings_of(name, other=True)]
    params, numbers = drawn(rng), [hyperparameters(o, steps=STEPS, seed=3) for o in both]
    gradients = [drawn(rng, 0.2) for _ in range(STEPS)]
    peak = {"prodigy": 2.0, "lion": 0.01}.get(name, 0.05)
    rates = peak * np.array([[0.5, 1.0], [1.0, 0.7], [0.8, 0.6], [0.6, 0.5], [0.4, 0.3], [0.3, 0.2], [0.1, 0.05]])
    diagonal = jax.tree.map(lambda p: jnp.float32(estimated_diagonal(p)), params)
    extra = {"curvature": lambda key: diagonal} if name.startswith("sophia") else {}

    @jax.jit
    @jax.vmap
    def step(hyper, rate, gradient, state, params):
        move, state = OPTIMIZERS[name](hyper, rate, None).update(gradient, state, params, **extra)
        return optax.apply_updates(params, move), state

    def twice(tree):
        return jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), tree)

    hyper = jax.tree.map(lambda *leaves: np.stack(leaves), *numbers)
    ours, state = twice(params), twice(OPTIMIZERS[name](no_numbers(name), 0.0, None).init(params))
    theirs = [blocks_of(params) for _ in both]
    memories: list = [[{"diagonal": b} for b in blocks_of(diagonal)] for _ in both]
    for t in range(STEPS):
        ours, state = step(hyper, np.float32(rates[t]), twice(gradients[t]), state, ours)
        for lane, own in enumerate(both):
            g = blocks_of(gradients[t])
            norm = np.sqrt(sum((x**2).sum() for x in g))
            g = [x * min(1.0, own.clip / norm) for x in g]
            h = own.numbers(steps=STEPS, seed=3)
            theirs[lane] = REFERENCES[name](h, t + 1, rates[t, lane], theirs[lane], g, memories[lane], KINDS)
            for a, b in zip(blocks_of(jax.tree.map(lambda x, i=lane: x[i], ours)), theirs[lane], strict=True):
                np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)
    if name == "schedule_free_adamw":
        alone = {"params": ours, "optimizer": state}
        averaged = eval_params(both[1], jax.tree.map(lambda x: x[1], alone))
        for a, s in zip(blocks_of(averaged), memories[1], strict=True):
            np.testing.assert_allclose(a, s["x"], rtol=2e-4, atol=2e-5)
    assert np.asarray(jax.tree.leaves(state)[0]).size  # and the state is arrays throughout


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_default_of_a_library_is_in_use(name, monkeypatch):
    """Every function of optax that it calls is given every argument; and every number of its own is read."""
    called, read = [], set()

    def strict(function):
        signature = inspect.signature(function)

        def checked(*given, **named):
            bound = signature.bind(*given, **named).arguments
            missing = [
                p.name for p in signature.parameters.values() if p.default is not p.empty and p.name not in bound
            ]
            assert not missing, f"{function.__name__}: {missing} are the library's"
            called.append(function.__name__)
            return function(*given, **named)

        return checked

    for module in (optax, optax.contrib):
        for attribute, function in vars(module).items():
            if inspect.isfunction(function):
                monkeypatch.setattr(module, attribute, strict(function))

    class Noted(dict):
        def __getitem__(self, key):
            read.add(key)
            return super().__getitem__(key)

    params = drawn(np.random.default_rng(0))
    optimizer = OPTIMIZERS[name](Noted(hyperparameters(settings_of(name), steps=STEPS, seed=0)), 0.1, None)
    extra = {"curvature": lambda key: params} if name.startswith("sophia") else {}
    jax.eval_shape(lambda p: optimizer.update(p, optimizer.init(p), p, **extra), params)
    assert "clip_by_global_norm" in called
    # hessian_share is the program's: a number of examples.
    assert read == set(no_numbers(name)) - {"hessian_share"}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_its_start_and_its_decay(name):
    """No number decides the first state, and where there is no gradient only the layers' matrices move."""
    params = jax.tree.map(jnp.asarray, drawn(np.random.default_rng(1)))
    poison = dict.fromkeys(no_numbers(name), np.float32("nan"))
    state = OPTIMIZERS[name](poison, np.float32("nan"), None).init(params)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(state))
    hyper = hyperparameters(settings_of(name), steps=STEPS, seed=0)
    zero = jax.tree.map(jnp.zeros_like, params)
    extra = {"curvature": lambda key: zero} if name.startswith("sophia") else {}
    move, _ = jax.jit(lambda s: OPTIMIZERS[name](hyper, 0.1, None).update(zero, s, params, **extra))(state)
    moved = jax.tree.map(lambda u: bool(jnp.any(u != 0)), move)
    assert moved == decay_mask(params) and any(jax.tree.leaves(moved))


RATES = {"lion": 2e-3, "prodigy": 1.0, "adafactor": 3e-2, "adamw_scale": 3e-2, "sophia_g": 3e-3, "sophia_h": 3e-3}
SMALL = Shape(D=8, F=12, N=2, K=1, H=4, L=1, L_input=1)


def constant_if_free(name: str) -> str:
    return "constant" if name == "schedule_free_adamw" else "cosine"


def tiny(name: str):
    settings = Optimizer(name=name, learning_rate=RATES.get(name, 1e-2), schedule=constant_if_free(name))
    run = make_run(shape=SMALL, optimizer=settings)
    return run, program(run, Execution(steps_per_dispatch=1, scan=False, attention="reference"))


@functools.cache
def learned():
    """(a batch that is learned by heart, loss and gradient on it, compiled once for all optimizers)."""
    run, p = tiny("adamw")
    tokens = np.random.default_rng(0).integers(97, 105, (run.batch, run.objective.length)).astype(np.int32)
    batch = build(forms(run.objective)[0], tokens, TOKENIZERS["bytes"], seed=0, first=0)
    return batch, jax.jit(lambda params: loss_and_gradient(p, params, batch))


# Of those whose state is as another's, or that take long to compile, in the slow suite.
IN_SLOW = ("nadamw", "cautious_adamw", "adamw_scale", "ademamix", "sophia_h")


@pytest.mark.first(2)
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in IN_SLOW else n for n in OPTIMIZERS])
def test_it_trains_and_goes_on_where_it_stopped(name, tmp_path):
    """A batch is learned; saved and read again in the middle it ends in the same bits; one program for all numbers."""
    (run, p), (batch, loss_of) = tiny(name), learned()
    settings = run.optimizer
    hyper, rate = hyperparameters(settings, steps=40, seed=0), np.float32(settings.learning_rate)

    @jax.jit
    def update(state, gradient, hyper, rate):
        params = state["params"]
        extra = {"curvature": functools.partial(curvature, p, params, batch)} if settings.curvature else {}
        move, inner = OPTIMIZERS[name](hyper, rate, None).update(gradient, state["optimizer"], params, **extra)
        return {"params": optax.apply_updates(params, move), "optimizer": inner}

    def trained(state, steps):
        losses = []
        for _ in range(steps):
            loss, gradient = loss_of(state["params"])
            state = update(state, gradient, hyper, rate)
            losses.append(float(loss))
        return state, losses

    params = jax.tree.map(jnp.asarray, p.model.init(0))
    middle, first = trained({"params": params, "optimizer": initial_optimizer(p, params)}, 20)
    abstract = abstract_state(p)
    checkpoints = Checkpoints(tmp_path, run_id="r")
    checkpoints.save(20, middle, {})
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path, run_id="r")
    # Not placed by anyone, as what it is compared with: else it would be compiled for anew.
    again = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), checkpoints.latest_state(abstract))
    checkpoints.close()
    (end, last), (resumed, _) = trained(middle, 20), trained(again, 20)
    assert jax.tree.structure(end) == jax.tree.structure(resumed)
    for a, b in zip(jax.tree.leaves(end), jax.tree.leaves(resumed), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert last[-1] < first[0] - 1.0, (first[0], last[-1])
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(end))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), end) == jax.tree.map(lambda x: (x.shape, x.dtype), abstract)
    hyper = hyperparameters(replace(settings, weight_decay=0.5, clip=0.1), steps=99, seed=5)
    rate = np.float32(0.3 * rate)
    trained(end, 1)
    assert update._cache_size() == 1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_memory_counts_its_state(name):
    run = make_run(optimizer=Optimizer(name=name, learning_rate=1e-3, schedule=constant_if_free(name)))
    execution = Execution(steps_per_dispatch=1, scan=False)
    held = sum(4 * leaf.size for leaf in jax.tree.leaves(abstract_state(program(run, execution))))
    assert memory.predict(run, run.V, execution).state == pytest.approx(held, abs=4 * 8)  # a few counters


def test_states_are_as_small_as_is_said():
    def numbers(name):
        return memory._in_state(
            *(getattr(make_run(), part) for part in ("structure", "shape", "options")), 260, 11, name
        )

    adam = numbers("adamw")
    assert (
        numbers("lion") < 0.51 * adam and numbers("muon") < adam < numbers("soap") and numbers("adafactor") < 0.3 * adam
    )


def test_numbers_are_resolved_written_and_refused_by_name():
    for name in OPTIMIZERS:
        assert set(DEFAULTS[name]) <= set(RANGES) and REFERENCES.keys() == OPTIMIZERS.keys() == DEFAULTS.keys()
        run = make_run(optimizer=Optimizer(name=name, learning_rate=1e-3, schedule=constant_if_free(name)))
        content = to_json(run)
        written = content["optimizer"] | content["optimizer"]["extra"]
        for key, value in DEFAULTS[name].items():
            assert written[key] == value
        assert all(written[key] is None for key in COMMON if key not in DEFAULTS[name])
        assert from_json(content) == run and hash(run.optimizer) == hash(from_json(content).optimizer)
        for part, key in [("optimizer", "clip")] + [("extra", key) for key in list(run.optimizer.extra)[:1]]:
            torn = to_json(run)
            target = torn["optimizer"] if part == "optimizer" else torn["optimizer"]["extra"]
            del target[key]
            with pytest.raises(ValueError, match=rf"missing key optimizer\.(extra\.)?{key}"):
                from_json(torn)
    torn = to_json(make_run())
    torn["optimizer"]["beta1"] = None
    with pytest.raises(ValueError, match=r"missing key optimizer\.beta1"):
        from_json(torn)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Optimizer(name="adamv", learning_rate=1e-3), "did you mean 'adamw'"),
        (lambda: Optimizer(name="muon", learning_rate=1e-3, extra={"iteration": 3}), "did you mean 'iterations'"),
        (lambda: Optimizer(name="lion", learning_rate=1e-3, extra={"alpha": 3}), "lion has none"),
        (lambda: Optimizer(name="muon", learning_rate=1e-3, extra={"iterations": 2.5}), "use a whole number"),
        (lambda: Optimizer(name="lion", learning_rate=1e-3, eps=1e-8), "lion has none: use null"),
        (lambda: replace(Optimizer(learning_rate=1e-3), name="lion"), r"starts from a new Optimizer\(name"),
        (lambda: Optimizer(name="soap", learning_rate=1e-3, extra={"interval": 0}), r"optimizer\.extra\.interval = 0"),
        (lambda: Optimizer(name="schedule_free_adamw", learning_rate=1e-3), "averages where others decay"),
        (lambda: Optimizer(learning_rate=1e-3, schedule="constant", final=0.5), "constant falls to nothing"),
        (lambda: override(make_run(), {"optimizer.extra.rms": 1.0}), r"no field optimizer\.extra\.rms; it has none"),
    ],
)  # fmt: skip
def test_what_an_optimizer_does_not_have_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_sweep_reaches_its_own_numbers():
    run = make_run(optimizer=Optimizer(name="muon", learning_rate=1e-3))
    changed = override(run, {"optimizer.extra.rms": 0.4, "optimizer.clip": 2.0})
    assert changed.optimizer.extra["rms"] == 0.4 and changed.run_id != run.run_id
    with pytest.raises(ValueError, match=r"no field optimizer\.extra\.rmz; did you mean 'rms'"):
        override(run, {"optimizer.extra.rmz": 0.4})
