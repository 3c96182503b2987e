"""Mixtures: weights, an order that any host finds at any step, and splits that stay apart."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.data import Examples, count_windows, load
from lab.data.corpus import Corpus, Share, Split
from lab.data.examples import _Mixture
from lab.data.mix import mix
from lab.data.prepare import prepare
from lab.data.tokenizers import TOKENIZERS


def write(folder: Path, word: str, documents: int) -> Path:
    folder.mkdir()
    for number in range(documents):
        (folder / f"{number}.txt").write_text("".join(f"{word}{20 * number + i:05d}" for i in range(20)))
    return folder


@pytest.fixture
def prepared(tmp_path):
    for word, documents in (("a", 300), ("b", 80), ("c", 100)):
        prepare(
            "text",
            write(tmp_path / f"text-{word}", word, documents),
            tmp_path / word,
            held_out=0.2,
            licence=f"L-{word}",
        )
    return tmp_path


def first_letters(tokens: np.ndarray) -> np.ndarray:
    return np.array([bytes(row.astype(np.uint8)).decode().strip("0123456789")[:1] for row in tokens])


def test_examples_come_by_weight_from_each(prepared):
    described = mix({str(prepared / "a"): 7, str(prepared / "b"): 3}, prepared / "both")
    assert described.data.corpus == "prepared" and described.summary["licence"] == "L-a AND L-b"
    assert "mixture" in described.summary and described.summary["train"]["documents"] > 250
    corpus = load(described.data)
    examples = Examples(corpus, 20, seed=1)
    letters = first_letters(examples.batch(0, 1000))
    for count in (10, 100, 1000):
        assert abs((letters[:count] == "a").sum() - 0.7 * count) <= 1
    held_out = first_letters(examples.held_out(100))
    assert (held_out == "a").sum() == 70
    assert count_windows(described.data, 20)[0] == examples.windows
    # Each corpus gives its own examples in its own order, each once in an epoch of its own.
    tokens = examples.batch(0, examples.windows)
    assert len({row.tobytes() for row in tokens}) == len(tokens)
    again = mix({str(prepared / "a"): 0.7, str(prepared / "b"): 0.3}, prepared / "both")
    assert again.data == described.data


def test_counts_of_what_was_left_out_add_up_in_an_empty_directory_too(prepared):
    for name, counted in (("a", {"empty": 2, "trivial body": 3}), ("b", {"empty": 1, "no body": 4})):
        file = prepared / name / "manifest.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "skipped": counted}))
    (prepared / "both").mkdir()
    described = mix({str(prepared / "a"): 7, str(prepared / "b"): 3}, prepared / "both")
    assert described.summary["skipped"] == {"empty": 3, "trivial body": 3, "no body": 4}
    (prepared / "mine").mkdir()
    (prepared / "mine" / "words").touch()
    with pytest.raises(ValueError, match=r"it is there, and no prepared corpus: choose another --out, or delete it"):
        mix({str(prepared / "a"): 7, str(prepared / "b"): 3}, prepared / "mine")


def test_weights_are_part_of_what_it_is(prepared):
    one = mix({str(prepared / "a"): 0.5, str(prepared / "b"): 0.5}, prepared / "one")
    other = mix({str(prepared / "a"): 0.6, str(prepared / "b"): 0.4}, prepared / "other")
    assert one.data.manifest != other.data.manifest
    with pytest.raises(ValueError, match="it is there, and another corpus"):
        mix({str(prepared / "a"): 0.6, str(prepared / "b"): 0.4}, prepared / "one")


def test_splits_of_a_mixture_never_overlap(prepared):
    # b's documents are in a corpus with others, too.
    both = write(prepared / "text-d", "a", 150)
    for file in (prepared / "text-b").iterdir():
        (both / f"b-{file.name}").write_bytes(file.read_bytes())
    prepare("text", both, prepared / "d", held_out=0.2)
    corpus = load(mix({str(prepared / "b"): 1, str(prepared / "d"): 1, str(prepared / "a"): 2}, prepared / "all").data)
    train, held_out = ({split.document(i).tobytes() for i in range(len(split.lengths))}
                       for split in (corpus.train, corpus.held_out))  # fmt: skip
    assert not train & held_out and len(train) + len(held_out) == 380


SHARES = st.lists(
    st.tuples(st.integers(1, 10**6), st.lists(st.integers(1, 30), min_size=1, max_size=6)), min_size=1, max_size=4
)


def make(shares) -> Corpus:
    lengths = np.array([length for _, documents in shares for length in documents])
    split = Split(
        tokens=np.arange(lengths.sum()).astype(np.uint16),
        starts=np.concatenate([[0], np.cumsum(lengths)[:-1]]),
        lengths=lengths,
        mixture=tuple(Share(weight=weight, documents=len(documents)) for weight, documents in shares),
    )
    return Corpus(train=split, held_out=split, tokenizer=TOKENIZERS["bytes"], summary={})


@settings(deadline=None, max_examples=60)
@given(SHARES, st.integers(0, 2**31 - 1), st.integers(0, 10**6))
def test_any_step_on_any_number_of_hosts_without_those_before(shares, seed, step):
    shares = [(weight, [*documents, 5]) for weight, documents in shares]
    corpus, batch = make(shares), 8
    examples = Examples(corpus, 5, seed)
    whole = Examples(corpus, 5, seed).batch(step, batch)
    examples.batch(step // 2, batch)  # whatever was asked for before
    for hosts in (1, 2, 8):
        rows = [range(host * batch // hosts, (host + 1) * batch // hosts) for host in range(hosts)]
        np.testing.assert_array_equal(np.concatenate([examples.batch(step, batch, some) for some in rows]), whole)


@settings(deadline=None, max_examples=60)
@given(SHARES)
def test_turns_give_each_its_share_and_every_example_once(shares):
    shares = [(weight, [*documents, 5]) for weight, documents in shares]
    mixture = _Mixture(make(shares).train, 5)
    which, own = mixture.turn(np.arange(300))
    total = sum(weight for weight, _ in shares)
    for part, (weight, _) in enumerate(shares):
        mine = which == part
        np.testing.assert_array_equal(own[mine], np.arange(mine.sum()))
        assert (np.abs(np.cumsum(mine) - np.arange(1, 301) * weight / total) < len(shares)).all()
    # An epoch asks no corpus for more than it has.
    which, own = mixture.turn(np.arange(mixture.epoch))
    assert all((which == part).sum() <= count for part, count in enumerate(mixture.counts))


def test_one_corpus_is_in_the_order_of_grain():
    import grain

    examples = Examples(make([(1, [30, 7, 400])]), 5, seed=3)
    order_seed = int(np.random.SeedSequence(3).generate_state(1)[0])
    order = grain.MapDataset.range(examples.windows).shuffle(seed=order_seed).repeat()
    assert [examples._orders[0](place) for place in range(300)] == [order[place] for place in range(300)]


def test_what_can_not_be_mixed_is_refused(prepared):
    a, b = str(prepared / "a"), str(prepared / "b")
    prepare("text", prepared / "text-c", prepared / "share", held_out=0.3)
    assert prepare("text", write(prepared / "text-e", "e", 2), prepared / "tiny", held_out=0.01).summary["moved"]
    prepare("text", prepared / "text-a", prepared / "small", held_out=0.01)
    mix({a: 1, b: 1}, prepared / "both")
    for weights, message in (
        ({a: 1}, "give at least two"),
        ({a: 1, b: 0}, "use a weight above 0"),
        ({a: 1, str(prepared / "share"): 1}, r"the held-out share of .*share is 0.3, and 0.2 of"),
        ({str(prepared / "tiny"): 1, str(prepared / "small"): 1}, "tiny has so few documents that one was moved"),
        ({a: 1, str(prepared / "both"): 1}, "both is a mixture itself"),
        ({a: 1, str(prepared / "nowhere"): 1}, r"no manifest\.json there"),
    ):
        with pytest.raises(ValueError, match=message):
            mix(weights, prepared / "out")
        assert not (prepared / "out").exists()
