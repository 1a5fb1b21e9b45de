"""Scales and shifts kept as whole numbers of shared halves: the same products, to the bit, as the same numbers as floats."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nybble import kernels
from nybble.formats import parse_format
from nybble.kernels import Nested

SPECS = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs")
SHAPES = ((1, 256), (16, 256), (37, 512), (50, 1024))


def weight(spec: str, rows: int, columns: int) -> tuple[Any, Any, Any]:
    fmt = parse_format(spec)
    values = np.random.default_rng(rows).normal(size=(rows, columns)).astype(np.float32)
    values[0] = 0
    codes, params = fmt.round(values)
    return fmt, kernels.pack(codes, fmt.bits), params


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.usefixtures("instruction_set")
def test_products_are_those_of_floats(spec: str, shape: tuple[int, int]) -> None:
    rows, columns = shape
    fmt, packed, params = weight(spec, rows, columns)
    levels, block = np.ascontiguousarray(fmt.levels), fmt.block(columns)
    scale, offset = fmt.kernel_grid(params)
    plain = kernels.lay(packed, columns, fmt.bits, levels, block, scale, offset, fmt.shifted)
    inner = fmt.kernel_parameters(params)
    nested = kernels.lay(packed, columns, fmt.bits, levels, block, *inner, fmt.shifted)
    assert nested.holds_codes
    assert nested.nbytes < plain.nbytes
    for count in (1, 3, 4, 8, 13, 40):
        x = np.random.default_rng(count).normal(size=(count, columns)).astype(np.float32)
        for exact in (True, False):
            np.testing.assert_array_equal(kernels.product(x, nested, exact), kernels.product(x, plain, exact))
    ids = np.arange(rows, dtype=np.int64)
    np.testing.assert_array_equal(kernels.rows_of(nested, ids), kernels.rows_of(plain, ids))
    np.testing.assert_array_equal(kernels.rows_of(nested, ids), fmt.decode(kernels.unpack(packed, columns, fmt.bits), params))
    again = np.empty_like(packed)
    nested.restore(again, None, None, 1)
    np.testing.assert_array_equal(again, packed)


def test_what_nested_stands_for() -> None:
    outer = np.array([[0.5, -2.0]], np.float16)
    codes = np.array([[0, 1, 63, 32, 5, 6, 7, 8]], np.uint8)
    np.testing.assert_array_equal(Nested(codes, 32, outer).floats(), [[-16.0, -15.5, 15.5, 0.0, 54.0, 52.0, 50.0, 48.0]])


@pytest.mark.parametrize(
    ("codes", "outer"),
    [((4, 8), (4, 3)), ((4, 16), (4, 1)), ((3, 8), (4, 1)), ((4, 8), (3, 1)), ((4, 8), (4, 0))],
)
def test_shapes_that_do_not_fit(codes: tuple[int, int], outer: tuple[int, int]) -> None:
    packed = np.zeros((4, 128), np.uint8)
    scale = Nested(np.zeros(codes, np.uint8), 0, np.zeros(outer, np.float16))
    with pytest.raises(ValueError, match="nested scale has codes"):
        kernels.lay(packed, 256, 4, np.arange(16, dtype=np.float32), 32, scale, None)


def test_types_and_biases() -> None:
    packed, levels = np.zeros((4, 128), np.uint8), np.arange(16, dtype=np.float32)
    outer = np.zeros((4, 1), np.float16)
    with pytest.raises(ValueError, match="codes of scale must be uint8"):
        kernels.lay(packed, 256, 4, levels, 32, Nested(np.zeros((4, 8), np.int8), 0, outer))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="outer scale must be float16"):
        kernels.lay(packed, 256, 4, levels, 32, Nested(np.zeros((4, 8), np.uint8), 0, outer.astype(np.float32)))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="bias of scale must be a whole number from 0 to 255, got 256"):
        kernels.lay(packed, 256, 4, levels, 32, Nested(np.zeros((4, 8), np.uint8), 256, outer))
