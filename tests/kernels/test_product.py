"""Products with weights in the kernel layout: against numpy within a bound, and equal to the bit whatever runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from nybble import kernels
from nybble.kernels import reference
from nybble.kernels.arguments import BLOCK, Floats, Packed, Parameter

ROUNDING = 2.0**-24
"""Largest relative error of one float32 operation."""
TINIEST = 2.0**-149
COUNTS = (1, 2, 3, 4, 5, 8, 9, 16, 33)
COLUMNS = (1, 31, 33, 44, 64, 172, 768)
ROWS = (1, 15, 16, 17, 50)
BLOCKS = (16, 32, 64, 96, 1 << 20, 0)
"""Columns that share a scale: the row from 1 << 20 on, the whole weight for 0."""

Walk = Callable[[], Iterator[str]]
Rows = NDArray[np.float64]


def decoded(weight: Packed) -> Floats:
    out = np.empty((weight.packed.shape[0], weight.columns), dtype=np.float32)
    reference.decode(weight, out)
    return out


def stored_codes(weight: Packed) -> NDArray[np.uint8]:
    out = np.empty((weight.packed.shape[0], weight.columns), dtype=np.uint8)
    reference.unpack(weight.packed, out, weight.bits)
    return out


def exact_bound(x: Floats, w: Floats) -> Rows:
    """Two sums of K / 2 fused products each, one addition of the two, one rounding of the reference to float32."""
    operations = -(-x.shape[1] // 2) + 2
    return 1.01 * operations * (ROUNDING * (np.abs(x).astype(np.float64) @ np.abs(w).astype(np.float64).T) + TINIEST)


def fast_bound(x: Floats, weight: Packed) -> Rows:
    """Sums of a part are whole numbers and exact. Then come at most 8 fused products a block of 64 columns (4 parts, each
    with its scale and its shift), one for the block, and 5 roundings: of the shift, the table's step, the scale after it,
    the last product and the reference."""
    codes, scale = kernels.quantize_activations(x)
    wide = np.abs(codes).astype(np.float64) * np.repeat(scale.astype(np.float64), BLOCK, axis=1)

    def spread(parameter: Parameter) -> Rows:
        return np.repeat(np.abs(parameter.astype(np.float64)), weight.block, axis=1)[:, : weight.columns]

    numbers = np.abs(weight.levels.astype(np.float64))[stored_codes(weight)]
    if weight.offset is not None and not weight.shifted:
        numbers = numbers + spread(weight.offset)
    numbers = numbers * spread(weight.scale)
    if weight.offset is not None and weight.shifted:
        numbers = numbers + spread(weight.offset)
    terms = wide[:, : weight.columns] @ numbers.T
    operations = 8 + -(-weight.columns // BLOCK) + 5
    # A table's rounded levels may be larger than its own by half a step of 1 / 127.
    return 1.02 * operations * (ROUNDING * terms + TINIEST)


def fast_of(weight: Packed, x: Floats) -> Floats:
    out = np.empty((len(x), weight.packed.shape[0]), dtype=np.float32)
    reference.Laid(weight).product(x, out, False, 1)
    return out


def activations(columns: int, count: int = 33, seed: int = 0) -> Floats:
    random = np.random.default_rng((seed, columns))
    x = random.normal(size=(count, columns)) * 10.0 ** random.integers(-3, 3, (count, 1))
    return x.astype(np.float32)


def cases(kind: Any, packed: Any) -> Iterator[Packed]:
    """Every block with every K; the numbers of rows take turns, halves and floats too."""
    turn = 0
    for columns in COLUMNS:
        for block in BLOCKS:
            if block >= columns and block != 1 << 20:
                continue
            turn += 1
            yield packed(kind, ROWS[turn % len(ROWS)], columns, block or columns, seed=turn, half=turn % 3 != 0, one=block == 0)


def test_within_the_bound_and_the_same_bits_from_every_instruction_set(kind: Any, packed: Any, each_set: Walk) -> None:
    for weight in cases(kind, packed):
        x = activations(weight.columns)
        wide = decoded(weight)
        exact_wanted, fast_wanted = x.astype(np.float64) @ wide.T.astype(np.float64), fast_of(weight, x)
        about = f"{weight.packed.shape[0]} rows, {weight.columns} columns, block {weight.block}"
        first: dict[bool, Floats] = {}
        for name in each_set():
            laid = kernels.lay(*weight)
            assert laid.holds_codes
            for exact in (True, False):
                got = kernels.product(x, laid, exact)
                if exact not in first:
                    first[exact] = got
                    bound = exact_bound(x, wide) if exact else fast_bound(x, weight)
                    wanted = exact_wanted if exact else fast_wanted
                    over = np.abs(got - wanted) - bound
                    assert (over <= 0).all(), f"{name}, exact {exact}, {about}: over the bound by {over.max()}"
                np.testing.assert_array_equal(got, first[exact], err_msg=f"{name}, exact {exact}, {about}")
                for count in COUNTS[:-1]:
                    alone = kernels.product(x[-count:], laid, exact)
                    np.testing.assert_array_equal(alone, got[-count:], err_msg=f"{name}, exact {exact}, {count} of 33, {about}")


def test_the_bounds_are_tight() -> None:
    """They are of the size of float32 rounding, so that a wrong column or scale cannot hide in them."""
    weight = Packed(
        np.full((4, 384), 0x5A, dtype=np.uint8), 768, 4, np.arange(16, dtype=np.float32) - 8, 64,
        np.ones((4, 12), dtype=np.float16), None,
    )  # fmt: skip
    x = activations(768)
    size = np.abs(x) @ np.abs(decoded(weight)).T
    assert (exact_bound(x, decoded(weight)) < 3e-5 * size).all()
    assert (fast_bound(x, weight) < 4e-6 * size).all()


def whole_activations(columns: int, count: int) -> Floats:
    """Whole numbers from -127 to 127 with 127 in every block of 64: their codes are they themselves, their scales 1."""
    x = np.random.default_rng(columns).integers(-127, 128, (count, columns)).astype(np.float32)
    x[:, ::BLOCK] = 127
    return x


def test_whole_numbers_come_out_exactly(kind: Any, packed: Any, each_set: Walk) -> None:
    if kind.levels == "table" or kind.offset == "any":
        pytest.skip("its values are not whole")
    for columns, block in ((44, 16), (33, 44), (172, 64), (172, 96), (172, 172)):
        weight = packed(kind, 17, columns, block, power=True)
        x = whole_activations(columns, 33)
        codes, scale = kernels.quantize_activations(x)
        np.testing.assert_array_equal(codes[:, :columns], x)
        assert (scale == 1).all()
        wanted = x.astype(np.float64) @ decoded(weight).astype(np.float64).T
        for _ in each_set():
            laid = kernels.lay(*weight)
            for count in COUNTS:
                for exact in (True, False):
                    np.testing.assert_array_equal(kernels.product(x[:count], laid, exact), wanted[:count])


@pytest.mark.parametrize("first", [0, -128, -64])
@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_and_activations_at_their_limits(bits: int, first: int, each_set: Walk) -> None:
    """Sums of products at both ends of both types: nothing saturates or wraps on the way."""
    columns, top = 172, (1 << bits) - 1
    levels = np.arange(1 << bits, dtype=np.float32) + first
    one = np.ones((1, 1), dtype=np.float32)
    x = np.array([[127.0], [-127.0]], dtype=np.float32).repeat(columns, axis=1).repeat(5, axis=0)
    x[4::5, 1::2] *= -1
    codes = np.zeros((4, columns), dtype=np.uint8)
    codes[1], codes[2, ::2], codes[3, 1::2] = top, top, top
    wanted = x.astype(np.float64) @ levels[codes].astype(np.float64).T
    assert np.abs(wanted).max() < 1 << 24
    for _ in each_set():
        laid = kernels.lay(kernels.pack(codes, bits), columns, bits, levels, columns, one)
        for count in (1, 4, 9, 10):
            for exact in (True, False):
                np.testing.assert_array_equal(kernels.product(x[:count], laid, exact), wanted[:count])


def test_what_is_not_finite_stays_in_its_row(kind: Any, packed: Any, each_set: Walk) -> None:
    weight = packed(kind, 33, 172, 64)
    for count in (2, 4, 9, 33):
        clean = activations(172, count)
        for value in (np.nan, np.inf, -np.inf):
            x = clean.copy()
            x[1, 100] = value
            for name in each_set():
                laid = kernels.lay(*weight)
                for exact in (True, False):
                    got, wanted = kernels.product(x, laid, exact), kernels.product(clean, laid, exact)
                    wrong = np.isfinite(got[1]) if exact else ~np.isnan(got[1])
                    if exact and not np.isnan(value):
                        wrong &= decoded(weight)[:, 100] != 0
                    assert not wrong.any(), f"{name}, exact {exact}, {value} among {count} rows was lost"
                    others = np.arange(count) != 1
                    np.testing.assert_array_equal(got[others], wanted[others])


def test_zero_rows_give_zeros_and_no_rows_give_none(kind: Any, packed: Any, each_set: Walk) -> None:
    weight = packed(kind, 17, 172, 64)
    nothing = packed(kind, 0, 172, 64)
    for _ in each_set():
        laid, empty = kernels.lay(*weight), kernels.lay(*nothing)
        for exact in (True, False):
            for count in (1, 4, 9):
                assert (kernels.product(np.zeros((count, 172), dtype=np.float32), laid, exact) == 0).all()
                assert kernels.product(activations(172, count), empty, exact).shape == (count, 0)
            assert kernels.product(np.empty((0, 172), dtype=np.float32), laid, exact).shape == (0, 17)


def test_levels_far_from_zero(each_set: Walk) -> None:
    """Codes whose sums with the first level taken off would not fit 32 bits."""
    levels = np.arange(16, dtype=np.float32) + 1_000_000
    one, x = np.ones((1, 1), dtype=np.float32), np.full((9, 64), 127, dtype=np.float32)
    for _ in each_set():
        laid = kernels.lay(kernels.pack(np.zeros((1, 64), dtype=np.uint8), 4), 64, 4, levels, 64, one)
        for exact in (True, False):
            np.testing.assert_allclose(kernels.product(x, laid, exact), 64 * 127 * 1e6, rtol=1e-6)


def test_columns_that_fill_up_a_unit_do_not_count(each_set: Walk) -> None:
    """Code 0 there stands for -8, and -8 times this scale is no float32 any more: infinity times zero would show."""
    levels, scale = np.arange(16, dtype=np.float32) - 8, np.full((1, 1), 1e38, dtype=np.float32)
    x = np.full((9, 33), 1e-38, dtype=np.float32)
    for _ in each_set():
        laid = kernels.lay(kernels.pack(np.full((1, 33), 9, dtype=np.uint8), 4), 33, 4, levels, 33, scale)
        for count in COUNTS[:7]:
            np.testing.assert_allclose(kernels.product(x[:count], laid), 33, rtol=1e-6)


def test_a_weight_without_columns(python: Callable[..., Any]) -> None:
    """In a process of its own: it divides by the size of a tile."""
    code = """
