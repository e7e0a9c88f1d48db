"""The character tokenizer: a bijection between texts over its symbols and id arrays."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swe_prune.data import CharTokenizer
from swe_prune.errors import InputError


@given(st.lists(st.text(), min_size=1).filter(any))
def test_encode_and_decode_invert_each_other(texts):
    tokenizer = CharTokenizer.from_texts(texts)
    for text in texts:
        ids = tokenizer.encode(text)
        assert ids.shape == (len(text),)
        assert tokenizer.decode(ids) == text
    every_id = np.arange(tokenizer.vocab_size)
    np.testing.assert_array_equal(tokenizer.encode(tokenizer.decode(every_id)), every_id)


@given(st.text(min_size=1))
def test_vocabulary_is_the_sorted_set_of_symbols(text):
    tokenizer = CharTokenizer.from_texts([text])
    assert list(tokenizer.symbols) == sorted(set(text))
    assert tokenizer.vocab_size == len(set(text))
    assert CharTokenizer.from_texts([*text[::-1]]) == tokenizer


@pytest.mark.parametrize(("size", "dtype"), [(1, "uint8"), (256, "uint8"), (257, "uint16")])
def test_ids_take_the_smallest_unsigned_dtype(size, dtype):
    text = "".join(chr(0x4E00 + i) for i in range(size))
    tokenizer = CharTokenizer.from_texts([text])
    ids = tokenizer.encode(text)
    assert ids.dtype == dtype
    np.testing.assert_array_equal(ids, np.arange(size))


@pytest.mark.parametrize("symbol", ["a", "m", "z", "\U0001f600"])  # below, within and above
def test_an_unseen_symbol_is_named_with_its_place(symbol):
    tokenizer = CharTokenizer.from_texts(["bcdklnop"])
    with pytest.raises(InputError, match=f"symbol '{symbol}' at character 3 .*remove it"):
        tokenizer.encode(f"bcd{symbol}")


@pytest.mark.parametrize("ids", [[-1], [0, 4]])
def test_an_id_outside_the_vocabulary_is_refused(ids):
    with pytest.raises(InputError, match="do not fit the tokenizer's 4 symbols"):
        CharTokenizer("abcd").decode(ids)


@pytest.mark.parametrize("symbols", ["", "ba", "aab"])
def test_symbols_must_be_sorted_and_unique(symbols):
    with pytest.raises(InputError, match="must be sorted and unique"):
        CharTokenizer(symbols)
