"""Codes as stored, against numpy: all widths, short and odd shapes, integer and codebook levels, halves and floats."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nybble import kernels
from nybble.kernels import arguments, reference

# The fixture selects an instruction set once for all examples of a test, which is what is wanted here.
many = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, Any]:
    columns = draw(st.integers(1, 200))
    return {
        "rows": draw(st.integers(1, 17)),
        "columns": columns,
        "block": draw(st.sampled_from([1, 3, 7, 8, 16, 24, 32, 64, 128, columns, columns + 5])),
        "codebook": draw(st.booleans()),
        "half": draw(st.booleans()),
        "offsets": draw(st.booleans()),
        "shifted": draw(st.booleans()),
        "one_scale": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**32 - 1)),
    }


def make_weight(bits: int, shape: dict[str, Any]) -> arguments.Packed:
    random = np.random.default_rng(shape["seed"])
    rows, columns, block = shape["rows"], shape["columns"], shape["block"]
    blocks = -(-columns // block)
    count = 1 << bits
    levels = random.normal(size=count) if shape["codebook"] else np.arange(count) - random.integers(0, count)
    parameters = (1, 1) if shape["one_scale"] and blocks == 1 else (rows, blocks)
    dtype = np.float16 if shape["half"] else np.float32
    codes = random.integers(0, count, (rows, columns), dtype=np.uint8)
    packed = np.empty((rows, kernels.row_bytes(columns, bits)), dtype=np.uint8)
    reference.pack(codes, packed, bits)
    offset = (random.normal(size=parameters) * 3).astype(dtype) if shape["offsets"] else None
    scale = random.normal(size=parameters).astype(dtype)
    return arguments.weight(packed, columns, bits, levels.astype(np.float32), block, scale, offset, shape["shifted"])


def decoded(weight: arguments.Packed) -> np.ndarray:
    out = np.empty((weight.packed.shape[0], weight.columns), dtype=np.float32)
    reference.decode(weight, out)
    return out


@pytest.mark.parametrize("bits", range(1, 9))
def test_streams_put_the_first_code_in_the_lowest_bits(bits: int, instruction_set: str) -> None:
    codes = (np.arange(13) % (1 << bits)).astype(np.uint8)[None, :]
    word = sum(int(code) << (k * bits) for k, code in enumerate(codes[0]))
    assert kernels.pack(codes, bits).tobytes() == word.to_bytes(kernels.row_bytes(13, bits), "little")


@pytest.mark.parametrize("bits", range(1, 9))
@many
@given(shape=shapes())
def test_pack_and_unpack(bits: int, instruction_set: str, shape: dict[str, Any]) -> None:
    random = np.random.default_rng(shape["seed"])
    codes = random.integers(0, 1 << bits, (shape["rows"], shape["columns"]), dtype=np.uint8)
    wanted = np.empty((shape["rows"], kernels.row_bytes(shape["columns"], bits)), dtype=np.uint8)
    reference.pack(codes, wanted, bits)
    packed = kernels.pack(codes, bits)
    np.testing.assert_array_equal(packed, wanted)
    np.testing.assert_array_equal(kernels.unpack(packed, shape["columns"], bits), codes)
    back = np.empty_like(codes)
    reference.unpack(packed, back, bits)
    np.testing.assert_array_equal(back, codes)


@pytest.mark.parametrize("bits", range(1, 9))
@many
@given(shape=shapes())
def test_decode_and_gather_are_equal_to_the_bit(bits: int, instruction_set: str, shape: dict[str, Any]) -> None:
    weight = make_weight(bits, shape)
    wanted = decoded(weight)
    np.testing.assert_array_equal(kernels.decode(*weight), wanted)
    rows = np.random.default_rng(shape["seed"]).integers(0, shape["rows"], 5)
    np.testing.assert_array_equal(kernels.gather(rows, *weight), wanted[rows])


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_decode_does_not_depend_on_threads(bits: int, instruction_set: str) -> None:
    shape = {"rows": 3000, "columns": 172, "block": 64, "seed": 5}
    shape |= {"codebook": False, "half": True, "offsets": True, "shifted": bits == 4, "one_scale": False}
    weight = make_weight(bits, shape)
    alone = kernels.decode(*weight, threads=1)
    for threads in (2, 3, 16):
        np.testing.assert_array_equal(kernels.decode(*weight, threads=threads), alone)


def test_all_halves_are_widened_exactly(instruction_set: str) -> None:
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)].reshape(1, -1)  # subnormals and both zeros are among them
    columns = halves.shape[1]
    packed = np.full((1, kernels.row_bytes(columns, 1)), 0xFF, dtype=np.uint8)
    got = kernels.decode(packed, columns, 1, np.array([0, 1], dtype=np.float32), 1, halves)
    np.testing.assert_array_equal(got.view(np.uint32), halves.astype(np.float32).view(np.uint32))


def test_infinite_and_nan_scales_come_out_as_they_are(instruction_set: str) -> None:
    scale = np.array([[np.inf, -np.inf, np.nan, 1]], dtype=np.float16)
    packed = np.full((1, 4), 0xFF, dtype=np.uint8)
    got = kernels.decode(packed, 32, 1, np.array([0, 1], dtype=np.float32), 8, scale)
    np.testing.assert_array_equal(got[0, ::8], [np.inf, -np.inf, np.nan, 1])


def test_empty_arrays(instruction_set: str) -> None:
    levels = np.arange(16, dtype=np.float32)
    assert kernels.pack(np.empty((0, 5), dtype=np.uint8), 4).shape == (0, 3)
    assert kernels.pack(np.empty((3, 0), dtype=np.uint8), 4).shape == (3, 0)
    none = np.empty((0, 3), dtype=np.uint8)
    assert kernels.decode(none, 5, 4, levels, 5, np.empty((0, 1), dtype=np.float32)).shape == (0, 5)
    one = np.ones((2, 3), dtype=np.uint8)
    scale = np.ones((1, 1), dtype=np.float32)
    assert kernels.decode(one, 5, 4, levels, 5, scale).shape == (2, 5)
    assert kernels.gather(np.empty(0, dtype=np.int64), one, 5, 4, levels, 5, scale).shape == (0, 5)


def test_bandwidth_is_a_plausible_figure(instruction_set: str) -> None:
    for threads in (1, 2):
        figure = kernels.read_bandwidth(4 << 20, threads=threads, repeats=3)
        assert 1e8 < figure < 1e13
