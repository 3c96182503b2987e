"""What exactly a corpus is: every document's name and content hash, which split it is in, and what was left out.

A prepared directory, whole or not there:

    manifest.json                     the hash, what is in each split, tokenizer, licence, shards; `summary` is all of it
    tokenizer.json, tokenizer.model   the tokenizer's own file, where it has one
    shards/00000.bin, ...             ids of text, raw, one document after the other
    train.starts.npy, ...             int64 of each document (lab.data.index)
    documents.parquet                 one row a document: its name, SHA-256, bytes, tokens, split
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lab.records import SCHEMA

FILE, DOCUMENTS, SHARDS = "manifest.json", "documents.parquet", "shards"
SPLITS = ("train", "held_out")


def array_file(split: str, which: str) -> str:
    """which: starts, lengths or sources."""
    return f"{split}.{which}.npy"


def shard_file(number: int) -> str:
    return f"{SHARDS}/{number:05d}.bin"


class Sums:
    """Hash and sizes of a corpus, as its documents pass by in the order in which they are stored.

    The hash is SHA-256 over the documents' contents, names, order and split: not over where they lie, when they were made
    or how they are tokenized.
    """

    def __init__(self, held_out: float):
        self.held_out = float(held_out)
        self._hash = hashlib.sha256(f"[{SCHEMA},{json.dumps(self.held_out)},[".encode())
        self._first = True
        self._versions: dict[str, str] = {}
        self._sizes, self._counts = Counter(), Counter()
        self._digests: dict[str, Any] = {}
        self._splits = {split: {"documents": 0, "bytes": 0, "tokens": 0} for split in SPLITS}
        self.spelled: dict[str, float] = dict.fromkeys(SPLITS, 0.0)  # bytes that the tokens stand for
        self.inexact = 0  # documents of which that is not the number of their bytes

    def add(
        self,
        records: np.ndarray,
        sources: Sequence[str],
        versions: Sequence[str],
        names: Sequence[str],
        digests: Sequence[bytes],
        held: np.ndarray,
    ) -> None:
        """Of each document: its RECORD (lab.data.parts), name, digest and whether it is held out."""
        lines = []
        for source, version, name, digest, size, is_held in zip(
            sources, versions, names, digests, records["bytes"].tolist(), held.tolist(), strict=True
        ):
            hexadecimal = digest.hex()
            lines.append(json.dumps([source, name, hexadecimal, SPLITS[is_held]], separators=(",", ":")))
            if source not in self._digests:
                self._digests[source] = hashlib.sha256()
            self._versions[source] = version
            self._sizes[source] += size
            self._counts[source] += 1
            self._digests[source].update(f"{name}\0{hexadecimal}\n".encode(errors="surrogateescape"))
        if lines:
            self._hash.update((("" if self._first else ",") + ",".join(lines)).encode())
            self._first = False
        self.inexact += int((records["spelled"] != records["bytes"]).sum())
        for split, mask in (("train", ~held), ("held_out", held)):
            sums = self._splits[split]
            sums["documents"] += int(mask.sum())
            sums["bytes"] += int(records["bytes"][mask].sum())
            sums["tokens"] += int(records["tokens"][mask].sum())
            self.spelled[split] += float(records["spelled"][mask].sum())

    @property
    def bytes(self) -> dict[str, int]:
        return {split: sums["bytes"] for split, sums in self._splits.items()}

    @property
    def tokens(self) -> dict[str, int]:
        return {split: sums["tokens"] for split, sums in self._splits.items()}

    def summary(self) -> dict[str, Any]:
        """What a plan or report quotes, as JSON: documents and bytes of each split and source, the largest first."""
        whole = self._hash.copy()
        whole.update(b"]]")
        return {
            "manifest": whole.hexdigest(),
            "held_out_share": self.held_out,
            **self._splits,
            "sources": [
                {
                    "name": source,
                    "version": self._versions[source],
                    "documents": self._counts[source],
                    "bytes": size,
                    "sha256": self._digests[source].hexdigest(),
                }
                for source, size in sorted(self._sizes.items(), key=lambda item: (-item[1], item[0]))
            ],
        }


def describe_summary(summary: Mapping[str, Any], largest: int = 5) -> str:
    """One line for people: how much text, from where, which manifest."""
    train, held_out, sources = summary["train"], summary["held_out"], summary["sources"]
    names = ", ".join(f"{_source(source)} {source['bytes'] / 1e6:.1f} MB" for source in sources[:largest])
    others = f" and {len(sources) - largest} more" if len(sources) > largest else ""
    return (
        f"{train['documents'] + held_out['documents']:,} documents, {train['bytes'] / 1e6:.1f} MB to train on, "
        f"{held_out['bytes'] / 1e6:.1f} MB held out; {names}{others}; manifest {summary['manifest'][:12]}"
    )


def describe_skipped(summary: Mapping[str, Any]) -> str:
    """What was left out, by reason; 'nothing'."""
    return ", ".join(f"{count:,} {reason}" for reason, count in summary["skipped"].items() if count) or "nothing"


def differences(expected: Mapping[str, Any], found: Mapping[str, Any], most: int = 5) -> str:
    """The first sources in which two summaries differ, as text: what to install, or to look at."""
    there = {source["name"]: source for source in expected["sources"]}
    here = {source["name"]: source for source in found["sources"]}
    lines = []
    if expected["held_out_share"] != found["held_out_share"]:
        lines.append(f"held_out {found['held_out_share']} here, {expected['held_out_share']} there")
    for name in sorted(there.keys() | here.keys()):
        if name not in here or name not in there:
            where, source = ("there", there[name]) if name in there else ("here", here[name])
            lines.append(f"{_source(source)} only {where}")
        elif here[name]["version"] != there[name]["version"]:
            lines.append(f"{_source(here[name])} here, {there[name]['version']} there")
        elif here[name]["sha256"] != there[name]["sha256"]:
            documents = f"{here[name]['documents']} documents here, {there[name]['documents']} there"
            lines.append(f"{_source(here[name])} has other contents ({documents})")
    more = f"; {len(lines) - most} more" if len(lines) > most else ""
    return "; ".join(lines[:most]) + more


def _source(source: Mapping[str, Any]) -> str:
    return f"{source['name']} {source['version']}".strip()
