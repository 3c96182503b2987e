"""A mixture of prepared corpora: examples are taken from each in turn by weight (lab.data.examples), any step without those
before it. A mixture is a prepared directory like others: shards are linked where the file system can, else copied."""

import hashlib
import json
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lab.data.corpora import PREPARED
from lab.data.corpus import Corpus, Shards, Split, open_corpus
from lab.data.manifest import DOCUMENTS, FILE, SHARDS, SPLITS, array_file, shard_file
from lab.data.prepare import Described, describe, prepared_in
from lab.records import SCHEMA, write_json

PARTS_PER = 10**6  # weights are whole millionths of their sum: the rule of turns is exact
_AT_ONCE = 2**20


def mix(weights: Mapping[str, float], out: Path) -> Described:
    """weights: of directories that `lab data prepare` wrote, relative to their sum.

    Raises ValueError where they can not be mixed: other tokenizers, held-out shares, pairs with texts, or a corpus so
    small that a document changed sides, which another corpus may have on the other.
    """
    out = Path(out).expanduser().absolute()
    if len(weights) < 2:
        raise ValueError(f"mix of {list(weights)}: give at least two corpora with their weights, such as A=0.7 B=0.3")
    for name, weight in weights.items():
        if not 0 < weight < float("inf"):
            raise ValueError(f"{name} = {weight}: use a weight above 0")
    corpora = {name: open_corpus(Path(describe(PREPARED, name).data.path or name)) for name in weights}
    _check(corpora)
    total = sum(weights.values())
    whole = {name: max(1, round(PARTS_PER * weight / total)) for name, weight in weights.items()}
    content = _summary(corpora, whole)
    if prepared_in(out) is not None:
        there = describe(PREPARED, out)
        if there.data.manifest == content["manifest"]:
            return there
        raise ValueError(f"out = {str(out)!r}: it is there, and another corpus: choose another --out, or delete it")
    temporary = out.parent / f".{out.name}.mixing-{uuid.uuid4().hex[:8]}"
    try:
        (temporary / SHARDS).mkdir(parents=True)
        content["shards"] = _shards(corpora, temporary)
        _write_index(corpora, temporary)
        tokenizer = next(iter(corpora.values())).tokenizer
        for file, raw in tokenizer.files.items():
            (temporary / file).write_bytes(raw)
        write_json(temporary / FILE, content)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return describe(PREPARED, out)


def _check(corpora: Mapping[str, Corpus]) -> None:
    (first, base), *others = corpora.items()
    for name, corpus in others:
        for what, ours, theirs in (
            ("tokenizer", corpus.tokenizer.name, base.tokenizer.name),
            ("held-out share", corpus.summary["held_out_share"], base.summary["held_out_share"]),
            ("kind (pairs)", corpus.summary["pairs"], base.summary["pairs"]),
        ):
            if ours != theirs:
                raise ValueError(
                    f"mix: the {what} of {name} is {ours}, and {theirs} of {first}: prepare both with the same one"
                )
    for name, corpus in corpora.items():
        if corpus.summary["moved"]:
            raise ValueError(
                f"mix: {name} has so few documents that one was moved so that both sides have some, and another corpus may have "
                "it on the other: use more text, or a larger --held-out in all"
            )
        if "mixture" in corpus.summary:
            raise ValueError(f"mix: {name} is a mixture itself: mix what it is made of, with their weights")


def _summary(corpora: Mapping[str, Corpus], weights: Mapping[str, int]) -> dict[str, Any]:
    summaries = {name: corpus.summary for name, corpus in corpora.items()}
    base = next(iter(summaries.values()))
    parts = [[s["manifest"], weights[name]] for name, s in summaries.items()]
    spelled = sum(s["held_out"]["bytes"] / s["tokenizer"]["scale"] for s in summaries.values())
    exact = all(s["tokenizer"]["exact"] for s in summaries.values())
    sums = {
        split: {what: sum(s[split][what] for s in summaries.values()) for what in ("documents", "bytes", "tokens")}
        for split in SPLITS
    }
    return {
        "schema": SCHEMA,
        "corpus": "mixture",
        "licence": " AND ".join(dict.fromkeys(str(s["licence"] or "unknown") for s in summaries.values())),
        "tokenizer": {
            **base["tokenizer"],
            "exact": exact,
            "inexact_documents": sum(s["tokenizer"]["inexact_documents"] for s in summaries.values()),
            "scale": 1.0 if exact else sums["held_out"]["bytes"] / spelled,
        },
        "manifest": hashlib.sha256(json.dumps([SCHEMA, "mixture", parts]).encode()).hexdigest(),
        "held_out_share": base["held_out_share"],
        **sums,
        "sources": [
            {**source, "name": f"{place}/{source['name']}"}
            for place, s in enumerate(summaries.values())
            for source in s["sources"]
        ],
        "skipped": _skipped(summaries.values()),
        "pairs": base["pairs"],
        "moved": False,
        "unused_tokens": sum(s["unused_tokens"] for s in summaries.values()),
        "mixture": [
            {
                "name": name,
                "corpus": s["corpus"],
                "manifest": s["manifest"],
                "weight": weights[name],
                **{split: s[split]["documents"] for split in SPLITS},
            }
            for name, s in summaries.items()
        ],
    }


def _skipped(summaries: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    counted: Counter[str] = Counter()
    for summary in summaries:
        counted.update(summary["skipped"])
    return dict(counted)


def _tokens(corpus: Corpus) -> Shards:
    assert isinstance(corpus.train.tokens, Shards)
    return corpus.train.tokens


def _shards(corpora: Mapping[str, Corpus], target: Path) -> list[dict[str, Any]]:
    found = []
    for corpus in corpora.values():
        for file, shard in zip(_tokens(corpus).files, corpus.summary["shards"], strict=True):
            name = shard_file(len(found))
            try:
                os.link(file, target / name)
            except OSError:  # another file system
                shutil.copyfile(file, target / name)
            found.append({"file": name, "tokens": shard["tokens"]})
    return found


def _write_index(corpora: Mapping[str, Corpus], target: Path) -> None:
    import pyarrow.parquet as pq

    pairs = next(iter(corpora.values())).summary["pairs"]
    for split in SPLITS:
        members: list[Split] = [getattr(corpus, split) for corpus in corpora.values()]
        count = sum(len(member.lengths) for member in members)
        for which in ("starts", "lengths", *(("sources",) if pairs else ())):
            if not count:
                np.save(target / array_file(split, which), np.zeros(0, np.int64))
                continue
            array = np.lib.format.open_memmap(target / array_file(split, which), "w+", np.int64, (count,))
            at = before = 0
            for member, corpus in zip(members, corpora.values(), strict=True):
                values = getattr(member, which)
                for place in range(0, len(values), _AT_ONCE):
                    some = values[place : place + _AT_ONCE]
                    array[at : at + len(some)] = some + (before if which == "starts" else 0)
                    at += len(some)
                before += len(_tokens(corpus))
            array.flush()
    directories = [_tokens(corpus).files[0].parent.parent for corpus in corpora.values()]
    with pq.ParquetWriter(target / DOCUMENTS, pq.read_schema(directories[0] / DOCUMENTS), compression="zstd") as writer:
        for directory in directories:
            with pq.ParquetFile(directory / DOCUMENTS) as file:
                for batch in file.iter_batches():
                    writer.write_batch(batch)