import numpy as np
from nybble import kernels
one = np.ones((1, 1), dtype=np.float32)
laid = kernels.lay(np.zeros((3, 0), dtype=np.uint8), 0, 4, np.arange(16, dtype=np.float32), 1, one)
for exact in (True, False):
    for count in (1, 4, 9):
        assert (kernels.product(np.zeros((count, 0), dtype=np.float32), laid, exact) == np.zeros((count, 3))).all()
"""
    done = python(code)
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-500:]}"


@pytest.mark.parametrize("block", [16, 32, 96])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("half", [True, False])
def test_scales_as_whole_numbers(half: bool, bits: int, block: int, of_kind: Any, packed: Any, each_set: Walk) -> None:
    """Scales of both signs and all sizes in one row: what the fast mode makes of them, and how far off that is."""
    weight = packed(of_kind(bits), 33, 300, block)
    random = np.random.default_rng(bits)
    scale = random.normal(size=weight.scale.shape) * 2.0 ** random.integers(-12, 1, weight.scale.shape)
    scale[3] = 0
    scale[4] = [-1, *[2.0**-20] * (scale.shape[1] - 1)]
    scale[5] = 0.99999 * 2.0**-3  # no half, and as a whole number one too large
    weight = weight._replace(scale=scale.astype(np.float16 if half else np.float32))
    wide = weight.scale.astype(np.float64)
    top = np.abs(wide).max(1, keepdims=True)
    taken = reference.whole_scales(weight).astype(np.float64)
    assert (np.abs(taken - wide) <= 2.0**-15 * top).all()
    assert not np.array_equal(taken, wide)
    if half:
        near = np.abs(wide) >= top / 16
        np.testing.assert_array_equal(taken[near], wide[near])
    x, first = activations(300), dict[int, Floats]()
    wanted, bound = fast_of(weight, x), fast_bound(x, weight)
    for _ in each_set():
        laid = kernels.lay(*weight)
        for count in COUNTS:
            got = kernels.product(x[:count], laid, False)
            assert (np.abs(got - wanted[:count]) <= bound[:count]).all()
            np.testing.assert_array_equal(got, first.setdefault(count, got))


@pytest.mark.parametrize("value", [np.inf, np.nan, 2.0**100, 2.0**-100])
def test_scales_that_are_no_whole_numbers_are_kept(value: float, of_kind: Any, packed: Any, each_set: Walk) -> None:
    weight = packed(of_kind(4), 33, 172, 32, half=False)
    scale = weight.scale.copy()
    scale[7, :] = value
    weight = weight._replace(scale=scale)
    assert reference.whole_scales(weight) is weight.scale
    x, others, first = activations(172), np.arange(33) != 7, dict[int, Floats]()
    with np.errstate(invalid="ignore"):
        wanted, bound = fast_of(weight, x), fast_bound(x, weight)
    for _ in each_set():
        laid = kernels.lay(*weight)
        for count in COUNTS:
            got = kernels.product(x[:count], laid, False)
            assert (np.abs(got - wanted[:count]) <= bound[:count])[:, others].all()
            assert np.isfinite(value) or not np.isfinite(got[:, 7]).any()
            np.testing.assert_array_equal(got, first.setdefault(count, got))


@pytest.mark.parametrize("half", [True, False])
def test_subnormal_scales(half: bool, of_kind: Any, packed: Any, each_set: Walk) -> None:
    for kind in (of_kind(4), of_kind(8, "from 0", "zero"), of_kind(4, "table")):
        weight = packed(kind, 17, 172, 64)
        small = (np.random.default_rng(1).integers(1, 900, weight.scale.shape) * (2.0**-24 if half else 2.0**-149)).astype(
            np.float16 if half else np.float32
        )
        assert (small > 0).all()
        weight = weight._replace(scale=small)
        x, first = activations(172, 9), dict[bool, Floats]()
        for _ in each_set():
            laid = kernels.lay(*weight)
            np.testing.assert_array_equal(kernels.rows_of(laid, np.arange(17)), decoded(weight))
            for exact, bound in ((True, exact_bound(x, decoded(weight))), (False, fast_bound(x, weight))):
                got = kernels.product(x, laid, exact)
                wanted = x.astype(np.float64) @ decoded(weight).T.astype(np.float64) if exact else fast_of(weight, x)
                # Values this small have few bits: of a weight's, or of an activation's scale times a weight's.
                assert (np.abs(got - wanted) <= bound + (0 if half else np.abs(wanted) * 0.5 + 172 * TINIEST)).all()
                np.testing.assert_array_equal(got, first.setdefault(exact, got))


def test_quantized_activations_are_those_of_the_reference(each_set: Walk) -> None:
    random = np.random.default_rng(4)
    for columns in (*COLUMNS, 63, 65, 128):
        x = activations(columns, 9)
        x[1] = 0
        x[2, : columns // 2] = 1e-31  # counts as nothing
        x[3, columns // 2] = np.nan
        x[4, 0] = -np.inf
        x[5] = np.finfo(np.float32).max * np.sign(random.normal(size=columns))
        x[6] = random.integers(-4, 5, columns) + 0.5  # ties
        x[6, ::BLOCK] = 127
        blocks = -(-columns // BLOCK)
        codes, scale = np.zeros((9, blocks * BLOCK), dtype=np.int8), np.zeros((9, blocks), dtype=np.float32)
        reference.quantize_activations(x, codes, scale)
        for _ in each_set():
            got_codes, got_scale = kernels.quantize_activations(x)
            np.testing.assert_array_equal(got_codes, codes)
            np.testing.assert_array_equal(got_scale, scale)
        assert np.abs(codes).max() <= 127
        finite = np.isfinite(x).all(1)
        error = np.abs(
            codes[finite].astype(np.float64)[:, :columns] * np.repeat(scale[finite], BLOCK, axis=1)[:, :columns] - x[finite]
        )
        assert (error <= np.repeat(scale[finite], BLOCK, axis=1)[:, :columns].astype(np.float64) * 0.50001 + 1e-30).all()


@pytest.mark.parametrize("block", [64, 1 << 20])
def test_threads_change_nothing(kind: Any, block: int, packed: Any, instruction_set: str) -> None:
    weight = packed(kind, 1000, 172, block)
    x = activations(172)
    alone = kernels.lay(*weight, threads=1)
    for exact in (True, False):
        wanted = {count: kernels.product(x[:count], alone, exact) for count in (1, 4, 8, 33)}
        for threads in (2, 3):
            laid = kernels.lay(*weight, threads=threads)
            for count, rows in wanted.items():
                np.testing.assert_array_equal(kernels.product(x[:count], laid, exact, threads), rows)


def test_fast_products_cost_what_rounding_activations_costs(of_kind: Any, packed: Any, each_set: Walk) -> None:
    """Two sides: near the exact product, and not equal to it."""
    weight = packed(of_kind(4), 50, 768, 32)
    x = activations(768)
    for _ in each_set():
        laid = kernels.lay(*weight)
        exact, fast = kernels.product(x, laid), kernels.product(x, laid, exact=False)
        error = np.linalg.norm(fast - exact) / np.linalg.norm(exact)
        assert 1e-3 < error < 1e-2
