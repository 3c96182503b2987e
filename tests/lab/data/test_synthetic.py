"""One contract for every task: what its bytes are, that its optimum is one, and that its documents are drawn from it."""

import functools
import hashlib
import itertools
import math

import numpy as np
import pytest

from lab.data.corpora import listing
from lab.data.synthetic import TASKS, Task, task

# Settings at which every string can be enumerated, and the length of the strings of streams.
TINY = {
    "uniform": ("uniform", 2),
    "markov": ("markov", 2),
    "mess3": ("mess3", 5),
    "hidden_markov": ("hidden_markov:states=3,symbols=2", 7),
    "grammar": ("grammar:terminals=3,length=5", 0),
    "zipf_facts": ("zipf_facts:keys=5,values=3", 0),
    "sparse_parity": ("sparse_parity:tasks=3,bits=3,subset=2", 0),
    "copy": ("copy:symbols=3,length=2", 0),
    "noisy_copy": ("noisy_copy:symbols=3,length=2,rate=0.3", 0),
    "reverse": ("reverse:symbols=3,length=2", 0),
    "sort": ("sort:symbols=3,length=3", 0),
    "associative_recall": ("associative_recall:pairs=2,keys=3,values=2", 0),
    "k_hop": ("k_hop:symbols=2,length=5,answers=3", 0),
    "late_dictionary": ("late_dictionary:words=2,keys=2,values=2", 0),
    "early_dictionary": ("early_dictionary:words=2,keys=2,values=2", 0),
}

# SHA-256 of the first two documents: they are the same for ever, under every numpy.
BYTES = {
    "uniform": "ce2253194891bc10",
    "markov": "bef1f6ed3af4dd2d",
    "mess3": "91093106a553721b",
    "hidden_markov": "324faf524363777a",
    "grammar": "f3c35d8faf0a4327",
    "zipf_facts": "edf1621118a51582",
    "sparse_parity": "071c5a6c1efd36f8",
    "copy": "7612ceed8e51a83f",
    "noisy_copy": "e647afa0e23c45cb",
    "reverse": "27ae29fd97b76492",
    "sort": "cce11387ded9e3ea",
    "associative_recall": "23ce5e8710317854",
    "k_hop": "785340548d1601bf",
    "late_dictionary": "7a9228758e3081d5",
    "early_dictionary": "119e4fe198daae85",
}


@functools.cache
def documents(corpus: str, count: int = 16) -> list[np.ndarray]:
    return list(itertools.islice(task(corpus).read(), count))


