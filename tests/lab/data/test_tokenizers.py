import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.data.tokenizers import TOKENIZERS

BYTES = TOKENIZERS["bytes"]


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
def test_every_tokenizer_keeps_text_and_its_specials_apart(tokenizer):
    tokens = tokenizer.encode("naïve ∑ text\r\n\t🙂")
    assert tokens.dtype == tokenizer.dtype and tokens.max() < tokenizer.sep
    specials = {tokenizer.sep, tokenizer.mask, tokenizer.pad}
    assert len(specials) == 3 and max(specials) < tokenizer.special(0)
    assert np.iinfo(tokenizer.dtype).max >= tokenizer.sep - 1
    assert tokenizer.decode(tokens) == "naïve ∑ text\r\n\t🙂"


@given(st.text())
def test_bytes_are_the_utf8_of_the_text(text):
    tokens = BYTES.encode(text)
    assert tokens.tobytes() == text.encode()
    assert BYTES.decode(tokens) == text
    assert BYTES.token_bytes[tokens].sum() == len(text.encode())


def test_specials_are_dropped_and_broken_text_is_replaced():
    assert BYTES.decode([BYTES.sep, 104, BYTES.mask, 105, BYTES.pad, 259]) == "hi"
    assert BYTES.decode(np.array([[0xC3], [105]], np.int32)) == "\ufffdi"
    assert BYTES.decode([]) == ""
