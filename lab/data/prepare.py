"""From a source of text to tokens on disk, once: `describe` for the planner, `prepare` for a directory of one's own, `load`
for the trainer.

    <cache>/corpora/<manifest hash>/<tokenizer>/    a prepared directory (lab.data.manifest)
    <cache>/corpora/listings/<key>.json             which manifest an unchanged corpus has: no reading again
    <cache>/tokenizers/<name>/                      the files of tokenizers that corpora were prepared with

A directory appears whole, by a rename. Until then work lies in a hidden directory beside it, which one process holds by a
lock: what a killed one has done of it the next one keeps, and the result is the same bytes.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.cache import cache_directory
from lab.data import index, workers
from lab.data.corpora import PREPARED, listing
from lab.data.corpus import Corpus, Shards, Share, Split, open_corpus, tokenizer_in
from lab.data.documents import Listing
from lab.data.manifest import FILE, SHARDS, SPLITS, Sums, describe_skipped, describe_summary, differences, shard_file
from lab.data.parts import stem
from lab.data.subwords import find, keep
from lab.data.tokenizers import Tokenizer
from lab.data.work_directory import alone, remove_abandoned
from lab.data.workers import Progress
from lab.records import SCHEMA, read_json, write_bytes, write_json
from lab.spec import Data

VERSION = 3  # of how documents are stored: raised when the same ones would be stored otherwise
ABANDONED = 24 * 3600  # seconds after which unfinished work is some killed process's
HELD_OUT = 0.05
Report = Callable[[Progress], None]

__all__ = ["Corpus", "Described", "Progress", "Shards", "Share", "Split", "describe", "load", "prepare", "tokenizer_of"]


@dataclass(frozen=True, kw_only=True)
class Described:
    """`data` goes into Runs; `summary` (JSON; lab.data.manifest) into plans and reports."""

    data: Data
    summary: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.data.corpus}: {describe_summary(self.summary)}"


def describe(
    corpus: str,
    path: str | Path | None = None,
    held_out: float | None = None,
    tokenizer: str | Path | None = None,
    *,
    workers: int | None = None,
    report: Report | None = None,
) -> Described:
    """Finds the corpus on this machine, prepares it in the cache where that has not been done, and says what it is. held_out:
    share of the documents (default: 0.05). tokenizer: default bytes.

    Corpus 'prepared' is the directory `path`, with the tokenizer and the held-out documents that it was prepared with; others
    are refused.
    Raises ValueError for an unknown corpus, tokenizer or path, and for one without at least two documents of text; OSError
    for a disk or hub that fails, after which the same call goes on from the parts that are done.
    """
    if corpus == PREPARED:
        described = _described_directory(path)
        _check_settings(described.data, held_out, tokenizer)
        return described
    encoder, share = find(tokenizer or "bytes"), _share(HELD_OUT if held_out is None else held_out)
    found = listing(corpus, None if path is None else str(path))
    shortcut = _root() / "listings" / f"{_key(found.fingerprint, share)[:32]}.json"
    known = _read(shortcut)
    directory = _root() / known["manifest"] / encoder.name if known else None
    if directory is None or not _stored(directory):
        remove_abandoned(_root(), ".preparing-*", ABANDONED)
        directory = _build(
            corpus,
            found,
            encoder,
            share,
            work=_root() / f".preparing-{_key(found.fingerprint, share, encoder.name)[:16]}",
            processes=workers,
            report=report,
        )
        write_json(shortcut, {"schema": SCHEMA, "manifest": directory.parent.name})
        keep(encoder)
    return _described(corpus, found.path, read_json(directory / FILE))


def _check_settings(data: Data, held_out: float | None, tokenizer: str | Path | None) -> None:
    """Raises ValueError where what is given is not what the text was prepared with."""
    if held_out is not None and held_out != data.held_out:
        raise ValueError(
            f"data.held_out = {held_out!r}: {data.path} was prepared with {data.held_out}: leave it out, or prepare the source "
            "anew with this one"
        )
    check_tokenizer(data, tokenizer)


def check_tokenizer(data: Data, tokenizer: str | Path | None) -> None:
    """Raises ValueError where a tokenizer is given, and text has been prepared with another."""
    if tokenizer is not None and str(tokenizer) != data.tokenizer and find(tokenizer).name != data.tokenizer:
        raise ValueError(
            f"data.tokenizer = {str(tokenizer)!r}: {data.path or data.corpus} was prepared with {data.tokenizer!r}: leave it "
            "out, or prepare the source anew with this one"
        )


def prepare(
    corpus: str,
    path: str | Path | None,
    out: Path,
    *,
    tokenizer: str | Path = "bytes",
    held_out: float = HELD_OUT,
    licence: str | None = None,
    workers: int | None = None,
    report: Report | None = None,
) -> Described:
    """Prepares a corpus in a directory of its own, which needs nothing else to be loaded; started again, it goes on with
    what is done. licence: written into the manifest (default: what the source says of itself).

    Raises ValueError as `describe` does, and where `out` is there and of other text or settings. (Where only the source's
    times have changed, it is read again to know that, and `out` stays.)
    """
    encoder, share, out = find(tokenizer), _share(held_out), Path(out).expanduser().absolute()
    found = listing(corpus, None if path is None else str(path))
    licence = licence or found.licence
    made_from = _key(found.fingerprint, share, encoder.name, licence)
    there = prepared_in(out)
    size = sum(part.size for part in found.parts)
    if there is not None and there.get("made_from") != made_from:
        # Other times of files, or another version of the lab, may still be the same text: whether they are shows at the end.
        settings = {"tokenizer": encoder.name, "held_out_share": share, "licence": licence, "source_bytes": size}
        known = {**there, "tokenizer": there["tokenizer"]["name"]}
        if differ := [name for name, value in settings.items() if known.get(name, value) != value]:
            raise ValueError(
                _another(
                    out, there, ", ".join(f"{name} {settings[name]!r} here, {known[name]!r} there" for name in differ)
                )
            )
    if there is None or there.get("made_from") != made_from:
        work = out.parent / f".{out.name}.preparing-{made_from[:16]}"
        remove_abandoned(out.parent, f".{out.name}.preparing-*", 0, but=work)
        _build(
            corpus,
            found,
            encoder,
            share,
            work=work,
            out=out,
            processes=workers,
            report=report,
            about={"licence": licence, "source_bytes": size, "made_from": made_from},
        )
    return _described_directory(out)


def prepared_in(out: Path) -> dict[str, Any] | None:
    """The summary of what is prepared in `out`; None where that is empty, or not there."""
    if (out / FILE).exists():
        return open_corpus(out).summary
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"out = {str(out)!r}: it is there, and no prepared corpus: choose another --out, or delete it")
    return None


def _another(out: Path, there: Mapping[str, Any], differ: str) -> str:
    return (
        f"out = {str(out)!r}: it is there, of another text, tokenizer or held-out share ({describe_summary(there)}); {differ}: "
        "choose another --out, or delete it"
    )


def load(data: Data, expected: Mapping[str, Any] | None = None) -> Corpus:
    """The corpus whose manifest `data` names: from the cache, also where what is installed has changed since; else from
    the prepared directory it names, else prepared from what is found here. Raises ValueError where that is another text;
    `expected`, the summary that the plan recorded, lets the error name the sources that differ."""
    corpus = open_corpus(_directory(data, expected))
    if corpus.summary["train"]["tokens"] != data.train_tokens or corpus.tokenizer.name != data.tokenizer:
        raise ValueError(
            f"data.train_tokens = {data.train_tokens}, data.tokenizer = {data.tokenizer!r}: manifest {data.manifest[:12]} has "
            f"{corpus.summary['train']['tokens']} of {corpus.tokenizer.name!r}; take both from lab.data.describe"
        )
    return corpus


def tokenizer_of(data: Data) -> Tokenizer:
    """The tokenizer of a run's text, without the text where that is not needed."""
    with contextlib.suppress(ValueError):
        return find(data.tokenizer)
    directory = _directory(data)
    return tokenizer_in(directory, read_json(directory / FILE))


