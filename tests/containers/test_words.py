"""Codes in 32-bit words: by hand, and against a walk over single bits."""

from __future__ import annotations

import numpy as np
import pytest
from hf_contents import bits_of
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.containers.words import pack_eights, pack_words, unpack_eights, unpack_words


def test_words_of_4_bits_by_hand() -> None:
    assert pack_words(np.arange(8, dtype=np.uint8)[None], 4).view(np.uint32).tolist() == [[0x76543210]]
    assert pack_words(np.full((1, 3), 15, np.uint8), 8).view(np.uint32).tolist() == [[0x0F0F0F]]


def test_words_of_3_bits_by_hand() -> None:
    codes = np.random.default_rng(3).integers(0, 8, 32)
    first = sum(int(codes[i]) << 3 * i for i in range(10)) | (int(codes[10]) & 3) << 30
    second = int(codes[10]) >> 2 | sum(int(codes[i]) << (3 * (i - 10) - 2) for i in range(11, 21)) | (int(codes[21]) & 1) << 31
    third = int(codes[21]) >> 1 | sum(int(codes[i]) << (3 * (i - 21) - 1) for i in range(22, 32))
    assert pack_words(codes[None].astype(np.uint8), 3).view(np.uint32).tolist() == [[first, second, third]]


@given(st.sampled_from([2, 3, 4, 8]), st.integers(1, 5), st.integers(1, 140), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_words_of_any_shape(bits: int, rows: int, columns: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, (rows, columns)).astype(np.uint8)
    words = pack_words(codes, bits)
    assert words.shape == (rows, -(-columns * bits // 32))
    assert bits_of(words[0])[: columns * bits] == [(int(code) >> i) & 1 for code in codes[0] for i in range(bits)]
    assert np.array_equal(unpack_words(words, columns, bits), codes)
    with pytest.raises(ValueError, match="words a row"):
        unpack_words(words, columns + 32, bits)


@given(st.integers(1, 4), st.integers(1, 40), st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_eights_of_any_shape(eights: int, columns: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 16, (8 * eights, columns)).astype(np.uint8)
    words = pack_eights(codes)
    assert words.shape == (columns, eights)
    nibbles = [int(words.view(np.uint32)[-1, -1]) >> 4 * i & 15 for i in range(8)]
    assert nibbles == codes[-8:, -1][[0, 2, 4, 6, 1, 3, 5, 7]].tolist()
    assert np.array_equal(unpack_eights(words), codes)
