"""One part of a corpus as tokens on disk: what a process does that prepares, and nothing that depends on other parts.

    <number>.tokens       ids of every document, one after the other
    <number>.documents    RECORD of each
    <number>.files        a JSON line of each file: [source, version, name]
    <number>.json         counts; it is written last: a part that has it is done

A part that was cut off has no .json and is made anew. Duplicates are found later (lab.data.index): their tokens stay here,
and no document points at them.
"""

import hashlib
import json
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from lab.data.documents import LONGEST_DOCUMENT, Document, Part, too_long
from lab.data.tokenizers import Tokenizer
from lab.records import SCHEMA, write_json

SKIPPED = ("not_text", "empty", "duplicate")
# digest: SHA-256 of the content. key: first 8 bytes of the SHA-256 that decides the split: of the content or, of a pair, of
# its source. spelled: bytes that its tokens stand for, by the tokenizer. number: -1 where the file is the document.
RECORD = np.dtype([("digest", ">u8", (4,)), ("key", "<u8"), ("bytes", "<i8"), ("tokens", "<i8"), ("sources", "<i8"),
                   ("spelled", "<f8"), ("file", "<i8"), ("number", "<i8")])  # fmt: skip
# Bytes of text, or documents, that are tokenized at once.
_TEXT_AT_ONCE, _AT_ONCE = 2**20, 2048

Say = Callable[[int], None]


def stem(directory: Path, number: int) -> Path:
    return directory / f"{number:05d}"


def done(directory: Path, number: int) -> bool:
    return stem(directory, number).with_suffix(".json").exists()


def write_part(part: Part, tokenizer: Tokenizer, directory: Path, number: int, say: Say | None = None) -> None:
    """say: told how many bytes of text were tokenized since the last time."""
    at, token = stem(directory, number), f".{number:05d}.{uuid.uuid4().hex[:8]}"
    temporary = [at.with_name(f"{token}{suffix}") for suffix in (".tokens", ".documents", ".files")]
    skipped: Counter[str] = Counter(dict.fromkeys(SKIPPED, 0))
    files: dict[tuple[str, str, str], int] = {}
    numbered: Counter[str] = Counter()
    count = total = 0
    pairs = False
    try:
        with temporary[0].open("wb") as tokens, temporary[1].open("wb") as documents, temporary[2].open("w") as names:
            for batch in _batches(_numbered(part.read(), numbered)):
                for document in batch:
                    file = (document.source, document.version, document.file)
                    if file not in files:
                        files[file] = len(files)
                        names.write(json.dumps(file) + "\n")
                records, ids = _encode(batch, tokenizer, files, skipped)
                documents.write(records.tobytes())
                for one in ids:
                    tokens.write(one.data if one.flags.c_contiguous else one.tobytes())
                count, total = count + len(records), total + int(records["tokens"].sum())
                pairs = pairs or bool((records["sources"] >= 0).any())
                if say is not None:
                    say(int(records["bytes"].sum()))
        for file in temporary:
            file.replace(at.with_suffix(file.suffix))
    finally:
        for file in temporary:
            file.unlink(missing_ok=True)
    write_json(
        at.with_suffix(".json"),
        {
            "schema": SCHEMA,
            "documents": count,
            "tokens": total,
            "pairs": pairs,
            "skipped": dict(skipped),
            "numbered": dict(numbered),
        },
    )


