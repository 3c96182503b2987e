"""From a corpus to tokens on disk, once: `describe` for the planner, `load` for the trainer.

    <cache>/corpora/<manifest hash>/<tokenizer>/tokens.bin     every document's tokens, one after the other
                                                offsets.npy    int64 [documents + 1]: where each begins, and the end
                                                held_out.npy   bool [documents]
                                                manifest.json  summary.json
    <cache>/corpora/listings/<key>.json                        which manifest an unchanged corpus has: no reading again

A directory appears whole, by a rename. Two processes that prepare the same corpus do the work twice and keep one.
"""

import contextlib
import hashlib
import json
import os
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from lab.cache import cache_directory
from lab.data.corpora import Listing, listing
from lab.data.manifest import Entry, Manifest, describe_summary, differences
from lab.data.tokenizers import TOKENIZERS, Tokenizer
from lab.records import SCHEMA, read_json, write_json
from lab.spec import Data, nearest

TOKENS, OFFSETS, HELD_OUT, SUMMARY = "tokens.bin", "offsets.npy", "held_out.npy", "summary.json"
VERSION = 1  # of this file's rules: raised when the same documents would be stored otherwise
ABANDONED = 24 * 3600  # seconds after which an unfinished directory is some killed process's


@dataclass(frozen=True, kw_only=True)
class Described:
    """`data` goes into Runs; `summary` (JSON; lab.data.manifest) into plans and reports."""

    data: Data
    summary: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.data.corpus}: {describe_summary(self.summary)}"


@dataclass(frozen=True, kw_only=True)
class Split:
    """Documents of one split: document d is tokens[starts[d] : starts[d] + lengths[d]]. `tokens` is memory-mapped.
    sources: of a corpus of pairs, how many tokens of each document are its source (the others are its target)."""

    tokens: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    sources: np.ndarray | None = None

    def read(self, starts_B: np.ndarray, length: int) -> Int[np.ndarray, "B n"]:
        """int32 tokens of the spans of one length that begin at these places."""
        return self.tokens[starts_B[:, None] + np.arange(length)].astype(np.int32)


@dataclass(frozen=True, kw_only=True)
class Corpus:
    train: Split
    held_out: Split
    tokenizer: Tokenizer
    summary: dict[str, Any]


def describe(
    corpus: str, path: str | Path | None = None, held_out: float = 0.05, tokenizer: str = "bytes"
) -> Described:
    """Finds the corpus on this machine, prepares it where that has not been done, and says what it is.

    Raises ValueError for an unknown corpus, tokenizer or path, and for one without at least two documents of text.
    """
    if not (isinstance(held_out, int | float) and 0 < held_out <= 0.5):
        raise ValueError(f"data.held_out = {held_out!r}: use a share of the documents in (0, 0.5]")
    encoder = _tokenizer(tokenizer)
    found = listing(corpus, None if path is None else str(path))
    key = hashlib.sha256(json.dumps([VERSION, found.fingerprint, float(held_out)]).encode()).hexdigest()
    index = _root() / "listings" / f"{key[:32]}.json"
    known = _read(index)
    directory = _root() / known["manifest"] / tokenizer if known else None
    if directory is None or not (directory / SUMMARY).exists():
        directory = _prepare(corpus, found, encoder, float(held_out))
        write_json(index, {"schema": SCHEMA, "manifest": directory.parent.name})
    summary = read_json(directory / SUMMARY)
    data = Data(
        corpus=corpus,
        path=found.path,
        manifest=summary["manifest"],
        train_tokens=summary["train"]["tokens"],
        tokenizer=tokenizer,
        vocabulary=encoder.text,
        held_out=float(held_out),
    )
    return Described(data=data, summary=summary)


def load(data: Data, expected: Mapping[str, Any] | None = None) -> Corpus:
    """The corpus whose manifest `data` names: from the cache, also where what is installed has changed since; else
    prepared from what is found here. Raises ValueError where that is another text; `expected`, the summary that the
    plan recorded, lets the error name the sources that differ."""
    encoder = _tokenizer(data.tokenizer)
    directory = _root() / data.manifest / data.tokenizer
    if not (directory / SUMMARY).exists():
        found = describe(data.corpus, data.path, data.held_out, data.tokenizer)
        if found.data.manifest != data.manifest:
            differ = differences(expected, found.summary) if expected else ""
            raise ValueError(
                f"data.manifest = {data.manifest[:12]}...: corpus {data.corpus!r} is another text on this machine "
                f"({describe_summary(found.summary)}){'; ' + differ if differ else ''}. Copy {directory.parent} from "
                "the machine that made the plan, install the versions that it lists, or plan again here"
            )
    return _open(directory, encoder, data)


def _open(directory: Path, tokenizer: Tokenizer, data: Data) -> Corpus:
    try:
        summary = read_json(directory / SUMMARY)
        offsets = np.load(directory / OFFSETS)
        held_out = np.load(directory / HELD_OUT)
        tokens = np.memmap(directory / TOKENS, tokenizer.dtype, mode="r").view(np.ndarray)
        if not len(tokens) == offsets[-1] or not len(held_out) == len(offsets) - 1:
            raise ValueError(f"{len(tokens)} tokens, {offsets[-1]} expected")
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(
            f"{directory}: not a whole corpus ({error}); delete this folder to prepare it again"
        ) from error
    if summary["train"]["tokens"] != data.train_tokens:
        raise ValueError(
            f"data.train_tokens = {data.train_tokens}: manifest {data.manifest[:12]} has "
            f"{summary['train']['tokens']}; take both from lab.data.describe"
        )
    starts, lengths = offsets[:-1], np.diff(offsets)
    train, held = (
        Split(tokens=tokens, starts=starts[chosen], lengths=lengths[chosen]) for chosen in (~held_out, held_out)
    )
    return Corpus(train=train, held_out=held, tokenizer=tokenizer, summary=summary)


