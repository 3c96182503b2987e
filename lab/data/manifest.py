"""What exactly a corpus is: every document's name and content hash, which split it is in, and what was left out."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from lab.records import SCHEMA, read_json, write_json

FILE = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class Entry:
    source: str
    version: str
    file: str
    sha256: str  # of the document's UTF-8 text
    bytes: int
    split: Literal["train", "held_out"]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """`entries` in the order in which the documents are stored; `skipped` counts what the corpus had and is not here:
    files that are no UTF-8 text, empty ones, and exact duplicates of an earlier one."""

    held_out: float
    entries: tuple[Entry, ...]
    skipped: Mapping[str, int]

    @property
    def hash(self) -> str:
        """SHA-256 of the documents' contents, names, order and split: not of where they lie or when they were made."""
        documents = [[entry.source, entry.file, entry.sha256, entry.split] for entry in self.entries]
        content = json.dumps([SCHEMA, float(self.held_out), documents], separators=(",", ":"))
        return hashlib.sha256(content.encode()).hexdigest()

    def summary(self) -> dict[str, Any]:
        """What a plan or report quotes, as JSON: documents and bytes of each split and source, the largest first."""
        splits = {split: [e for e in self.entries if e.split == split] for split in ("train", "held_out")}
        versions = {entry.source: entry.version for entry in self.entries}
        sizes, counts, digests = Counter(), Counter(), {source: hashlib.sha256() for source in versions}
        for entry in self.entries:
            sizes[entry.source] += entry.bytes
            counts[entry.source] += 1
            digests[entry.source].update(f"{entry.file}\0{entry.sha256}\n".encode(errors="surrogateescape"))
        return {
            "manifest": self.hash,
            "held_out_share": float(self.held_out),
            **{
                split: {"documents": len(entries), "bytes": sum(entry.bytes for entry in entries)}
                for split, entries in splits.items()
            },
            "skipped": dict(self.skipped),
            "sources": [
                {
                    "name": source,
                    "version": versions[source],
                    "documents": counts[source],
                    "bytes": size,
                    "sha256": digests[source].hexdigest(),
                }
                for source, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0]))
            ],
        }

    def write(self, directory: Path) -> None:
        write_json(
            directory / FILE,
            {
                "schema": SCHEMA,
                "manifest": self.hash,
                "held_out": self.held_out,
                "skipped": dict(self.skipped),
                "entries": [asdict(entry) for entry in self.entries],
            },
        )


def read_manifest(directory: Path) -> Manifest:
    content = read_json(directory / FILE)
    entries = tuple(Entry(**entry) for entry in content["entries"])
    return Manifest(held_out=content["held_out"], entries=entries, skipped=content["skipped"])


def describe_summary(summary: Mapping[str, Any], largest: int = 5) -> str:
    """One line for people: how much text, from where, which manifest."""
    train, held_out, sources = summary["train"], summary["held_out"], summary["sources"]
    names = ", ".join(f"{_source(source)} {source['bytes'] / 1e6:.1f} MB" for source in sources[:largest])
    others = f" and {len(sources) - largest} more" if len(sources) > largest else ""
    return (
        f"{train['documents'] + held_out['documents']:,} documents, {train['bytes'] / 1e6:.1f} MB to train on, "
        f"{held_out['bytes'] / 1e6:.1f} MB held out; {names}{others}; manifest {summary['manifest'][:12]}"
    )


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
