"""Golden bytes: what the default variants store for two fixed matrices. A change here breaks every file written before.

The matrix [N, K] holds ((37 i mod 101) - 50) / 64 for i = 0, 1, ... in row order: exact in every floating type.
"""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from numpy.typing import NDArray

from nybble.formats import QTensor, parse_format

SMALL = {
    "fp32": {
        "values": "000048bf000050be0000c03e000020bf000040bd0000083f0000f0be0000"
        "e03d0000303f0000a0be0000883e00003cbf000020be0000d83e000014bf",
    },
    "fp16": {
        "values": "40ba80b2003600b900aa403880b7002f803900b54034e0b900b1c036a0b8",
    },
    "bf16": {
        "values": "48bf50bec03e20bf40bd083ff0bee03d303fa0be883e3cbf20bed83e14bf",
    },
    "int8:tensor": {
        "codes": "015fbd1a78d63492f04dab0967c522",
        "scale": "2793c93b",
    },
    "int8:tensor,asym": {
        "codes": "0065c91b80e4379bff52b6096dd124",
        "scale": "bdbcbc3b",
        "zero": "88",
    },
    "int8:channel": {
        "codes": "015fbd1a78e22994ff46ae0165c91c",
        "scale": "2793c93bc662b13bf67abd3b",
    },
    "int4:g64": {
        "codes": "612b083df9051bc702",
        "scale": "252f4a2eb72e",
    },
    "int4:g64,asym": {
        "codes": "702f090df7020df803",
        "scale": "ef2cef2cef2c",
        "zero": "0a060a",
    },
    "nf4:g64": {
        "codes": "401c061ef9030bd501",
        "scale": "403a8039e039",
    },
    "nf4:g64,dq": {
        "codes": "401c061ef9030bd501",
        "scale_codes": "ff007f",
        "scale_scale": "0000403d",
        "scale_offset": "00003c3f",
    },
    "fp4:g64": {
        "codes": "fba509a2360db45f0a",
        "scale": "403a8039e039",
    },
    "int3:g64": {
        "codes": "5945163fcd2c",
        "scale": "2b345633d633",
    },
    "int2:g64": {
        "codes": "6902e702e601",
        "scale": "403a8039e039",
    },
}
"""Stored arrays of the [3, 5] matrix, little-endian, in the order of the file."""

LARGE = {
    "fp32": "964229cbe10a44c6",
    "fp16": "5ca490bf0170f5ca",
    "bf16": "9c50235076af36b7",
    "int8:tensor": "aa8cd4ff773eed5b",
    "int8:tensor,asym": "c939f3ff9ab95d14",
    "int8:channel": "843410777ba80106",
    "int4:g64": "61688480af21f399",
    "int4:g64,asym": "90c11dd0185c539c",
    "nf4:g64": "8a93d14104f501cc",
    "nf4:g64,dq": "b246028cf7a5c9b0",
    "fp4:g64": "fcd76ab416fd7f31",
    "int3:g64": "31ec5fa69a2b62b5",
    "int2:g64": "a954fbf9363c3341",
}
"""First half of the SHA-256 of all stored bytes of the [40, 172] matrix, which has short tails and full groups."""

GGML_SMALL = {
    "q4_0": {
        "codes": "602cd8935f0bc6824efab5713de8a46f",
        "scale": "402e",
    },
    "q4_1": {
        "codes": "602bd7935e0ac6823df9b5612ce8945f",
        "scale": "ab2e",
        "shift": "40ba",
    },
    "q5_0": {
        "codes": "80e1f1b6915ed5d03281fcccbfac70bac48ee867",
        "scale": "402a",
    },
    "q5_1": {
        "codes": "60ddf1b4913dd5c03081fb4cafac68b9408ee85f",
        "scale": "742a",
        "shift": "40ba",
    },
    "q8_0": {
        "codes": "015fbd1a78d63492f04dab0967c52280de3b99f755b3106ecc2a88e643a1ff5c",
        "scale": "4d1e",
    },
    "iq4_nl": {
        "codes": "501ce7934f1bd6823efac5612de9a35f",
        "scale": "a61e",
    },
    "mxfp4": {
        "codes": "bfe5692ec7f45a0ed6724cafe6613db7",
        "exponent": "7c",
    },
}
"""One block of ggml's formats: the [1, 32] matrix, as ggml itself rounds it but for iq4_nl."""