def _numbered(documents: Iterable[Document], numbered: Counter[str]) -> Iterator[Document]:
    """Counts in `numbered` how many documents of each file there are, those that are skipped among them."""
    for document in documents:
        if document.number is not None:
            numbered[document.file] = document.number + 1
        yield document


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        content = document.content
        size += sum(map(len, content)) if isinstance(content, tuple) else 0 if content is None else len(content)
        if size >= _TEXT_AT_ONCE or len(batch) >= _AT_ONCE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(
    batch: list[Document], tokenizer: Tokenizer, files: dict[tuple[str, str, str], int], skipped: Counter[str]
) -> tuple[np.ndarray, list[np.ndarray]]:
    """RECORD of each document that is kept, and the ids of each text: two of a pair."""
    kept: list[Document] = []
    texts: list[tuple[Document, str | np.ndarray]] = []
    digests, keys, sizes, firsts = [], [], [], []
    for document in batch:
        content = document.content
        if content is None:
            skipped[document.reason] += 1
            continue
        own = content if isinstance(content, tuple) else (content,)
        raws = [_raw(one, document) for one in own]
        if not all(raws):
            skipped["empty"] += 1
            continue
        hashed = hashlib.sha256(raws[0]).digest()
        keys.append(hashed[:8])
        if len(raws) == 2:
            # Hashes are of one length: no two pairs are joined to the same bytes.
            hashed = hashlib.sha256(hashed + hashlib.sha256(raws[1]).digest()).digest()
        digests.append(hashed)
        sizes.append(sum(map(len, raws)))
        firsts.append(len(texts))
        kept.append(document)
        texts += [(document, one) for one in own]
    if not kept:
        return np.zeros(0, RECORD), []
    ids = _ids(texts, tokenizer)
    lengths = np.array([len(one) for one in ids])
    records = np.zeros(len(kept), RECORD)
    records["digest"] = np.frombuffer(b"".join(digests), ">u8").reshape(-1, 4)
    records["key"] = np.frombuffer(b"".join(keys), ">u8")
    records["tokens"] = np.add.reduceat(lengths, firsts)
    records["sources"] = np.where([isinstance(d.content, tuple) for d in kept], lengths[firsts], -1)
    records["spelled"] = np.add.reduceat(_spelled(ids, lengths, tokenizer), firsts)
    # Ids that came as such have no bytes but what they stand for.
    raw = [isinstance(document.content, np.ndarray) for document in kept]
    records["bytes"] = np.where(raw, np.rint(records["spelled"]), sizes)
    records["file"] = [files[d.source, d.version, d.file] for d in kept]
    records["number"] = [-1 if d.number is None else d.number for d in kept]
    return records, ids


def _ids(texts: list[tuple[Document, str | np.ndarray]], tokenizer: Tokenizer) -> list[np.ndarray]:
    strings = [text for _, text in texts if isinstance(text, str)]
    encoded = iter(tokenizer.encode_all(strings) if tokenizer.encode_all else map(tokenizer.encode, strings))
    return [next(encoded) if isinstance(text, str) else _checked(document, text, tokenizer) for document, text in texts]


def _spelled(ids: list[np.ndarray], lengths: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """Bytes that the tokens of each text stand for."""
    each = tokenizer.token_bytes
    if (each == each[0]).all():
        return each[0] * lengths
    ends = np.cumsum(lengths)
    summed = np.concatenate([[0.0], np.cumsum(each[np.concatenate(ids)])])
    return summed[ends] - summed[ends - lengths]


def _raw(content: str | np.ndarray, document: Document) -> bytes:
    if isinstance(content, np.ndarray):
        return content.tobytes()
    try:
        raw = content.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{document.source} {document.name}: not Unicode text ({error}): mend or remove it") from error
    if len(raw) > LONGEST_DOCUMENT:
        raise too_long(f"{document.source} {document.name}", len(raw))
    return raw


def _checked(document: Document, content: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """The ids in the tokenizer's dtype; ValueError where it has no such ids."""
    if int(content.min()) < 0 or int(content.max()) >= tokenizer.text:
        place = int(np.argmax((content < 0) | (content >= tokenizer.text)))
        raise ValueError(
            f"{document.source} {document.name}: id {int(content[place])} at place {place:,}, and tokenizer {tokenizer.name!r} "
            f"has {tokenizer.text:,} ids: give the tokenizer that these tokens are of"
        )
    return content.astype(tokenizer.dtype)
