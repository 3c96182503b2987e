"""The real libraries on small local data: what `datasets` loads is what our own readers read."""

import json
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lab.data import Examples, describe, load
from lab.data.corpora import listing
from lab.data.hub import Unreachable
from lab.data.locate import locate
from lab.data.parts import done
from lab.data.prepare import prepare

datasets = pytest.importorskip("datasets")

TEXTS = [f"document {i}: " + "and the ship sailed on, " * (i % 7 + 1) for i in range(60)]
PAIRS = [{"de": f"Haus {i}", "en": f"house {i}"} for i in range(30)]
# What these libraries leave open or say to developers is not ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def own_cache(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("BITTERLAB_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def parquet(tmp_path):
    """As a data set on the hub: two splits, files of parquet, a card with its licence."""
    folder = tmp_path / "parquet"
    (folder / "data").mkdir(parents=True)
    for number in range(2):
        rows = {"text": TEXTS[number::2], "id": list(range(30))}
        pq.write_table(pa.table(rows), folder / "data" / f"train-{number:05d}-of-00002.parquet")
    pq.write_table(pa.table({"text": ["other"] * 3, "id": [1, 2, 3]}), folder / "data" / "test-00000-of-00001.parquet")
    return folder


@pytest.fixture
def jsonl(tmp_path):
    folder = tmp_path / "jsonl"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return folder


def texts(corpus: str, path) -> list:
    return [document.content for document in listing(corpus, str(path)).read()]


def test_a_folder_of_parquet(parquet):
    found = listing("hf", str(parquet))
    assert len(found.parts) == 2
    assert sorted(document.content for document in found.read()) == sorted(TEXTS)
    assert texts("hf:split=test", parquet) == ["other"] * 3
    # Our own reader takes every file of the folder, whatever split it is.
    assert sorted(texts("parquet", parquet)) == sorted([*TEXTS, *["other"] * 3])


def test_a_folder_of_json_lines(jsonl):
    assert texts("hf", jsonl) == texts("jsonl", jsonl) == TEXTS


def test_what_was_saved_to_disk(tmp_path):
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "one")
    both = {
        "train": datasets.Dataset.from_dict({"body": TEXTS}),
        "test": datasets.Dataset.from_dict({"body": ["other"]}),
    }
    datasets.DatasetDict(both).save_to_disk(tmp_path / "both")
    assert locate(tmp_path / "one") == ("hf", str(tmp_path / "one"))
    assert texts("hf", tmp_path / "one") == TEXTS
    assert texts("hf:column=body", tmp_path / "both") == TEXTS
    assert texts("hf:split=test,column=body", tmp_path / "both") == ["other"]
    with pytest.raises(ValueError, match=r"split = 'tain': did you mean 'train'"):
        listing("hf:split=tain", str(tmp_path / "both"))


def test_pairs_become_source_and_target(tmp_path):
    (tmp_path / "wmt").mkdir()
    pq.write_table(pa.table({"translation": PAIRS}), tmp_path / "wmt" / "train.parquet")
    settings = "source_column=translation.de,target_column=translation.en"
    assert texts(f"hf:{settings}", tmp_path / "wmt") == [(pair["de"], pair["en"]) for pair in PAIRS]
    for corpus in ("hf", "parquet"):
        described = describe(f"{corpus}:{settings}", tmp_path / "wmt", 0.2)
        corpus = load(described.data)
        assert described.summary["pairs"]
        found = set()
        for split in (corpus.train, corpus.held_out):
            assert split.sources is not None
            for number, sources in enumerate(split.sources):
                tokens = split.document(number).astype(np.uint8).tobytes().decode()
                found.add((tokens[:sources], tokens[sources:]))
        assert found == {(pair["de"], pair["en"]) for pair in PAIRS}


def test_pairs_of_one_source_are_on_one_side(tmp_path):
    rows = {"q": [f"question {i % 20}" for i in range(200)], "a": [f"answer {i}" for i in range(200)]}
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    corpus = load(describe("parquet:source_column=q,target_column=a", tmp_path / "a.parquet", 0.3).data)
    train, held_out = (
        {split.document(i)[: split.sources[i]].tobytes() for i in range(len(split.lengths))}
        for split in (corpus.train, corpus.held_out)
    )
    assert train and held_out and not train & held_out and len(train) + len(held_out) == 20


