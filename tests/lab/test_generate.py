"""Generated text against a loop over the definition of each structure, and draws against their probabilities."""

import jax.numpy as jnp
import numpy as np
import pytest

import reference_models as reference
from lab.data import tokenizer_of
from lab.data.tokenizers import TOKENIZERS
from lab.execution import Execution
from lab.forms import forms, split
from lab.generate import Sampling, choose, go_on, opened
from lab.program import program
from lab.spec import Objective, Options
from runs import make_run
from test_transformer import perturbed

BYTES = TOKENIZERS["bytes"]


def model_of(run):
    model = program(run, Execution(steps_per_dispatch=1, scan=False)).model
    return model, perturbed(model.init(0))


def slowly(run, params, prompt: str, tokens: int) -> str:
    """The last S tokens of the text as inputs, T targets at most, then the inputs anew."""
    text, produced = list(prompt.encode()), []
    while len(produced) < tokens:
        inputs, targets = np.array((text + produced)[-run.objective.S :]), [BYTES.sep]
        for _ in range(min(run.objective.T, tokens - len(produced))):
            logits = reference.two_streams(run.structure, params, inputs, np.array(targets))[1][-1]
            produced.append(int(np.argmax(logits[:256])))
            targets.append(produced[-1])
    return BYTES.decode(produced)


@pytest.mark.first(2)
@pytest.mark.parametrize("name", ["encoder_decoder", "shared_stacks", "prefix_lm", "decoder_only"])
def test_greedy_text_is_the_likeliest_token_each_time(name):
    """Prompts shorter and longer than the S = 6 inputs, side by side; more tokens than two windows of T = 5."""
    run = make_run(name)
    model, params = model_of(run)
    prompts = ["ab", "a longer prompt"]
    found = go_on(run, model, params, prompts, tokens=12, tokenizer=BYTES)
    assert found == [slowly(run, params, prompt, 12) for prompt in prompts]


def test_only_text_is_chosen():
    """A head that likes nothing but special ids; of texts that are alike the first is taken."""
    run = make_run("decoder_only", options=Options(tied_embeddings=False))
    model, params = model_of(run)
    params["head_VD"] = np.concatenate([np.zeros((256, 8)), np.ones((2, 8)), -np.ones((2, 8))]).astype(np.float32)
    assert go_on(run, model, params, ["abc"], tokens=6, tokenizer=BYTES) == ["\x00" * 6]


def test_a_seed_fixes_the_text_and_another_changes_it():
    run = make_run("decoder_only")
    model, params = model_of(run)

    def text(seed, prompts=("abc",), **parts):
        sampling = Sampling(seed=seed, **{"temperature": 1.0, **parts})
        return go_on(run, model, params, prompts, tokens=12, tokenizer=BYTES, sampling=sampling)

    assert text(0) == text(0) != text(1)
    first, second = text(0, prompts=("abc", "abc"))
    assert first != second and [first] == text(0)
    assert text(0, top_k=1) == text(5, top_k=1) == go_on(run, model, params, ["abc"], tokens=12, tokenizer=BYTES)


@pytest.mark.parametrize(("temperature", "k"), [(1.0, 5), (0.5, 5), (2.0, 3)])
def test_draws_have_the_probabilities_of_the_softmax(temperature, k):
    logits = np.log([0.4, 0.05, 0.3, 0.1, 0.15])
    rows = 20_000
    found = choose(
        jnp.tile(jnp.asarray(logits, jnp.float32), (rows, 1)), np.uint32(3), np.uint32(1), np.float32(temperature), k=k
    )
    weights = np.exp(logits / temperature) * (logits >= np.sort(logits)[-k])
    np.testing.assert_allclose(np.bincount(found, minlength=5) / rows, weights / weights.sum(), atol=0.015)


@pytest.mark.parametrize(("parts", "message"), [
    (dict(temperature=-1.0), "temperature = -1.0: use 0 for the likeliest"),
    (dict(temperature=float("nan")), "temperature = nan"),
    (dict(top_k=0), "top_k = 0: use a whole number of at least 1"),
    (dict(seed=-1), "seed = -1: use a whole number"),
])  # fmt: skip
def test_wrong_samplings_are_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**parts)


def test_wrong_questions_are_refused():
    run = make_run("decoder_only")
    model, params = model_of(run)
    with pytest.raises(ValueError, match="at least one character"):
        go_on(run, model, params, ["abc", ""], tokens=3, tokenizer=BYTES)
    with pytest.raises(ValueError, match="tokens = 0"):
        go_on(run, model, params, ["abc"], tokens=0, tokenizer=BYTES)
    run = make_run("encoder_only")
    with pytest.raises(ValueError, match="no target stream"):
        go_on(run, *model_of(run), ["abc"], tokens=3, tokenizer=BYTES)


def test_bytes_need_no_corpus():
    assert tokenizer_of(make_run().data) is BYTES


def test_a_model_is_opened_as_it_was_trained():
    text = [5, 6, 7, 8]
    ul2 = Objective(name="ul2", S=20, T=20)
    mode = BYTES.special(ul2.ul2_spans + 1)
    packed = Objective(name="causal_lm", S=0, T=8, attended=20)
    assert opened(Objective(S=3, T=2), BYTES, text, 3) == ([6, 7, 8], BYTES.sep)
    assert opened(ul2, BYTES, text, 3) == ([mode, 6, 7, 8], BYTES.sep)
    assert opened(packed, BYTES, text) == ([BYTES.sep, 5, 6, 7], 8)
    assert opened(packed, BYTES, text, 3) == ([5, 6, 7], 8)
    assert opened(packed, BYTES, [5], 3) == ([BYTES.sep], 5)


@pytest.mark.first(1)
@pytest.mark.parametrize("name", ["causal_lm", "ul2"])
def test_objectives_without_a_plain_split_go_on_too(name):
    """Greedy text against the forward pass of the form that each is asked in."""
    o = Objective(name="causal_lm", S=0, T=14, attended=60) if name == "causal_lm" else Objective(name="ul2", S=7, T=7)
    run = make_run(objective=o)
    model, params = model_of(run)
    (text,) = go_on(run, model, params, ["abc"], tokens=3, tokenizer=BYTES)
    produced = []
    for _ in range(3):
        if name == "causal_lm":
            entering = np.array([[BYTES.sep, *b"abc", *produced]], np.int32)
            logits = model(params, forms(o)[0], np.zeros((1, 0), np.int32), entering)
        else:
            inputs = np.array([[BYTES.special(o.ul2_spans + 1), *b"abc"]], np.int32)
            logits = model(params, split(4, 3), inputs, np.array([[BYTES.sep, *produced]], np.int32))
        produced.append(int(np.argmax(logits[0, -1, :256])))
    assert text == BYTES.decode(produced)
