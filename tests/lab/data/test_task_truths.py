"""What is said of single tasks, against computations that are written apart from them."""

import itertools
import math

import numpy as np
import pytest

from lab.data.synthetic import draws, entropy_rate, task
from lab.data.synthetic.dictionary import ENTRIES, aligned_floor, blind_floor
from lab.data.synthetic.facts import Facts
from lab.data.synthetic.grammar import KINDS, sentences
from lab.data.synthetic.recall import NOTHING
from lab.data.synthetic.task import FIRST, LETTERS

# --- chains --------------------------------------------------------------------------------------------------------


def test_the_chains_entropy_rate():
    assert entropy_rate() == pytest.approx(2.3241, abs=1e-4)
    assert task("markov").loss(1, 1) == entropy_rate() < task("markov").entropies(1)[0]


def test_mess3_by_all_hidden_paths():
    """The forward algorithm against the sum over all paths of hidden states."""
    x, a, tokens = 0.1, 0.7, [0, 2, 1, 1]
    moves = np.full((3, 3), x) + np.eye(3) * (1 - 3 * x)
    shows = np.full((3, 3), (1 - a) / 2) + np.eye(3) * (a - (1 - a) / 2)
    nats, before = [], 1.0
    for n in range(1, 5):
        paths = itertools.product(range(3), repeat=n + 1)
        p = sum(
            math.prod(moves[s, r] * shows[r, token] for s, r, token in zip(path, path[1:], tokens, strict=False)) / 3
            for path in paths
        )
        nats.append(math.log(before / p))
        before = p
    found = task(f"mess3:x={x},a={a}").optimum(FIRST + np.array([tokens]))[0]
    np.testing.assert_allclose(found, nats, rtol=1e-6)


def test_entropy_rates_of_hidden_sources_lie_in_a_small_interval():
    assert task("mess3").error < 1e-5 and task("hidden_markov").error < 1e-3
    assert task("mess3:x=0.15,a=0.6").loss() == pytest.approx(1.08888, abs=1e-5)
    falling = task("hidden_markov").entropies(12)
    assert (np.diff(falling) <= 1e-12).all() and falling[-1] < falling[0] - 0.05


def test_a_grammars_sentences_by_all_derivations():
    """Every tree, one after the other, and what it says."""
    terminals, length = 2, 4
    shows = sentences(terminals, 1)

    def derivations(kind: int, size: int):
        if size == 1:
            yield from (((x,), shows[kind, x]) for x in range(terminals))
            return
        for left, (b, c) in itertools.product(range(1, size), itertools.product(range(KINDS), repeat=2)):
            rule = pairs[kind, b, c] / (size - 1)
            for (w, p), (v, q) in itertools.product(of[b, left], of[c, size - left]):
                yield w + v, rule * p * q

    pairs = draws.shares(draws.skewed(21, KINDS, KINDS**2)).reshape(KINDS, KINDS, KINDS)
    of: dict[tuple[int, int], list] = {}
    for size in range(1, length + 1):
        for kind in range(KINDS if size < length else 1):
            total: dict[tuple[int, ...], float] = {}
            for w, p in derivations(kind, size):
                total[w] = total.get(w, 0.0) + p
            of[kind, size] = list(total.items())
    expected = [p for _, p in sorted(of[0, length])]
    np.testing.assert_allclose(sentences(terminals, length)[0], expected, rtol=1e-12)


# --- facts ---------------------------------------------------------------------------------------------------------


def test_what_facts_leave_is_what_a_learner_loses_that_stores_them():
    """A table of the commonest keys, scored on examples of the task: the stated loss within its standard error."""
    facts = Facts(exponent=0.5, keys=300, values=8)
    found = task("zipf_facts:exponent=0.5,keys=300,values=8")
    rows = np.concatenate([d.reshape(-1, found.n) for d in itertools.islice(found.read(), 16)]).astype(np.int32)
    key = (rows[:, 1] - FIRST) * 64 + rows[:, 2] - FIRST
    assert (rows[:, 3] == LETTERS + facts.value_of[key]).all()
    for stored in (0, 3, 50, 300):
        nats = found.optimum(rows)
        nats[:, 3] = np.where(key < stored, nats[:, 3], math.log(8))
        loss = nats[:, found.S :].mean(axis=1)
        assert abs(loss.mean() - facts.loss_with(stored)) < 4 * loss.std() / math.sqrt(len(loss))
    assert facts.loss_with(300) == facts.E() == pytest.approx(found.loss())
    assert facts.loss_with(0) == facts.loss_after(0) == pytest.approx(facts.E() + math.log(8) / 3)


