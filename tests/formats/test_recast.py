"""A tensor in another format: the same values where the other holds them, else the nearest, and the loss told truly."""

from __future__ import annotations

import numpy as np
import pytest

from nybble.errors import UsageError
from nybble.formats import QTensor, parse_format
from nybble.formats.recast import compare, recast


def tensor(spec: str, rows: int = 6, columns: int = 512, seed: int = 0) -> QTensor:
    fmt = parse_format(spec)
    weight = np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)
    weight[1] = 0
    return QTensor(fmt, *fmt.round(weight))


EXACT = [
    ("int4:g64", "int4:g32"),
    ("int4:g64", "int4:g64,asym"),
    ("int4:g64", "q4_0"),
    ("int4:g32", "q4_0"),
    ("q4_0", "int4:g32"),
    ("int3:g64", "int4:g64"),
    ("int3:g64", "q4_0"),
    ("int5:g128", "q5_0"),
    ("int8:g32", "q8_0"),
    ("q8_0", "int8:g32"),
    ("int6:g64", "q8_0"),
    ("int4:g32,asym", "int8:g32,asym"),
    ("int8:tensor", "int8:channel"),
    ("nf4:g64", "nf4:g32"),
    ("int3:g64,asym", "q4_0"),  # codes less their zero points
    ("int4:g32,asym", "q5_0"),
    ("int6:g64,asym", "q8_0"),
    ("q4_0", "q4_1"),  # the shift is eight scales, a power of two
    ("int4:g64", "fp32"),
    ("q4_k", "fp32"),
]


@pytest.mark.parametrize(("source", "target"), EXACT)
def test_values_that_both_formats_hold_stay(source: str, target: str) -> None:
    before = tensor(source)
    after = recast(before, parse_format(target))
    assert after.exact
    assert after.error == 0
    np.testing.assert_array_equal(after.tensor.decode(), before.decode())


@pytest.mark.parametrize(
    ("source", "target", "least", "most"),
    [
        ("int4:channel", "int4:g64", 1e-9, 1e-6),  # float32 scales become halves
        ("int4:g64,asym", "q4_1", 1e-10, 1e-5),  # a shift rounded to half
        ("nf4:g64", "int4:g64", 1e-3, 3e-2),
        ("int8:g32", "q4_k", 1e-3, 2e-2),
        ("q6_k", "int4:g32", 1e-3, 2e-2),
        ("int4:g64", "int4:channel", 1e-3, 3e-2),
        ("fp16", "int8:g32", 1e-6, 1e-4),
    ],
)
def test_loss_is_measured(source: str, target: str, least: float, most: float) -> None:
    before = tensor(source)
    after = recast(before, parse_format(target))
    assert not after.exact
    old, new = before.decode().astype(np.float64), after.tensor.decode().astype(np.float64)
    assert after.error == pytest.approx(float(((new - old) ** 2).sum() / (old**2).sum()), rel=1e-5)
    assert least < after.error < most
    assert after.energy == pytest.approx(float((old**2).sum()), rel=1e-5)


def test_codes_are_carried_not_found_again() -> None:
    """Codes that a method chose, which rounding would not choose again, survive."""
    fmt = parse_format("int4:g64")
    plain = tensor("int4:g64")
    codes = plain.codes.copy()
    codes[:, ::7] = (codes[:, ::7] + 3) % 16
    moved = recast(QTensor(fmt, codes, plain.params), parse_format("q4_0"))
    np.testing.assert_array_equal(moved.tensor.codes, codes)
    assert moved.exact


def test_the_better_of_carried_and_rounded() -> None:
    """Where the grid does not fit, the result is never worse than rounding the decoded weight."""
    for source, target in (("int4:channel", "int4:g64"), ("int4:g64,asym", "q4_1"), ("int4:tensor", "int4:g32,asym")):
        before = tensor(source)
        fmt = parse_format(target)
        rounded = compare(before.decode(), QTensor(fmt, *fmt.round(before.decode())))
        assert recast(before, fmt).error <= rounded.error


def test_rows_that_a_format_cannot_hold() -> None:
    with pytest.raises(UsageError, match="q4_k holds rows of a multiple of 256 columns, not 320"):
        recast(tensor("int4:g64", columns=320), parse_format("q4_k"))