def _prepare(corpus: str, found: Listing, tokenizer: Tokenizer, held_out: float) -> Path:
    """Reads, deduplicates, splits and stores every document; the directory that holds it."""
    root = _root()
    root.mkdir(parents=True, exist_ok=True)
    for left in root.glob(".preparing-*"):
        # Another process may end its work, and with it the directory, meanwhile.
        with contextlib.suppress(FileNotFoundError):
            if time.time() - left.stat().st_mtime > ABANDONED:
                shutil.rmtree(left, ignore_errors=True)
    temporary = root / f".preparing-{uuid.uuid4().hex[:8]}"
    temporary.mkdir()
    try:
        documents, offsets, skipped = _write_tokens(temporary / TOKENS, found, tokenizer)
        if len(documents) < 2:
            raise ValueError(_too_few(corpus, found.path, len(documents), skipped))
        held = held_out_documents([document["sha256"] for document in documents], held_out)
        manifest = Manifest(
            held_out=held_out,
            entries=tuple(
                Entry(**document, split="held_out" if is_held else "train")
                for document, is_held in zip(documents, held, strict=True)
            ),
            skipped=skipped,
        )
        summary = {"schema": SCHEMA, "corpus": corpus, "tokenizer": tokenizer.name, **manifest.summary()}
        lengths = np.diff(offsets)
        summary["train"]["tokens"] = int(lengths[~held].sum())
        summary["held_out"]["tokens"] = int(lengths[held].sum())
        np.save(temporary / OFFSETS, offsets)
        np.save(temporary / HELD_OUT, held)
        manifest.write(temporary)
        write_json(temporary / SUMMARY, summary)
        return _publish(temporary, root / manifest.hash / tokenizer.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_tokens(
    file: Path, found: Listing, tokenizer: Tokenizer
) -> tuple[list[dict[str, Any]], np.ndarray, dict[str, int]]:
    """Entries without their split, int64 offsets [documents + 1], and what was skipped."""
    documents, offsets, seen = [], [0], set()
    skipped = Counter({"not_text": 0, "empty": 0, "duplicate": 0})
    with file.open("wb") as stream:
        for document in found.read():
            content = document.content
            if content is None:
                skipped["not_text"] += 1
                continue
            raw = content.encode() if isinstance(content, str) else content.tobytes()
            digest = hashlib.sha256(raw).hexdigest()
            if not raw or digest in seen:
                skipped["duplicate" if raw else "empty"] += 1
                continue
            seen.add(digest)
            tokens = tokenizer.encode(content) if isinstance(content, str) else content.astype(tokenizer.dtype)
            stream.write(tokens.tobytes())
            offsets.append(offsets[-1] + len(tokens))
            documents.append(
                {
                    "source": document.source,
                    "version": document.version,
                    "file": document.file,
                    "sha256": digest,
                    "bytes": len(raw),
                }
            )
    return documents, np.asarray(offsets, np.int64), dict(skipped)


def held_out_documents(digests: list[str], share: float) -> np.ndarray:
    """bool [documents]: held out is a document whose hash, read as a fraction, lies below `share`. So a document's
    split does not change with the others: what one machine trains on, none holds out at the same share. Only where a
    side would be empty, the document that comes nearest moves over."""
    fractions = np.array([int(digest[:16], 16) / 2**64 for digest in digests])
    held = fractions < share
    if not held.any():
        held[fractions.argmin()] = True
    elif held.all():
        held[fractions.argmax()] = False
    return held


def _publish(temporary: Path, directory: Path) -> Path:
    for file in temporary.iterdir():
        with file.open("rb+") as stream:
            os.fsync(stream.fileno())
    directory.parent.mkdir(exist_ok=True)
    try:
        temporary.rename(directory)
    except OSError:
        # Another process was first with the same text. Anything else is an error.
        if not (directory / SUMMARY).exists():
            raise
    return directory


def _too_few(corpus: str, path: str | None, count: int, skipped: Mapping[str, int]) -> str:
    left_out = ", ".join(f"{number} {reason}" for reason, number in skipped.items() if number)
    remedy = "use one with at least two UTF-8 text files, or give the path of one long file: it is cut into documents"
    return (
        f"data.path = {path!r}: corpus {corpus!r} has {count} different documents of text here "
        f"({left_out or 'nothing'} left out), and some must be held out: {remedy}"
    )


def _tokenizer(name: str) -> Tokenizer:
    if name not in TOKENIZERS:
        raise ValueError(f"data.tokenizer = {name!r}: {nearest(name, list(TOKENIZERS))}")
    return TOKENIZERS[name]


def _read(file: Path) -> dict[str, Any] | None:
    """A listing's record; None where there is none, or one of another version: it is only a shortcut."""
    try:
        return read_json(file)
    except (OSError, ValueError):
        return None


def _root() -> Path:
    return cache_directory() / "corpora"
