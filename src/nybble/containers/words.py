"""Codes of a few bits in 32-bit words, the first in the lowest bits, without gaps between them or between words: how GPTQ, AWQ
and compressed-tensors lay down codes and zero points, along one axis of a matrix or the other.

It is the order that rows of our own containers have in bytes (`kernels.pack`), taken four bytes at a time, so those kernels do
the work. At 3 bits 32 codes fill 3 words, and one may lie across two of them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nybble.formats import parse_format
from nybble.formats.base import slabs

Codes = NDArray[np.uint8]
Words = NDArray[np.int32]
WORD_BITS = 32
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""AWQ: the i-th nibble of a word holds this one of its eight rows."""


def word_count(columns: int, bits: int) -> int:
    """Words that a row of `columns` codes takes."""
    return -(-columns * bits // WORD_BITS)


def pack_words(codes: Codes, bits: int) -> Words:
    """int32 [R, word_count(C, bits)] of codes uint8 [R, C], packed along their rows; what is over in the last word is 0."""
    packed = parse_format(f"int{bits}:channel").to_storage(codes, {})["codes"]
    rows, size = packed.shape
    padded = np.zeros((rows, 4 * word_count(codes.shape[1], bits)), np.uint8)
    padded[:, :size] = packed
    return padded.view("<i4").astype(np.int32, copy=False)


def unpack_words(words: Words, columns: int, bits: int) -> Codes:
    """uint8 [R, columns]: undoes `pack_words`. Raises ValueError for another number of words."""
    if words.shape[1] != word_count(columns, bits):
        raise ValueError(f"{words.shape[1]} words a row; {columns} codes of {bits} bits take {word_count(columns, bits)}")
    fmt = parse_format(f"int{bits}:channel")
    size = fmt.storage((1, columns))["codes"][1][1]
    codes = np.empty((words.shape[0], columns), np.uint8)
    for part in slabs(codes.shape):
        packed = np.ascontiguousarray(words[part], dtype="<i4").view(np.uint8)[:, :size]
        codes[part] = fmt.from_storage({"codes": packed}, codes[part].shape)[0]
    return codes


def pack_eights(codes: Codes) -> Words:
    """int32 [C, R/8] of 4-bit codes uint8 [R, C], R a multiple of 8: turned, and packed as AWQ does."""
    turned = np.empty((codes.shape[1], codes.shape[0]), np.uint8)
    for place, row in enumerate(ORDER):
        turned[:, place::8] = codes[row::8].T
    return pack_words(turned, 4)


def unpack_eights(words: Words) -> Codes:
    """uint8 [R, C]: undoes `pack_eights`."""
    codes = np.empty((8 * words.shape[1], words.shape[0]), np.uint8)
    for part in slabs((words.shape[0], len(codes))):
        turned = unpack_words(words[part], len(codes), 4)
        for place, row in enumerate(ORDER):
            codes[row::8, part] = turned[:, place::8].T
    return codes
