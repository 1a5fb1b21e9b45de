"""Blocks of GGUF files: every byte pattern survives, and codes and params are those that single bits say, one by one."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble import kernels
from nybble.files import gguf_blocks
from nybble.files.gguf import BY_NAME
from nybble.files.gguf_blocks import LAYOUTS, join, split
from nybble.formats import QTensor, parse_format


def blocks_of(name: str, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Random bytes of rows of blocks."""
    layout = LAYOUTS[name]
    size = columns // layout.weights * layout.bytes
    return np.random.default_rng(seed).integers(0, 256, (rows, size), dtype=np.uint8)


def half(block: bytes, at: int) -> float:
    return float(np.frombuffer(block, np.float16, 1, at)[0])


def nibble(block: bytes, at: int, column: int, run: int) -> int:
    """The 4 bits of a column, where of every `run` columns the low halves of bytes come first."""
    byte = block[at + column // run * (run // 2) + column % (run // 2)]
    return byte >> 4 if column % run >= run // 2 else byte & 15


def crumb(block: bytes, at: int, column: int) -> int:
    return block[at + column // 128 * 32 + column % 32] >> (2 * (column % 128 // 32)) & 3


def plane(block: bytes, at: int, column: int) -> int:
    return block[at + column % 32] >> (column // 32) & 1


def pair(block: bytes, at: int, j: int) -> tuple[int, int]:
    """The j-th multiplier and that of its minimum in q4_k's 12 bytes."""
    if j < 4:
        return block[at + j] & 63, block[at + j + 4] & 63
    low = block[at + j + 4]
    return low & 15 | block[at + j - 4] >> 6 << 4, low >> 4 | block[at + j] >> 6 << 4


def six_of_q3(block: bytes, j: int) -> int:
    low = block[96 + j % 8] >> (4 * (j // 8)) & 15
    return low | (block[104 + j % 4] >> (2 * (j // 4)) & 3) << 4


def six_of_iq4_xs(block: bytes, j: int) -> int:
    high = int.from_bytes(block[2:4], "little")
    return block[4 + j // 2] >> (4 * (j % 2)) & 15 | (high >> (2 * j) & 3) << 4


CODES: dict[str, Callable[[bytes, int], int]] = {
    "q4_0": lambda b, i: nibble(b, 2, i, 32),
    "q4_1": lambda b, i: nibble(b, 4, i, 32),
    "q5_0": lambda b, i: nibble(b, 6, i, 32) | (int.from_bytes(b[2:6], "little") >> i & 1) << 4,
    "q5_1": lambda b, i: nibble(b, 8, i, 32) | (int.from_bytes(b[4:8], "little") >> i & 1) << 4,
    "q8_0": lambda b, i: int.from_bytes(b[2 + i : 3 + i], "little", signed=True) + 128,
    "iq4_nl": lambda b, i: nibble(b, 2, i, 32),
    "mxfp4": lambda b, i: nibble(b, 1, i, 32),
    "q2_k": lambda b, i: crumb(b, 16, i),
    "q3_k": lambda b, i: crumb(b, 32, i) | plane(b, 0, i) << 2,
    "q4_k": lambda b, i: nibble(b, 16, i, 64),
    "q5_k": lambda b, i: nibble(b, 48, i, 64) | plane(b, 16, i) << 4,
    "q6_k": lambda b, i: nibble(b, 64 * (i // 128), i % 128, 128) | crumb(b, 128, i) << 4,
    "iq4_xs": lambda b, i: nibble(b, 8, i, 32),
}
"""Code of column i of a block."""
HALVES = {
    **{name: {"scale": 0} for name in ("q4_0", "q5_0", "q8_0", "iq4_nl")},
    **{name: {"scale": 0, "shift": 2} for name in ("q4_1", "q5_1")},
    "mxfp4": {},
    "q2_k": {"d": 80, "dmin": 82},
    "q3_k": {"d": 108},
    "q4_k": {"d": 0, "dmin": 2},
    "q5_k": {"d": 0, "dmin": 2},
    "q6_k": {"d": 208},
    "iq4_xs": {"d": 0},
}
"""Param -> where its float16 stands."""
SMALL: dict[str, tuple[int, Callable[[bytes, int], dict[str, int]]]] = {
    "q2_k": (4, lambda b, j: {"scale": b[j] & 15, "min": b[j] >> 4}),
    "q3_k": (6, lambda b, j: {"scale": six_of_q3(b, j)}),
    "q4_k": (6, lambda b, j: dict(zip(("scale", "min"), pair(b, 4, j), strict=True))),
    "q5_k": (6, lambda b, j: dict(zip(("scale", "min"), pair(b, 4, j), strict=True))),
    "q6_k": (8, lambda b, j: {"scale": int.from_bytes(b[192 + j : 193 + j], "little", signed=True)}),
    "iq4_xs": (6, lambda b, j: {"scale": six_of_iq4_xs(b, j)}),
}
"""Name -> (bits of a multiplier, the multipliers of run j of a block)."""


@pytest.mark.parametrize("name", LAYOUTS)
def test_codes_and_params_bit_by_bit(name: str) -> None:
    layout, fmt = LAYOUTS[name], parse_format(name)
    rows, columns = 3, 2 * layout.weights
    stored = blocks_of(name, rows, columns, seed=5)
    codes, params = split(name, stored, columns)
    assert codes.dtype == np.uint8
    runs = layout.weights // fmt.block(columns)
    for row in range(rows):
        for place in range(2):
            block = stored[row, place * layout.bytes : (place + 1) * layout.bytes].tobytes()
            first = place * layout.weights
            assert codes[row, first : first + layout.weights].tolist() == [CODES[name](block, i) for i in range(layout.weights)]
            for suffix, at in HALVES[name].items():
                assert np.array_equal(params[suffix][row, place], np.float16(half(block, at)), equal_nan=True)
            if name == "mxfp4":
                assert params["exponent"][row, place] == block[0]
            if name in SMALL:
                bits, read = SMALL[name]
                for suffix in read(block, 0):
                    array = params[suffix]
                    wide = array if bits == 8 else kernels.unpack(np.ascontiguousarray(array), 2 * runs, bits)
                    expected = [read(block, j)[suffix] for j in range(runs)]
                    assert wide[row, place * runs : (place + 1) * runs].tolist() == expected


@pytest.mark.parametrize("name", LAYOUTS)
def test_arrays_are_those_of_the_format(name: str) -> None:
    fmt, shape = parse_format(name), (5, 512)
    codes, params = split(name, blocks_of(name, *shape), shape[1])
    assert codes.shape == shape
    assert int(codes.max()) == 2**fmt.bits - 1
    stored = QTensor(fmt, codes, params).stored()
    assert {suffix: (array.dtype.name, array.shape) for suffix, array in stored.items()} == fmt.storage(shape)
    assert sum(array.nbytes for array in stored.values()) == blocks_of(name, *shape).nbytes
    kind = BY_NAME[name.upper()]
    assert (kind.weights, kind.bytes) == (LAYOUTS[name].weights, LAYOUTS[name].bytes)


@given(st.sampled_from(sorted(LAYOUTS)), st.integers(1, 9), st.integers(1, 3), st.integers(0, 2**32 - 1))
@settings(max_examples=100, deadline=None)
def test_every_pattern_survives(name: str, rows: int, runs: int, seed: int) -> None:
    columns = runs * LAYOUTS[name].weights
    stored = blocks_of(name, rows, columns, seed)
    codes, params = split(name, stored, columns)
    assert np.array_equal(join(name, codes, params), stored)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_value_of_every_byte_survives(name: str) -> None:
    """Each byte of a block through all its values, on a ground of zeros and on one of ones."""
    size = LAYOUTS[name].bytes
    for ground in (0, 255):
        stored = np.full((size, 256, size), ground, np.uint8)
        for at in range(size):
            stored[at, :, at] = np.arange(256)
        stored = stored.reshape(-1, size)
        codes, params = split(name, stored, LAYOUTS[name].weights)
        assert np.array_equal(join(name, codes, params), stored)


def test_slabs_give_what_one_piece_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAYOUTS:
        stored = blocks_of(name, 40, 256)
        whole, params = split(name, stored, 256)
        with monkeypatch.context() as patch:
            patch.setattr(gguf_blocks, "SLAB_BLOCKS", 24)
            part, again = split(name, stored, 256)
            assert np.array_equal(part, whole)
            assert all(
                np.array_equal(again[suffix], array, equal_nan=array.dtype.kind == "f") for suffix, array in params.items()
            )
            assert np.array_equal(join(name, whole, params), stored)


def test_other_params_are_refused() -> None:
    codes, params = split("q4_1", blocks_of("q4_1", 2, 64), 64)
    with pytest.raises(ValueError, match=r"shift of q4_1 is float32 \(2, 2\), not float16 \(2, 2\)"):
        join("q4_1", codes, {**params, "shift": params["shift"].astype(np.float32)})
    with pytest.raises(ValueError, match=r"scale of q4_1 is float16 \(2, 1\), not float16 \(2, 2\)"):
        join("q4_1", codes, {**params, "scale": params["scale"][:, :1]})


@pytest.mark.parametrize("name", LAYOUTS)
def test_ten_megabytes_take_less_than_a_second(name: str) -> None:
    """Some hundred MB a second were measured; a loop over blocks would take minutes."""
    stored = blocks_of(name, 10_000_000 // (1024 // LAYOUTS[name].weights * LAYOUTS[name].bytes), 1024)
    started = time.perf_counter()
    codes, params = split(name, stored, 1024)
    join(name, codes, params)
    assert time.perf_counter() - started < 2.0


@pytest.fixture(scope="module")
def gguf() -> Any:
    return pytest.importorskip("gguf", reason="needs the gguf package (pip install gguf), whose decoder is the judge")


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning", "ignore:overflow encountered:RuntimeWarning")
def test_the_gguf_package_decodes_the_same_floats(name: str, gguf: Any) -> None:
    stored = blocks_of(name, 512, 512, seed=11)
    if name == "mxfp4":
        stored[:, ::17] %= 250
    codes, params = split(name, stored, 512)
    ours = QTensor(parse_format(name), codes, params).decode()
    theirs = gguf.dequantize(stored, gguf.GGMLQuantizationType[name.upper()])
    finite = np.isfinite(ours)
    assert np.array_equal(finite, np.isfinite(theirs))
    assert finite.mean() > 0.9
    assert np.array_equal(ours.view(np.uint32)[finite], theirs.view(np.uint32)[finite])