def _directory(data: Data, expected: Mapping[str, Any] | None = None) -> Path:
    """Where the prepared corpus of this manifest lies, prepared now if need be."""
    directory = _root() / data.manifest / data.tokenizer
    if _stored(directory):
        return directory
    if data.corpus == PREPARED:
        if not (Path(str(data.path)) / FILE).exists():
            raise ValueError(
                f"data.path = {data.path!r}: no {FILE} there: copy this prepared directory from the machine that made the plan, "
                f"or put its contents into {directory}"
            )
        found = _described_directory(data.path)
    else:
        try:
            find(data.tokenizer)
        except ValueError as error:
            raise ValueError(f"{error}, or copy {directory}, the text as it was prepared there") from error
        found = describe(data.corpus, data.path, data.held_out, data.tokenizer)
    if found.data.manifest != data.manifest:
        differ = differences(expected, found.summary) if expected else ""
        raise ValueError(
            f"data.manifest = {data.manifest[:12]}...: corpus {data.corpus!r} is another text on this machine "
            f"({describe_summary(found.summary)}){'; ' + differ if differ else ''}. Copy {directory.parent} from "
            "the machine that made the plan, install the versions that it lists, or plan again here"
        )
    return Path(str(data.path)) if data.corpus == PREPARED else directory