def examples(corpus: str, n: int | None = None, count: int = 16) -> np.ndarray:
    n = n or task(corpus).n
    return np.concatenate([d[: len(d) // n * n].reshape(-1, n) for d in documents(corpus, count)]).astype(np.int32)


@functools.cache
def every_string(name: str) -> tuple[Task, np.ndarray, np.ndarray]:
    """The tiny task, all strings of its length over the ids that it uses, and their optima."""
    corpus, n = TINY[name]
    found = task(corpus)
    ids = np.unique(np.concatenate(documents(corpus))).astype(np.int32)
    strings = np.stack(np.meshgrid(*[ids] * (n or found.n), indexing="ij"), axis=-1).reshape(-1, n or found.n)
    return found, strings, found.optimum(strings)


def test_every_task_has_a_tiny_one_and_fixed_bytes():
    assert set(TINY) == set(BYTES) == set(TASKS)


@pytest.mark.parametrize("name", TASKS)
def test_bytes_never_change(name):
    first = b"".join(document.tobytes() for document in documents(name)[:2])
    assert hashlib.sha256(first).hexdigest()[:16] == BYTES[name]


@pytest.mark.parametrize("name", TASKS)
def test_documents_hold_whole_examples(name):
    found = task(name)
    for document in documents(name):
        assert document.dtype == np.uint8 and document.ndim == 1
        assert len(document) % found.n == 0 and len(document) >= found.n
    assert found.S >= 1 and found.T >= 1 and found.n == found.S + found.T
    assert len({document.tobytes() for document in documents(name)}) == 16
    again = listing(name).read()
    for document, expected in zip(again, documents(name)[:3], strict=False):
        np.testing.assert_array_equal(document.content, expected)


@pytest.mark.parametrize("name", [name for name in TASKS if name not in ("uniform", "markov")])
def test_more_documents_are_the_same_and_further_ones(name):
    few, many = (list(itertools.islice(task(f"{name}:documents={count}").read(), 4)) for count in (2, 3))
    assert len(few) == 2 and len(many) == 3
    np.testing.assert_array_equal(few, many[:2])


@pytest.mark.parametrize("name", TASKS)
def test_the_optimum_is_a_distribution_and_the_stated_loss_is_its_entropy(name):
    """Over ALL strings: probabilities sum to 1, so that the optimum is no lower than it may be; and its expectation at each
    place is the stated entropy. Inputs alone decide nothing that lies outside: an example's optimum is worked out of the
    example."""
    found, _, nats_Wn = every_string(name)
    n = nats_Wn.shape[1]
    p_W = np.exp(-nats_Wn.sum(axis=1))
    # A document of `markov` begins with any byte; its windows are stationary.
    assert p_W.sum() == pytest.approx(1, abs=1e-9)
    possible = p_W > 0
    expected_n = (p_W[possible, None] * nats_Wn[possible]).sum(axis=0)
    np.testing.assert_allclose(found.entropies(n), expected_n, atol=1e-9 + found.error)
    S = n // 2 if found.stream else found.S
    assert found.loss(S, n - S) == pytest.approx(expected_n[S:].mean(), abs=1e-9 + found.error)


@pytest.mark.parametrize("name", TASKS)
def test_examples_are_drawn_with_the_probabilities_of_the_optimum(name):
    """Chi-squared over all strings, those that are rarely expected taken together."""
    found, strings, nats_Wn = every_string(name)
    n = strings.shape[1]
    drawn = examples(TINY[name][0], n)
    drawn = drawn[::16] if found.stream else drawn  # windows that follow each other are not independent
    assert np.isfinite(found.optimum(drawn)).all()
    ids = np.unique(strings)
    codes = np.searchsorted(ids, drawn) @ len(ids) ** np.arange(n)[::-1]
    counts_W = np.bincount(codes, minlength=len(strings))
    expected_W = np.exp(-nats_Wn.sum(axis=1)) * len(drawn)
    often = expected_W >= 5
    counts = np.append(counts_W[often], counts_W[~often].sum())
    expected = np.append(expected_W[often], max(expected_W[~often].sum(), 1e-9))
    kept = expected > 1
    surprise = ((counts - expected) ** 2 / expected)[kept].sum() - (kept.sum() - 1)
    assert surprise < 5 * math.sqrt(2 * kept.sum())


@pytest.mark.parametrize("name", TASKS)
def test_documents_lose_what_is_stated(name):
    """At the default settings: the mean of the optimum agrees with the stated entropy at every place within its standard
    error, and a predictor that counted (place, token before, token) in other documents is not better."""
    found, tokens = task(name), examples(name)
    nats = found.optimum(tokens)
    error = nats.std(axis=0) / math.sqrt(len(tokens))
    np.testing.assert_array_less(np.abs(nats.mean(axis=0) - found.entropies(found.n)), 4.5 * error + found.error + 1e-9)
    targets = nats[:, found.S :].mean(axis=1)
    assert abs(targets.mean() - found.loss()) < 4 * targets.std() / math.sqrt(len(targets)) + found.error + 1e-9
    half = len(tokens) // 2
    for place in range(found.S, found.n):
        seen, asked = (part[:, place - 1] * 256 + part[:, place] for part in (tokens[:half], tokens[half:]))
        pairs = np.bincount(seen, minlength=2**16).reshape(256, 256) + 1e-2
        counted = -np.log(pairs / pairs.sum(axis=1, keepdims=True)).reshape(-1)[asked]
        gain = nats[half:, place] - counted
        assert gain.mean() < 4 * gain.std() / math.sqrt(len(gain)) + 1e-9


def test_wrong_targets_are_impossible():
    """Of tasks whose targets are determined, any other target has probability 0."""
    for name in (
        "copy",
        "reverse",
        "sort",
        "k_hop",
        "late_dictionary",
        "early_dictionary",
        "sparse_parity",
        "zipf_facts",
    ):
        found, tokens = task(name), examples(name)[:64].copy()
        tokens[:, -1] = np.where(tokens[:, -1] == tokens[:, -1].max(), tokens[:, -1] - 1, tokens[:, -1].max())
        assert np.isinf(found.optimum(tokens)[:, -1]).all(), name


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        ("copy:lenght=3", r"copy has no setting 'lenght': did you mean 'length'\?"),
        ("copy:length=x", "length = 'x': use a whole number"),
        ("copy:length=2.5", "length = '2.5': use a whole number"),
        ("copy:length=0", r"length = 0: use a whole number in \[1, 1024\]"),
        ("noisy_copy:rate=nan", r"rate = nan: use a number in \[0, 1\]"),
        ("noisy_copy:rate=1.5", r"rate = 1\.5: use a number in \[0, 1\]"),
        ("copy:length", r"'length' is not a setting: use length=16"),
        ("copy:length=2,length=2", "give it once"),
        ("copy:", "copy has no setting ''"),
        ("markov:states=3", "markov has no setting 'states': it has none"),
        ("cpoy:length=2", r"did you mean 'copy'\?"),
        ("zipf_facts:keys=65536,exponent=2", r"exponent = 2\.0: use a number in \[0\.05, 1\.5\]"),
        ("grammar:length=12", r"16,777,216 sentences.*at most 262,144"),
        ("late_dictionary:keys=32,values=32", "1024 entries.*at most 160"),
        ("associative_recall:pairs=40", r"pairs = 40: use a whole number in \[1, 32\]"),
        ("copy:documents=1", r"documents = 1: use a whole number in \[2, 1e\+06\]"),
        ("python:length=2", "no setting 'length': it takes none"),
    ],
)
def test_bad_names_say_what_to_do(corpus, message):
    with pytest.raises(ValueError, match=message):
        listing(corpus)


def test_a_name_has_one_canonical_form():
    assert task("copy:length=16").name == "copy"
    assert task("copy: length=8, symbols=4").name == "copy:symbols=4,length=8"
    assert task(task("zipf_facts:keys=64,exponent=1").name).name == "zipf_facts:exponent=1.0,keys=64"
    one, other = listing("copy:symbols=4,length=8"), listing("copy:length=8,symbols=4")
    assert one.fingerprint == other.fingerprint != listing("copy").fingerprint


def test_a_length_that_a_task_does_not_have_is_refused():
    with pytest.raises(ValueError, match=r"S = 3, T = 4: an example of copy has 32 tokens: use S \+ T = 32"):
        task("copy").loss(3, 4)
    assert task("copy").loss(31, 1) == 0 and task("copy").loss(1, 31) == pytest.approx(15 / 31 * math.log(26))
    assert task("mess3").loss(3, 4) > task("mess3").loss(8, 8)