def test_what_is_unseen_after_some_draws():
    facts = Facts(exponent=1.0, keys=100)
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(400):
        seen = np.zeros(100, bool)
        seen[rng.choice(100, 30, p=facts.zipf.p)] = True
        shares.append(facts.zipf.p[~seen].sum())
    assert np.mean(shares) == pytest.approx(facts.zipf.unseen(30), abs=4 * np.std(shares) / 20)


@pytest.mark.parametrize("exponent", [0.3, 0.5, 1.0])
def test_the_tail_has_the_exponent_that_is_set(exponent):
    """With 65,536 keys, the last tail taken out: its own slope is that of i^-a - K^-a."""
    zipf = Facts(exponent=exponent, keys=65_536).zipf
    np.testing.assert_allclose(zipf.p[[3, 9]] / zipf.p[0], np.array([4.0, 10.0]) ** -(1 + exponent), rtol=1e-9)
    n = np.array([16, 32, 64, 128])
    ideal = (n + 0.5) ** -exponent - 65_536.5**-exponent
    np.testing.assert_allclose(zipf.tail(n) / zipf.tail(16), ideal / ideal[0], rtol=1e-3)


# --- recall --------------------------------------------------------------------------------------------------------


def hop(letters: list[int], place: int, hops: int) -> int:
    """find_1(X, i) = max({0} + {j <= i: X_(j-1) = X_i}), places from 1; find_k = find_1(X, find_(k-1)); Sanford et al."""
    X, i = [None, *letters], place
    for _ in range(hops):
        i = max([0] + [j for j in range(2, i + 1) if X[j - 1] == X[i]])
        if i == 0:
            return NOTHING
    return LETTERS + X[i]


@pytest.mark.parametrize("hops", [1, 2, 3])
def test_hops_are_those_of_the_paper(hops):
    found = task(f"k_hop:hops={hops},symbols=3,length=12,answers=12")
    document = next(found.read()).reshape(-1, 24)[:50]
    for row in document.tolist():
        letters = [token - LETTERS for token in row[:12]]
        assert row[12:] == [hop(letters, place, hops) for place in range(1, 13)]
    assert (document[:, 12:] == NOTHING).any() and (document[:, 12:] != NOTHING).any()


def test_recall_is_a_lookup():
    row = next(task("associative_recall").read())[:32].tolist()
    said = dict(zip(row[:16:2], row[1:16:2], strict=True))
    assert [said[key] for key in row[16::2]] == row[17::2] and sorted(said) == sorted(row[16::2])
    assert task("associative_recall").loss() == pytest.approx(math.lgamma(9) / 16)


# --- where bidirectional inputs pay --------------------------------------------------------------------------------


def conditional_entropy(rows: list[tuple], seen, asked) -> float:
    """H(asked(row) | seen(row)) of equally likely rows, in nats."""
    groups: dict = {}
    for row in rows:
        counts = groups.setdefault(seen(row), {})
        counts[asked(row)] = counts.get(asked(row), 0) + 1
    total = 0.0
    for counts in groups.values():
        size = sum(counts.values())
        total -= sum(count * math.log(count / size) for count in counts.values())
    return total / len(rows)


