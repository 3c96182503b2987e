"""Tokenizers that are files: round trips, bytes that add up, and what is said of other files."""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.data import describe, load, subwords, tokenizer_of
from lab.data.packed import Packed
from lab.data.prepare import prepare
from lab.spec import Objective

tokenizers = pytest.importorskip("tokenizers")
sentencepiece = pytest.importorskip("sentencepiece")

WORDS = ["the ship sailed on, and the gulls followed it.\n", "naïve ∑ text 🙂 ", "def f(x):\n\treturn x\n"]
TEXTS = [" ".join(WORDS[(i + j) % 3] + str(i * j) for j in range(30)) for i in range(40)]


@pytest.fixture(autouse=True)
def own_cache(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("BITTERLAB_CACHE", str(tmp_path / "own"))
    return tmp_path / "own"


@pytest.fixture(scope="module")
def bpe():
    return subwords.train(TEXTS, 400)


def sentencepiece_model(**settings) -> bytes:
    model = io.BytesIO()
    exact = dict(normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False)
    settings = {**exact, "byte_fallback": True, "vocab_size": 400, "hard_vocab_limit": False, **settings}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, minloglevel=2, character_coverage=1.0, **settings
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    file = tmp_path_factory.mktemp("model") / "any.model"
    file.write_bytes(sentencepiece_model())
    return subwords.read(file)


@pytest.mark.parametrize("kind", ["bpe", "pieces"])
@settings(deadline=None, max_examples=200)
@given(
    text=st.text(
        alphabet=st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("the <|>s/\n\t ∑")), max_size=60
    )
)
def test_every_text_comes_back_and_its_bytes_add_up(request, kind, text):
    tokenizer = request.getfixturevalue(kind)
    if kind == "pieces":
        text = text.replace("\0", "").replace(subwords.SPACE, "")  # it writes spaces with it
    ids = tokenizer.encode(text)
    assert ids.dtype == tokenizer.dtype and (not len(ids) or ids.max() < tokenizer.text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert np.array_equal(tokenizer.encode_all([text, "the"])[0], ids)


def test_names_say_which_file_it_was(bpe, tmp_path):
    (tmp_path / "mine.json").write_bytes(bpe.files["tokenizer.json"])
    again = subwords.find(tmp_path / "mine.json")
    assert again.name == bpe.name and bpe.name.startswith("bpe-400-")
    other = subwords.train(TEXTS[:5], 300)
    assert other.name != bpe.name and other.text == 300


def test_special_tokens_of_a_file_are_text_where_a_text_spells_them(tmp_path):
    file = tmp_path / "special.json"
    special = tokenizers.Tokenizer.from_str(subwords.train(TEXTS, 300).files["tokenizer.json"].decode())
    special.add_special_tokens(["<|endoftext|>"])
    special.save(str(file))
    tokenizer = subwords.find(file)
    text = "one<|endoftext|>two"
    ids = tokenizer.encode(text)
    assert tokenizer.text == 301 and 300 not in ids
    assert tokenizer.decode(ids) == text and tokenizer.token_bytes[ids].sum() == len(text)
    assert tokenizer.token_bytes[300] == 0


def test_documents_with_an_end_between_them_have_the_bytes_of_their_text(tmp_path):
    """As GPT-2's ids are stored: bits per byte count the text alone, and the objective's own end of each document once."""
    special = tokenizers.Tokenizer.from_str(subwords.train(TEXTS, 300).files["tokenizer.json"].decode())
    special.add_special_tokens(["<|endoftext|>"])
    special.save(str(tmp_path / "special.json"))
    tokenizer = subwords.find(tmp_path / "special.json")
    ids = [tokenizer.encode(text) for text in TEXTS]
    np.concatenate([np.append(one, 300) for one in ids]).astype(np.uint16).tofile(tmp_path / "ids.bin")
    size = sum(len(text.encode()) for text in TEXTS)

    cut = describe("tokens:separator=300", tmp_path / "ids.bin", 0.2, tmp_path / "special.json")
    assert cut.summary["tokenizer"]["exact"] and cut.summary["skipped"]["empty"] == 0
    assert sum(cut.summary[split]["bytes"] for split in ("train", "held_out")) == size
    assert sum(cut.summary[split]["tokens"] for split in ("train", "held_out")) == sum(map(len, ids))
    corpus = load(cut.data)
    for split, held in ((corpus.train, "train"), (corpus.held_out, "held_out")):
        documents = [split.document(number) for number in range(len(split.lengths))]
        assert all(corpus.tokenizer.decode(one) in TEXTS and 300 not in one for one in documents)
        spelled = sum(corpus.tokenizer.token_bytes[one].sum() for one in documents)
        assert spelled == cut.summary[held]["bytes"]
    packed = Packed(corpus, Objective(name="causal_lm", S=0, T=1, attended=1), seed=0)
    _, targets = packed.held_out(int(corpus.held_out.lengths.sum()) + len(corpus.held_out.lengths))
    ends = targets == corpus.tokenizer.sep
    assert ends.sum() == len(corpus.held_out.lengths)
    assert corpus.tokenizer.token_bytes[targets[~ends]].sum() == cut.summary["held_out"]["bytes"]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(TEXTS):
        (tmp_path / "texts" / f"{number}.txt").write_text(text, newline="")
    return tmp_path / "texts"


def test_a_corpus_keeps_its_tokenizer(folder, tmp_path, bpe):
    file = tmp_path / "tokenizer.json"
    file.write_bytes(bpe.files["tokenizer.json"])
    described = describe("text", folder, 0.2, file)
    out = prepare("text", folder, tmp_path / "out", tokenizer=file, held_out=0.2)
    assert described.data.manifest == out.data.manifest == describe("text", folder, 0.2).data.manifest
    assert described.data.tokenizer == bpe.name and described.data.vocabulary == 400
    assert described.summary["tokenizer"]["exact"] and described.summary["tokenizer"]["scale"] == 1.0
    file.unlink()
    for data in (described.data, out.data):
        corpus = load(data)
        assert tokenizer_of(data).name == bpe.name
        documents = {corpus.tokenizer.decode(split.document(i))
                     for split in (corpus.train, corpus.held_out) for i in range(len(split.lengths))}  # fmt: skip
        assert documents == set(TEXTS)
    # Known by its name on a machine that has prepared with it.
    assert describe("text", folder, 0.2, bpe.name).data == described.data


def test_a_second_machine_is_told_what_to_copy(folder, tmp_path, own_cache, bpe, monkeypatch):
    (tmp_path / "t.json").write_bytes(bpe.files["tokenizer.json"])
    data = describe("text", folder, 0.2, tmp_path / "t.json").data
    monkeypatch.setenv("BITTERLAB_CACHE", str(tmp_path / "second"))
    names = [f"{tmp_path}/second/tokenizers/{bpe.name}", f"{tmp_path}/second/corpora/{data.manifest}/{bpe.name}"]
    for use, expected in (
        (load, names),
        (tokenizer_of, names),
        (lambda d: describe("text", folder, 0.2, d.tokenizer), names[:1]),
    ):
        with pytest.raises(ValueError, match=r"its file is not on this machine: copy ") as caught:
            use(data)
        assert all(name in str(caught.value) for name in expected)
    # Either is enough.
    for name in names:
        target = tmp_path / "second" / Path(name).relative_to(tmp_path / "second")
        shutil.copytree(own_cache / Path(name).relative_to(tmp_path / "second"), target)
        assert load(data).tokenizer.name == bpe.name
        shutil.rmtree(tmp_path / "second")

    out = prepare("text", folder, tmp_path / "out", tokenizer=tmp_path / "t.json").data
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    with pytest.raises(
        ValueError, match=r"no manifest\.json there: copy this prepared directory .* or put its contents into"
    ):
        load(out)


def test_a_tokenizer_that_changes_text_is_scaled_to_the_held_out_bytes(folder, tmp_path):
    lower = json.loads(subwords.train(TEXTS, 400).files["tokenizer.json"])
    lower["normalizer"] = {
        "type": "Sequence",
        "normalizers": [{"type": "NFD"}, {"type": "StripAccents"}, {"type": "Lowercase"}],
    }
    (tmp_path / "lower.json").write_text(json.dumps(lower))
    (tmp_path / "pieces.model").write_bytes(sentencepiece_model(add_dummy_prefix=True, remove_extra_whitespaces=True))
    for file in ("lower.json", "pieces.model"):
        described = describe("text", folder, 0.2, tmp_path / file)
        about, corpus = described.summary["tokenizer"], load(described.data)
        assert not about["exact"] and about["inexact_documents"] == 40 and about["scale"] != 1.0
        tokens = np.concatenate([corpus.held_out.document(i) for i in range(len(corpus.held_out.lengths))])
        assert corpus.tokenizer.token_bytes[tokens].sum() == pytest.approx(
            described.summary["held_out"]["bytes"], rel=1e-12
        )


def test_ids_that_the_tokenizer_has_not_are_refused(tmp_path, bpe):
    np.save(tmp_path / "ids.npy", np.arange(1200, dtype=np.uint16).reshape(12, 100) % 401)
    with pytest.raises(
        ValueError, match=r"tokens ids\.npy#000004: id 400 at place 0, and tokenizer 'bpe.*' has 400 ids: give"
    ):
        (tmp_path / "t.json").write_bytes(bpe.files["tokenizer.json"])
        describe("tokens", tmp_path / "ids.npy", 0.1, tmp_path / "t.json")


def test_a_tokenizer_that_is_not_the_manifests_is_refused(folder, tmp_path, bpe):
    (tmp_path / "t.json").write_bytes(bpe.files["tokenizer.json"])
    data = prepare("text", folder, tmp_path / "out", tokenizer=tmp_path / "t.json").data
    (tmp_path / "out" / "tokenizer.json").write_bytes(subwords.train(TEXTS, 300).files["tokenizer.json"])
    with pytest.raises(
        ValueError, match=r"not a whole corpus \(its tokenizer is 'bpe-300-.*' of 300 ids, and the manifest says"
    ):
        load(data)
    (tmp_path / "out" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"no tokenizer\.json and no tokenizer\.model in it"):
        load(data)
    with pytest.raises(ValueError, match=r"data\.tokenizer = 'other'"):
        load(replace(prepare("text", folder, tmp_path / "second").data, tokenizer="other"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{}", r"t\.json: not a tokenizer of the `tokenizers` library"),
        (b"text", r"t\.json: neither a tokenizer\.json nor a sentencepiece model"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    (tmp_path / "t.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        subwords.find(tmp_path / "t.json")


def test_names_that_are_nowhere_are_refused(monkeypatch):
    for name in ("nowhere.json", "gpt2", "byte"):
        with pytest.raises(ValueError, match=r"use one of bytes|did you mean 'bytes'"):
            subwords.find(name)
    # Its environment variable is read once, when the library is imported; a hub that can not be reached is asked for long.
    monkeypatch.setattr(pytest.importorskip("huggingface_hub.constants"), "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"the hub has no such tokenizer or can not be reached .* give that file"):
        subwords.find("owner/name")


def test_without_the_library_the_command_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    (tmp_path / "t.json").write_bytes(b"{}")
    with pytest.raises(ValueError, match=r"tokenizers is not installed .* pip install 'bitterlab\[hf\]'"):
        subwords.find(tmp_path / "t.json")


def test_vocabularies_are_of_a_size_that_there_is():
    with pytest.raises(ValueError, match="256 ids are the bytes"):
        subwords.train(TEXTS, 200)
    with pytest.raises(ValueError, match=r"this text gives \d+ different ids: use fewer"):
        subwords.train(["aaa"], 4000)