def test_prepared_it_is_streamed_once_by_any_number_of_workers(parquet, tmp_path):
    one = prepare("hf", parquet, tmp_path / "one", held_out=0.2, workers=1)
    two = prepare("hf", parquet, tmp_path / "two", held_out=0.2, workers=2)
    assert one.data.manifest == two.data.manifest and one.summary["train"] == two.summary["train"]
    examples = Examples(load(one.data), 16, seed=0)
    assert examples.batch(0, 4).shape == (4, 16)


def test_mistakes_are_told_with_the_way_out(parquet, tmp_path):
    for corpus, path, message in (
        (
            "hf:split=tran",
            parquet,
            r"can not load configuration None, split 'tran'.*choose them with --config and --split",
        ),
        (
            "hf",
            "owner/nothing-of-this-name",
            r"no such file or folder here, and the hub has no such data set or can not",
        ),
        ("hf", None, "needs a data set's name on the hub or a local folder"),
    ):
        with pytest.raises((ValueError, Unreachable), match=message):
            listing(corpus, path and str(path))
    with pytest.raises(ValueError, match=r"no column 'body' \(use one of text, id\)"):
        texts("hf:column=body", parquet)


FAKE = """
import json, os
from pathlib import Path
from types import SimpleNamespace

DownloadConfig = dict

class Table:
    def __init__(self, index):
        self.index = index

    num_shards, info = 6, None

    def shard(self, num_shards, index):
        return Table(index)

    def with_format(self, _):
        return self

    def iter(self, batch_size):
        import pyarrow as pa

        yield pa.table({"text": [f"shard {self.index} row {row}" for row in range(20)]})
        if self.index == 4 and Path(os.environ["FAKE_HUB_IS_DOWN"]).exists():
            raise ConnectionError("the hub went away")
        yield pa.table({"text": [f"shard {self.index} later row {row}" for row in range(20)]})

def load_dataset(*_, **__):
    return Table(0)

class HfApi:
    def dataset_info(self, path, revision):
        return SimpleNamespace(sha="c0ffee")
"""


@pytest.mark.parametrize("count", [1, 2])
def test_a_hub_that_fails_in_the_midst_leaves_the_shards_that_were_read(tmp_path, monkeypatch, count):
    for name in ("datasets", "huggingface_hub"):
        (tmp_path / "fake").mkdir(exist_ok=True)
        (tmp_path / "fake" / f"{name}.py").write_text(FAKE)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path / "fake")  # workers take it over
    monkeypatch.setenv("FAKE_HUB_IS_DOWN", str(tmp_path / "down"))
    (tmp_path / "down").touch()
    with pytest.raises(
        Unreachable if count == 1 else OSError, match=r"shard 4 of 6, after row 20: .* went away.* goes on"
    ):
        prepare("hf", "owner/name", tmp_path / "out", workers=count)
    (work,) = tmp_path.glob(".out.preparing-*")
    finished = sum(done(work / "parts", number) for number in range(6))
    assert finished >= 3
    (tmp_path / "down").unlink()
    reports = []
    described = prepare("hf", "owner/name", tmp_path / "out", workers=count, report=reports.append)
    assert reports[0].parts >= finished and described.summary["train"]["documents"] > 200
    whole = prepare("hf", "owner/name", tmp_path / "whole", workers=3 - count)
    assert whole.data.manifest == described.data.manifest


def test_a_torn_file_is_told_with_the_way_out(parquet):
    file = parquet / "data" / "train-00000-of-00002.parquet"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"data\.path = .*can not load|shard \d of 2, after row 0: .*: mend it"):
        texts("hf", parquet)


def test_without_the_library_the_command_is_named(parquet, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"datasets is not installed .* pip install 'bitterlab\[hf\]'"):
        listing("hf", str(parquet))