def _described_directory(path: str | Path | None) -> Described:
    if path is None:
        raise ValueError("data.path = None: corpus 'prepared' needs a directory that `lab data prepare --out` wrote")
    directory = Path(path).expanduser().absolute()
    if not (directory / FILE).exists():
        raise ValueError(
            f"data.path = {str(path)!r}: no {FILE} there: `lab data prepare SOURCE --out {path}` prepares a corpus"
        )
    return _described(PREPARED, str(directory), open_corpus(directory).summary)


def _described(corpus: str, path: str | None, summary: dict[str, Any]) -> Described:
    data = Data(
        corpus=corpus,
        path=path,
        manifest=summary["manifest"],
        train_tokens=summary["train"]["tokens"],
        tokenizer=summary["tokenizer"]["name"],
        vocabulary=summary["tokenizer"]["vocabulary"],
        held_out=summary["held_out_share"],
    )
    return Described(data=data, summary=summary)


def _build(
    corpus: str,
    found: Listing,
    tokenizer: Tokenizer,
    share: float,
    *,
    work: Path,
    out: Path | None = None,
    processes: int | None,
    report: Report | None,
    about: Mapping[str, Any] | None = None,
) -> Path:
    """Reads, tokenizes, deduplicates, splits and stores every document in `out`, else in the cache; that directory. What the
    source or the tokenizer is at fault for (ValueError) leaves nothing behind; what else went wrong (OSError of disk or hub,
    a worker's death) leaves the parts that are done."""
    with alone(work):
        there = prepared_in(out) if out else None
        if out and there and about and there.get("made_from") == about["made_from"]:  # another process was at it
            shutil.rmtree(work, ignore_errors=True)
            return out
        try:
            parts, whole = _resumed(work)
            for file, content in tokenizer.files.items():
                write_bytes(work / "tokenizer" / file, content)
            workers.run(
                found,
                tokenizer,
                parts,
                corpus=corpus,
                tokenizer_path=str(work / "tokenizer") if tokenizer.files else tokenizer.name,
                workers=processes,
                report=report,
            )
            records = index.Parts(parts, len(found.parts))
            repeated = index.duplicates(records, work)
            skipped = {**records.skipped(), "duplicate": int(repeated.sum())}
            if (live := len(repeated) - skipped["duplicate"]) < 2:
                raise ValueError(_too_few(corpus, found.path, live, skipped))
            whole.mkdir()
            divided = index.split(records, repeated, share)
            sums = index.write(records, repeated, divided, whole)
            shards = [
                {"file": shard_file(i), "tokens": n["tokens"]} for i, n in enumerate(records.notes) if n["tokens"]
            ]
            summary = {
                "schema": SCHEMA,
                "corpus": corpus,
                "licence": found.licence,
                "tokenizer": _about_tokenizer(tokenizer, sums),
                **sums.summary(),
                "skipped": skipped,
                "pairs": records.pairs,
                "moved": divided.moved is not None,
                "unused_tokens": sum(n["tokens"] for n in records.notes) - sum(sums.tokens.values()),
                "shards": shards,
                **(about or {}),
            }
            for file, content in tokenizer.files.items():
                (whole / file).write_bytes(content)
            (whole / SHARDS).mkdir()
            for number, note in enumerate(records.notes):
                if note["tokens"]:
                    stem(parts, number).with_suffix(".tokens").replace(whole / shard_file(number))
            write_json(whole / FILE, summary)
            directory = out or _root() / summary["manifest"] / tokenizer.name
            _publish(whole, directory, cached=out is None)
        except ValueError:
            shutil.rmtree(work, ignore_errors=True)
            raise
        shutil.rmtree(work, ignore_errors=True)
    return directory


