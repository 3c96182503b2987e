"""Choices and pairs against loops over the definition of each structure."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest

import reference_models as reference
from lab import downstream
from lab.data.prepare import Corpus, Split
from lab.data.tokenizers import TOKENIZERS
from lab.downstream import Pair, Question, Ranked, Written, rank, read_pairs, read_questions, write_out
from lab.execution import Execution
from lab.program import program
from lab.spec import Options
from runs import make_run
from test_transformer import perturbed

BYTES = TOKENIZERS["bytes"]


def model_of(run):
    model = program(run, Execution(steps_per_dispatch=1, scan=False)).model
    return model, perturbed(model.init(0))


def after(run, params, source: str, targets: list[int]):
    return reference.two_streams(run.structure, params, np.array(list(source.encode())), np.array(targets))[1]


@pytest.mark.parametrize("name", ["encoder_decoder", "decoder_only"])
def test_log_likelihoods_are_those_of_the_uncached_forward_pass(name):
    run = make_run(name)
    model, params = model_of(run)
    questions = [
        Question(context="a", choices=("no", "perhaps it is"), answer=0),
        Question(context="a context of more than one bucket", choices=("é", "b", "cc"), answer=2),
        Question(context="another", choices=("x", "yy"), answer=1),
    ]
    for question, found in zip(questions, rank(model, params, run.objective, questions, BYTES), strict=True):
        assert found.bytes == found.tokens == tuple(len(choice.encode()) for choice in question.choices)
        for choice, value in zip(question.choices, found.log_likelihoods, strict=True):
            labels = list(choice.encode())
            logits = after(run, params, question.context, [BYTES.sep, *labels[:-1]])
            each = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
            assert value == pytest.approx(each[np.arange(len(labels)), labels].sum(), abs=1e-4)


def test_choices_are_ranked_raw_by_token_and_by_byte():
    ranked = Ranked(log_likelihoods=(-3.0, -4.0, -6.0), tokens=(1, 2, 3), bytes=(2, 2, 9))
    assert [ranked.picked(ranking) for ranking in downstream.RANKINGS] == [0, 1, 2]
    questions = [Question(context="a", choices=("x", "y", "z"), answer=answer) for answer in (0, 0, 1, 0)]
    summary = downstream.summarise_choices(questions, [ranked] * 4)
    hits = np.array([1, 1, 0, 1])
    assert summary["accuracy"]["raw"]["value"] == 0.75 and summary["accuracy"]["per_byte"]["value"] == 0
    assert summary["accuracy"]["raw"]["standard_error"] == pytest.approx(hits.std(ddof=1) / 2)
    assert summary["guessing"] == pytest.approx(1 / 3)
    assert json.loads(json.dumps(summary)) == summary | {"ranked": json.loads(json.dumps(summary["ranked"]))}


@pytest.mark.parametrize("name", ["tied_cross", "decoder_only"])
def test_targets_are_written_until_sep(name):
    """A head that likes SEP, so that some targets end and others are cut off."""
    run = make_run(name, options=Options(tied_embeddings=False))
    model, params = model_of(run)
    params["head_VD"][BYTES.sep] *= 3
    sources = ["a", "some source", "another source that lies in a longer bucket", "b", "c"]
    found = write_out(model, params, run.objective, sources, BYTES, most=6)
    for source, written in zip(sources, found, strict=True):
        targets = [BYTES.sep]
        while len(targets) <= 6:
            targets.append(int(np.argmax(after(run, params, source, targets)[-1, :257])))
            if targets[-1] == BYTES.sep:
                break
        assert written == Written(text=BYTES.decode(targets), ended=targets[-1] == BYTES.sep)
    assert {written.ended for written in found} == {True, False}


def test_pairs_are_matched_and_scored():
    pairs = [Pair(source="a", target="the cat"), Pair(source="b", target="a dog")]
    perfect = downstream.summarise_pairs(pairs, [Written(text=pair.target, ended=True) for pair in pairs])
    assert perfect["exact_match"]["value"] == 1 and perfect["chrf"] == pytest.approx(100) and perfect["not_ended"] == 0
    half = [Written(text="the cat", ended=True), Written(text="xyz", ended=False)]
    summary = downstream.summarise_pairs(pairs, half)
    assert summary["exact_match"] == {"value": 0.5, "standard_error": 0.5} and 0 < summary["chrf"] < 100
    assert summary["not_ended"] == 1 and summary["chrf_signature"].startswith("nrefs:1|case:mixed")


def test_chrf_of_one_word_is_popovics_formula():
    """'abcd' for 'abce': character n-grams of 1 to 4 share 3/4, 2/3, 1/2, 0 of theirs; F with beta = 2 of their means."""
    summary = downstream.summarise_pairs([Pair(source="a", target="abce")], [Written(text="abcd", ended=True)])
    assert summary["chrf"] == pytest.approx(100 * np.mean([3 / 4, 2 / 3, 1 / 2, 0]), abs=1e-6)


def test_without_sacrebleu_the_way_out_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics.chrf", None)
    with pytest.raises(ValueError, match=r"pip install 'bitterlab\[eval\]'"):
        downstream.chrf()


GOOD = '{"context": "a", "choices": ["b", "c"], "answer": 1, "note": "left alone"}'


@pytest.mark.parametrize(("line", "message"), [
    ("{", "line 3: not JSON"),
    ("[1]", "line 3: list where an object with context, choices, answer belongs"),
    ('{"context": "a", "choices": ["b", "c"]}', "line 3: missing key answer"),
    ('{"context": "", "choices": ["b", "c"], "answer": 0}', "line 3: context = ''"),
    ('{"context": "a", "choices": ["b"], "answer": 0}', "line 3: choices = .* at least two"),
    ('{"context": "a", "choices": ["b", ""], "answer": 0}', "line 3: choices = .* none of them empty"),
    ('{"context": "a", "choices": ["b", "c"], "answer": 2}', "line 3: answer = 2: .* from 0 to 1"),
    ('{"context": "a", "choices": ["b", "c"], "answer": true}', "line 3: answer = True"),
])  # fmt: skip
def test_a_wrong_line_is_named(tmp_path, line, message):
    path = tmp_path / "questions.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n")
    with pytest.raises(ValueError, match=f"questions.jsonl, {message}"):
        read_questions(path)


def test_files_are_read(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text(GOOD + "\n")
    assert read_questions(path) == [Question(context="a", choices=("b", "c"), answer=1)]
    path.write_text('{"source": "a\\u2028", "target": "b"}\n')
    assert read_pairs(path) == [Pair(source="a\u2028", target="b")]
    for content, message in (
        (b"", "no lines in it"),
        (b"\xff", "not UTF-8"),
        (b'{"source": 1, "target": "b"}', "source = 1"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_pairs(path)
    with pytest.raises(ValueError, match="no such file"):
        read_pairs(tmp_path / "nowhere.jsonl")


def test_held_out_pairs_are_the_corpus_own(monkeypatch):
    texts = [("a source", "its target"), ("é", "∑"), ("another", "x"), ("more", "yet more")]
    raw = [(source.encode(), target.encode()) for source, target in texts]
    lengths = np.array([len(source) + len(target) for source, target in raw])
    split = Split(
        tokens=np.frombuffer(b"".join(source + target for source, target in raw), np.uint8),
        starts=np.concatenate([[0], np.cumsum(lengths)[:-1]]),
        lengths=lengths,
        sources=np.array([len(source) for source, _ in raw]),
    )
    corpus = Corpus(train=split, held_out=split, tokenizer=BYTES, summary={})
    monkeypatch.setattr(downstream, "load", lambda data: corpus)
    found = downstream.held_out_pairs(make_run(), 4)
    assert [(pair.source, pair.target) for pair in found] == texts
    assert downstream.held_out_pairs(make_run(), 2) == [found[1], found[3]]
    with pytest.raises(ValueError, match="give 4 pairs"):
        downstream.held_out_pairs(make_run(), 5)
    monkeypatch.setattr(downstream, "load", lambda data: replace(corpus, held_out=replace(split, sources=None)))
    with pytest.raises(ValueError, match="it has no pairs: give --pairs FILE"):
        downstream.held_out_pairs(make_run(), 1)