@pytest.mark.parametrize(("words", "keys", "values"), [(3, 2, 2), (4, 3, 2), (2, 2, 3)])
def test_causal_inputs_know_a_late_dictionary_only_by_earlier_targets(words, keys, values):
    """By enumeration of all words and dictionaries: what is known of y_t where the memory of word t is read."""
    rows = list(
        itertools.product(itertools.product(range(keys), repeat=words), itertools.product(range(values), repeat=keys))
    )

    def y(row, t):
        return row[1][row[0][t]]

    def losses(memory) -> float:
        """memory(row, t) and targets before t are seen."""
        return np.mean(
            [
                conditional_entropy(
                    rows,
                    seen=lambda row, t=t: (memory(row, t), tuple(y(row, before) for before in range(t))),
                    asked=lambda row, t=t: y(row, t),
                )
                for t in range(words)
            ]
        )

    late_causal = losses(lambda row, t: row[0][: t + 1])
    assert late_causal == pytest.approx(aligned_floor(words, keys, values), abs=1e-12) and late_causal > 0.3
    # One lookup by word t itself, which sees the dictionary: bidirectional inputs, or an early dictionary.
    assert losses(lambda row, t: row[1][row[0][t]]) == 0
    assert losses(lambda row, t: (row[1], row[0][: t + 1])) == 0


@pytest.mark.parametrize(("keys", "values"), [(2, 2), (3, 2), (2, 3)])
def test_one_bit_of_a_dictionary_is_worth_no_more_than_a_bit(keys, values):
    """Over every function of all dictionaries to one bit: the least that is lost on a word asked for afterwards."""
    rows = list(itertools.product(range(values), repeat=keys))
    least = math.inf
    for message in itertools.product((0, 1), repeat=len(rows)):
        said = dict(zip(rows, message, strict=True))
        lost = [conditional_entropy(rows, seen=said.get, asked=lambda row, key=key: row[key]) for key in range(keys)]
        least = min(least, float(np.mean(lost)))
    floor = blind_floor(keys, values, 1)
    assert floor - 1e-12 <= least < math.log(values)
    assert values != 2 or least == pytest.approx(floor)  # telling one value takes one bit, and is the best
    assert blind_floor(keys, values, 0) == pytest.approx(math.log(values))
    assert blind_floor(keys, values, 99) == 0


def attend(queries: np.ndarray, keys: np.ndarray, content: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Softmax attention with sharp scores; seen: which keys each query may attend to."""
    scores = np.where(seen, 50.0 * queries @ keys.T, -np.inf)
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True) @ content


@pytest.mark.parametrize(
    ("name", "inputs", "target_layers", "reached"),
    [
        ("late_dictionary", "bidirectional", 1, True),
        ("late_dictionary", "causal", 1, False),
        ("late_dictionary", "causal", 2, True),
        ("early_dictionary", "bidirectional", 1, True),
        ("early_dictionary", "causal", 1, True),
    ],
)
def test_the_models_that_the_docstring_names_reach_the_optimum(name, inputs, target_layers, reached):
    """Attention layers written out by hand, on examples of the task: one input layer in which each place looks up the
    entry of the key it holds, one target layer that reads the word at a fixed distance, and perhaps another that looks up."""
    found = task(name)
    rows = next(found.read()).reshape(-1, found.n).astype(np.int64)[:40]
    late = name == "late_dictionary"
    right = 0
    for row in rows:
        x, y = row[: found.S], row[found.S :] - 64
        entry = x >= ENTRIES
        key_S = np.eye(16)[np.where(entry, (x - ENTRIES) // 8, x - FIRST)]  # an entry's own key, or the word
        value_S = np.where(entry[:, None], np.eye(8)[(x - ENTRIES) % 8], 0.0)
        S = len(x)
        causal = np.tril(np.ones((S, S), bool)) if inputs == "causal" else np.ones((S, S), bool)
        listed = key_S * entry[:, None]  # words have no key to be found by
        looked_up = attend(key_S, listed, value_S, causal)
        place = np.arange(16) + (0 if late else 16)
        read = np.eye(S)[place]  # queries of places: the memory at a fixed distance
        if target_layers == 1:
            answers = attend(read, np.eye(S), looked_up, np.ones((16, S), bool))
        else:
            word = attend(read, np.eye(S), key_S, np.ones((16, S), bool))
            answers = attend(word, listed, value_S, np.ones((16, S), bool))
        right += int((answers.argmax(axis=1) == y).sum())
    share = right / rows[:, found.S :].size
    assert share == 1 if reached else share < 0.3