def _resumed(work: Path) -> tuple[Path, Path]:
    """The directories of parts and of the whole, with what was done before in the first and the second not there."""
    parts, whole = work / "parts", work / "whole"
    parts.mkdir(exist_ok=True)
    for half in parts.glob(".*"):
        half.unlink(missing_ok=True)
    for shard in (whole / SHARDS).glob("*.bin"):
        shard.replace(parts / f"{shard.stem}.tokens")
    shutil.rmtree(whole, ignore_errors=True)
    return parts, whole


def _about_tokenizer(tokenizer: Tokenizer, sums: Sums) -> dict[str, Any]:
    """scale: by what the bytes of its tokens are multiplied, so that those of the held-out tokens add up to the held-out
    bytes: 1 where they do so in every document; a tokenizer that changes text (case, accents, spaces) can not."""
    spelled, held_out = sums.spelled["held_out"], sums.bytes["held_out"]
    if sums.inexact and not spelled:
        raise ValueError(f"data.tokenizer = {tokenizer.name!r}: its tokens stand for no bytes: use another tokenizer")
    return {
        "name": tokenizer.name,
        "vocabulary": tokenizer.text,
        "files": {file: hashlib.sha256(content).hexdigest() for file, content in tokenizer.files.items()},
        "exact": sums.inexact == 0,
        "inexact_documents": sums.inexact,
        "scale": held_out / spelled if sums.inexact else 1.0,
    }


def _publish(whole: Path, directory: Path, *, cached: bool) -> None:
    for file in whole.rglob("*"):
        if file.is_file():
            with file.open("rb+") as stream:
                os.fsync(stream.fileno())
    directory.parent.mkdir(parents=True, exist_ok=True)
    try:
        whole.rename(directory)
    except OSError:
        # It is there: by another process that was first, or prepared before from files that were touched since.
        if not (directory / FILE).exists():
            raise
        there, made = read_json(directory / FILE), read_json(whole / FILE)
        if not cached:
            _same(directory, there, made)
        elif not _stored(directory) or there.get("tokenizer") != made["tokenizer"]:
            # An earlier version's: in another layout, or with bytes of the tokenizer that it counted otherwise.
            directory.rename(whole.with_name("stale"))
            whole.rename(directory)


def _same(directory: Path, there: dict[str, Any], made: dict[str, Any]) -> None:
    """Notes in a prepared directory what has been found to make the same text; ValueError where it is another."""
    if differ := [name for name in ("manifest", "tokenizer", *SPLITS) if there[name] != made[name]]:
        raise ValueError(_another(directory, there, differences(there, made) or f"{', '.join(differ)} differ"))
    if there.get("made_from") != made.get("made_from"):
        write_json(directory / FILE, {**there, "source_bytes": made["source_bytes"], "made_from": made["made_from"]})


def _too_few(corpus: str, path: str | None, count: int, skipped: Mapping[str, int]) -> str:
    remedy = "use one with at least two UTF-8 text files, or give the path of one long file: it is cut into documents"
    return (
        f"data.path = {path!r}: corpus {corpus!r} has {count} different documents of text here "
        f"({describe_skipped({'skipped': skipped})} left out), and some must be held out: {remedy}"
    )


def _share(held_out: float) -> float:
    if not (isinstance(held_out, int | float) and 0 < held_out <= 0.5):
        raise ValueError(f"data.held_out = {held_out!r}: use a share of the documents in (0, 0.5]")
    return float(held_out)


def _key(*of: Any) -> str:
    return hashlib.sha256(json.dumps([VERSION, *of]).encode()).hexdigest()


def _read(file: Path) -> dict[str, Any] | None:
    """A listing's record; None where there is none, or one of another version: it is only a shortcut."""
    try:
        return read_json(file)
    except (OSError, ValueError):
        return None


def _stored(directory: Path) -> bool:
    """Whether the cache has a corpus there; one in the layout of an earlier version is prepared anew, and replaced."""
    found = _read(directory / FILE)
    return (directory / FILE).exists() and (found is None or "shards" in found)


def _root() -> Path:
    return cache_directory() / "corpora"
