"""Text to token ids and back. A tokenizer is one entry in `TOKENIZERS`, or a file that lab.data.subwords reads.

Text tokens are the ids below `text`. Above them come `sep`, `mask`, `pad` and then as many ids as an objective needs for
itself (`special`; lab.spec.Objective.specials): none of them ever occurs in text.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    name: str
    text: int  # how many ids stand for text
    token_bytes: Float[np.ndarray, "text"]  # UTF-8 bytes that each of them stands for
    encode: Callable[[str], np.ndarray]  # text -> dtype [tokens]
    decode: Callable[[ArrayLike], str]  # ids -> text; specials are dropped, broken UTF-8 becomes U+FFFD
    # Several texts at once, where that is quicker than one by one.
    encode_all: Callable[[Sequence[str]], list[np.ndarray]] | None = None
    # What it is made from, by file name: a corpus keeps it beside its tokens.
    files: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def sep(self) -> int:
        """The first input of a target stream; what begins and ends a document."""
        return self.text

    @property
    def mask(self) -> int:
        """Stands for a masked token."""
        return self.text + 1

    @property
    def pad(self) -> int:
        """Fills up; never scored."""
        return self.text + 2

    def special(self, index: int) -> int:
        """An objective's own ids: sentinels, modes."""
        return self.text + 3 + index

    @property
    def dtype(self) -> np.dtype:
        """The narrowest that holds text tokens: how a corpus is stored."""
        return np.min_scalar_type(self.text - 1)


def _encode_bytes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-8"), np.uint8)


def _decode_bytes(tokens: ArrayLike) -> str:
    ids = np.asarray(tokens).reshape(-1)
    return ids[ids < 256].astype(np.uint8).tobytes().decode("utf-8", errors="replace")


TOKENIZERS: dict[str, Tokenizer] = {
    "bytes": Tokenizer(
        name="bytes",
        text=256,
        token_bytes=np.ones(256),
        encode=_encode_bytes,
        decode=_decode_bytes,
    ),
}