GGML_LARGE = {
    "q4_0": ("24a7cbd69922bffc", "d7dca835080cb11c"),
    "q4_1": ("7304cabb825029c0", "59be74be55d49218"),
    "q5_0": ("54c7d3465279cfaa", "8ee89158b23c453e"),
    "q5_1": ("f3f7feab9c525432", "c62b14593f507ce6"),
    "q8_0": ("83c09a17d2a6c33e", "0eb0387b266d86ab"),
    "iq4_nl": ("415c1a0296a09463", "75b4a57e93e585c1"),
    "mxfp4": ("fa66682342cf10f2", "fa66682342cf10f2"),
    "q2_k": ("4035db60a784d062", "2da60e199fdae721"),
    "q3_k": ("0271fa400f190959", "a43f17a7c0ce8948"),
    "q4_k": ("212a426b0b313405", "310c222318d17d95"),
    "q5_k": ("3aba3ce29f6b5ad8", "270bb7d049365aa0"),
    "q6_k": ("df272e070539fc0d", "15145b2ef4aafa14"),
    "iq4_xs": ("c4494fd745d580c1", "e77d7e48c77959e1"),
}
"""The same of a [40, 512] matrix, without importance and with that of `weights_of_columns`. What a search finds is part of it: a
better search may change the bytes of those that are searched, and then they are written anew here."""


def matrix(rows: int, columns: int) -> NDArray[np.float32]:
    return ((np.arange(rows * columns).reshape(rows, columns) * 37 % 101 - 50) / 64).astype(np.float32)


def weights_of_columns() -> NDArray[np.float32]:
    return ((np.arange(512) * 29 % 64 + 1) / 16).astype(np.float32)


def stored_bytes(spec: str, weight: NDArray[np.float32], importance: NDArray[np.float32] | None = None) -> dict[str, bytes]:
    fmt = parse_format(spec)
    stored = QTensor(fmt, *fmt.round(weight, importance)).stored()
    return {name: array.astype(array.dtype.newbyteorder("<")).tobytes() for name, array in stored.items()}


@pytest.mark.parametrize("spec", SMALL)
def test_small(spec: str) -> None:
    found = stored_bytes(spec, matrix(3, 5))
    assert {name: data.hex() for name, data in found.items()} == SMALL[spec]
    assert list(found) == list(SMALL[spec])


@pytest.mark.parametrize("spec", LARGE)
def test_large(spec: str) -> None:
    digest = hashlib.sha256(b"".join(stored_bytes(spec, matrix(40, 172)).values())).hexdigest()
    assert digest[:16] == LARGE[spec]


@pytest.mark.parametrize("spec", SMALL)
def test_bytes_of_an_older_version_are_read(spec: str) -> None:
    fmt = parse_format(spec)
    stored = {
        name: np.frombuffer(bytes.fromhex(SMALL[spec][name]), np.dtype(dtype).newbyteorder("<")).astype(dtype).reshape(shape)
        for name, (dtype, shape) in fmt.storage((3, 5)).items()
    }
    read = QTensor.from_stored(fmt, stored, (3, 5)).decode()
    params = fmt.fit(matrix(3, 5))
    assert read.tolist() == fmt.decode(fmt.encode(matrix(3, 5), params), params).tolist()


@pytest.mark.parametrize("spec", GGML_SMALL)
def test_a_block_of_ggml(spec: str) -> None:
    found = stored_bytes(spec, matrix(1, 32))
    assert {name: data.hex() for name, data in found.items()} == GGML_SMALL[spec]


@pytest.mark.parametrize("spec", GGML_LARGE)
def test_many_blocks_of_ggml(spec: str) -> None:
    weight = matrix(40, 512)
    digests = tuple(
        hashlib.sha256(b"".join(stored_bytes(spec, weight, importance).values())).hexdigest()[:16]
        for importance in (None, weights_of_columns())
    )
    assert digests == GGML_LARGE[spec]
