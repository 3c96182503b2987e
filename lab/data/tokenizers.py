"""Text to token ids and back. A tokenizer is one entry in `TOKENIZERS`.

Text tokens are the ids below `sep`; `sep`, `mask` and `pad` never occur in text.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    name: str
    V: int  # ids the model embeds and predicts, the specials among them
    sep: int  # the first input of a target stream
    mask: int  # stands for a masked token
    pad: int  # fills up; never scored
    dtype: type[np.unsignedinteger]  # the narrowest that holds text tokens: how a corpus is stored
    bytes_per_token: float  # UTF-8 bytes of text a text token stands for: bits per byte = nats / (ln 2 * this)
    encode: Callable[[str], np.ndarray]  # text -> dtype [tokens]
    decode: Callable[[ArrayLike], str]  # ids -> text; specials are dropped, broken UTF-8 becomes U+FFFD


def _encode_bytes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-8"), np.uint8)


def _decode_bytes(tokens: ArrayLike) -> str:
    ids = np.asarray(tokens).reshape(-1)
    return ids[ids < 256].astype(np.uint8).tobytes().decode("utf-8", errors="replace")


TOKENIZERS: dict[str, Tokenizer] = {
    # 256 bytes and 3 specials, rounded up to a multiple of 4 so that embedding and head split evenly over 2 or 4
    # devices. Id 259 is never used; a rounder 384 would cost small models half of their head's FLOPs again.
    "bytes": Tokenizer(
        name="bytes",
        V=260,
        sep=256,
        mask=257,
        pad=258,
        dtype=np.uint8,
        bytes_per_token=1.0,
        encode=_encode_bytes,
        decode=_decode_bytes,
    ),
}
