"""Tokenizers that are files: a tokenizer.json of Hugging Face's `tokenizers`, a .model of sentencepiece.

A tokenizer's name ends in the first digits of its file's SHA-256, so that a run which names it says which one it was. Special
tokens that such a file holds are ids like others, stand for no bytes, and occur in no text: a text that spells one is
encoded as any text.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from lab.cache import cache_directory
from lab.checks import nearest
from lab.data.hub import library
from lab.data.tokenizers import TOKENIZERS, Tokenizer
from lab.records import write_bytes

JSON, MODEL = "tokenizer.json", "tokenizer.model"
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_NAMED = re.compile(r"(bpe|tokenizer|sentencepiece)-\d+-[0-9a-f]{10}")  # as _tokenizer has it
SPACE = "▁"  # sentencepiece's


def find(name: str | Path) -> Tokenizer:
    """A tokenizer of the lab's own, one that this machine has prepared a corpus with, a file's, or a hub name's.

    Raises ValueError where there is none of that name, the file is none, or the library that reads it is not installed.
    """
    name = str(name)
    if name in TOKENIZERS:
        return TOKENIZERS[name]
    kept = cache_directory() / "tokenizers" / name
    if "/" not in name and kept.is_dir():
        return from_directory(kept)
    path = Path(name).expanduser()
    if path.is_dir():
        return from_directory(path)
    if path.exists():
        return read(path)
    if _NAMED.fullmatch(name):
        raise ValueError(
            f"data.tokenizer = {name!r}: its file is not on this machine: copy {kept} from the machine that the text was "
            "prepared on"
        )
    if path.suffix in (".json", ".model") or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ValueError(
            f"data.tokenizer = {name!r}: {nearest(name, list(TOKENIZERS))}, or give a tokenizer.json, a sentencepiece .model "
            "(there is no such file), or a name on the hub, such as openai-community/gpt2"
        )
    return _of_hub(name)


def from_directory(directory: Path) -> Tokenizer:
    for file in (JSON, MODEL):
        if (directory / file).exists():
            return read(directory / file)
    raise ValueError(f"{directory}: no {JSON} and no {MODEL} in it")


def read(path: Path) -> Tokenizer:
    """Raises ValueError, naming the file, where it is no tokenizer."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: can not be read ({error})") from error
    make = _of_json if content.lstrip()[:1] == b"{" else _of_model
    try:
        return make(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def keep(tokenizer: Tokenizer) -> None:
    """So that `find` knows it by its name."""
    directory = cache_directory() / "tokenizers" / tokenizer.name
    for file, content in tokenizer.files.items():
        if not (directory / file).exists():
            write_bytes(directory / file, content)


def train(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """A byte-level BPE of so many ids, trained on these texts; every text comes back from its tokens exactly."""
    library("tokenizers")
    from tokenizers import Tokenizer as Trained
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocabulary < 257:
        raise ValueError(f"vocabulary = {vocabulary}: 256 ids are the bytes: use more, such as 4096")
    trained = Trained(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    trained.train_from_iterator(texts, trainer)
    if trained.get_vocab_size() < vocabulary:
        raise ValueError(
            f"vocabulary = {vocabulary}: this text gives {trained.get_vocab_size()} different ids: use fewer, or more text"
        )
    return _of_json(trained.to_str(pretty=True).encode())


def _of_json(content: bytes) -> Tokenizer:
    library("tokenizers")
    from tokenizers import Tokenizer as Loaded

    try:
        loaded = Loaded.from_str(content.decode("utf-8"))
    except Exception as error:  # the library raises Exception itself
        raise ValueError(f"not a tokenizer of the `tokenizers` library ({error}): use another file") from error
    loaded.no_truncation()
    loaded.no_padding()
    loaded.encode_special_tokens = True
    text = max(loaded.get_vocab(with_added_tokens=True).values(), default=0) + 1
    if text < 2:
        raise ValueError("a vocabulary of less than two ids: use another file")
    token_bytes = _json_bytes(loaded, json.loads(content), text)
    return _tokenizer(
        "bpe" if type(loaded.model).__name__ == "BPE" else "tokenizer",
        {JSON: content},
        token_bytes,
        encode=lambda of: loaded.encode(of, add_special_tokens=False).ids,
        encode_all=lambda texts: (one.ids for one in loaded.encode_batch_fast(texts, add_special_tokens=False)),
        decode=lambda ids: loaded.decode(ids, skip_special_tokens=False),
    )


def _tokenizer(
    kind: str,
    files: dict[str, bytes],
    token_bytes: np.ndarray,
    *,
    encode: Callable[[str], list[int]],
    encode_all: Callable[[list[str]], Iterable[list[int]]],
    decode: Callable[[list[int]], str],
) -> Tokenizer:
    """Of what a library says in lists of ids."""
    text, (content,) = len(token_bytes), files.values()
    dtype = np.min_scalar_type(text - 1)

    def ids(tokens: ArrayLike) -> list[int]:
        of = np.asarray(tokens).reshape(-1)
        return of[of < text].astype(np.int64).tolist()

    return Tokenizer(
        name=f"{kind}-{text}-{hashlib.sha256(content).hexdigest()[:10]}",
        text=text,
        token_bytes=token_bytes,
        encode=lambda of: np.array(encode(of), dtype),
        encode_all=lambda texts: [np.array(one, dtype) for one in encode_all(list(texts))],
        decode=lambda tokens: decode(ids(tokens)),
        files=files,
    )


def _json_bytes(loaded: Any, content: dict[str, Any], text: int) -> np.ndarray:
    """UTF-8 bytes that each id stands for, read off its string: of byte-level vocabularies a character a byte, of others
    the characters' own bytes, where <0x0A> is one byte, ▁ is a space, and ## continues a word. Special tokens (ends of
    documents) stand for none."""
    byte_level = "ByteLevel" in _kinds(content.get("pre_tokenizer")) | _kinds(content.get("decoder"))
    model = content.get("model") or {}
    tokens = {int(number): token for number, token in loaded.get_added_tokens_decoder().items()}
    added = {number: "" if token.special else token.content for number, token in tokens.items()}
    found = np.zeros(text)
    for number in range(text):
        token = added.get(number, loaded.id_to_token(number))
        if token is None:
            continue  # a gap in the vocabulary
        if byte_level and number not in added:
            found[number] = len(token)
        elif model.get("byte_fallback") and _BYTE.fullmatch(token):
            found[number] = 1
        else:
            if number not in added:
                token = token.removeprefix(model.get("continuing_subword_prefix") or "").replace(SPACE, " ")
            found[number] = len(token.encode("utf-8", "surrogatepass"))
    return found


def _kinds(part: Any) -> set[str]:
    """Types of a pre-tokenizer or decoder and, of a sequence, of its members."""
    if not isinstance(part, dict):
        return set()
    members = [*(part.get("pretokenizers") or ()), *(part.get("decoders") or ())]
    return {str(part.get("type"))}.union(*map(_kinds, members))


def _of_model(content: bytes) -> Tokenizer:
    sentencepiece = library("sentencepiece")
    try:
        loaded = sentencepiece.SentencePieceProcessor(model_proto=content)
        text = loaded.get_piece_size()
    except Exception as error:
        raise ValueError(f"neither a tokenizer.json nor a sentencepiece model ({error}): use another file") from error
    if text < 2:
        raise ValueError("a vocabulary of less than two ids: use another file")
    token_bytes = np.zeros(text)
    for number in range(text):
        piece = loaded.id_to_piece(number)
        if loaded.is_byte(number):
            token_bytes[number] = 1
        elif not loaded.is_control(number) and not loaded.is_unknown(number):
            token_bytes[number] = len(piece.replace(SPACE, " ").encode())
    return _tokenizer(
        "sentencepiece",
        {MODEL: content},
        token_bytes,
        encode=loaded.encode,
        encode_all=loaded.encode,
        decode=loaded.decode,
    )


def _of_hub(name: str) -> Tokenizer:
    library("tokenizers")
    from tokenizers import Tokenizer as Loaded

    try:
        loaded = Loaded.from_pretrained(name)
    except Exception as error:
        raise ValueError(
            f"data.tokenizer = {name!r}: the hub has no such tokenizer or can not be reached ({type(error).__name__}: {error}): "
            "check the name, or fetch its tokenizer.json elsewhere and give that file"
        ) from error
    return _of_json(loaded.to_str(pretty=True).encode())
