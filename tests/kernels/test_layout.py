"""The kernel layout: what goes in comes out again, to the bit, on every instruction set."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from nybble import kernels
from nybble.evaluate.memory import resident_bytes
from nybble.kernels import reference
from nybble.kernels.arguments import Floats, Packed

Walk = Callable[[], Iterator[str]]
SHAPES = ((1, 1, 1), (17, 31, 16), (15, 33, 32), (16, 64, 64), (50, 172, 96), (33, 172, 1 << 20), (16, 768, 64))
"""Rows, columns, columns that share a scale."""


def decoded(weight: Packed) -> Floats:
    out = np.empty((weight.packed.shape[0], weight.columns), dtype=np.float32)
    reference.decode(weight, out)
    return out


def restored(laid: kernels.Laid, weight: Packed, threads: int) -> Packed:
    packed, scale = np.full_like(weight.packed, 0xEE), np.full_like(weight.scale, -1)
    offset = None if weight.offset is None else np.full_like(weight.offset, -1)
    laid.restore(packed, scale, offset, threads)
    return weight._replace(packed=packed, scale=scale, offset=offset)


def same_bytes(one: Packed, other: Packed) -> None:
    for name in ("packed", "scale", "offset"):
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) is (b is None)
        assert a is None or a.tobytes() == b.tobytes(), name


@pytest.mark.parametrize("one", [False, True], ids=["scales", "one scale"])
def test_restore_gives_back_the_stored_bytes(kind: Any, one: bool, packed: Any, each_set: Walk) -> None:
    for number, (rows, columns, block) in enumerate(SHAPES):
        weight = packed(kind, rows, columns, columns if one else block, half=number % 2 == 0, one=one)
        for _ in each_set():
            for threads in (1, 2):
                laid = kernels.lay(*weight, threads=threads)
                assert (laid.rows, laid.columns, laid.holds_codes) == (rows, columns, True)
                same_bytes(restored(laid, weight, threads), weight)
        spare = reference.Laid(weight)
        same_bytes(restored(spare, weight, 1), weight)


def test_what_one_instruction_set_laid_another_reads(kind: Any, packed: Any, native: Any, each_set: Walk) -> None:
    weight = packed(kind, 33, 172, 64)
    x = np.random.default_rng(1).normal(size=(9, 172)).astype(np.float32)
    made = [kernels.lay(*weight) for _ in each_set()]
    answers = [
        (kernels.product(x, laid).tobytes(), kernels.product(x, laid, False).tobytes()) for _ in each_set() for laid in made
    ]
    assert len(set(answers)) == 1


def test_rows_are_those_of_decode(kind: Any, packed: Any, each_set: Walk) -> None:
    for rows, columns, block in SHAPES:
        weight = packed(kind, rows, columns, block)
        chosen = np.random.default_rng(rows).integers(0, rows, 7)
        for _ in each_set():
            laid = kernels.lay(*weight)
            np.testing.assert_array_equal(kernels.rows_of(laid, chosen), decoded(weight)[chosen])
            assert kernels.rows_of(laid, np.empty(0, dtype=np.int64)).shape == (0, columns)


@pytest.mark.parametrize("offset", ["any", "shift"])
@pytest.mark.parametrize(("bits", "levels", "block"), [(1, "from 0", 64), (5, "table", 64), (8, "table", 172), (4, "whole", 24),
                                                        (4, "whole", 7), (3, "table", 64), (4, "table", 64)])  # fmt: skip
def test_what_has_no_layout_is_decoded_once(
    bits: int, levels: str, block: int, offset: str, of_kind: Any, packed: Any, each_set: Walk
) -> None:
    weight = packed(of_kind(bits, levels, offset), 17, 172, block)
    x = np.random.default_rng(3).normal(size=(9, 172)).astype(np.float32)
    for _ in each_set():
        laid = kernels.lay(*weight)
        assert not laid.holds_codes
        np.testing.assert_array_equal(kernels.rows_of(laid, np.arange(17)), decoded(weight))
        np.testing.assert_allclose(kernels.product(x, laid), x @ decoded(weight).T, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(kernels.product(x, laid, False), kernels.product(x, laid))
        with pytest.raises(ValueError, match="a float weight has no codes"):
            restored(laid, weight, 1)


def stored_as(values: Floats, kind: str) -> tuple[NDArray[Any], Floats]:
    """What a checkpoint holds, and the float32 that it stands for."""
    if kind == "f32":
        return values, values
    if kind == "f16":
        return values.astype(np.float16), values.astype(np.float16).astype(np.float32)
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    return bits, (bits.astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
def test_float_weights(kind: str, transposed: bool, each_set: Walk) -> None:
    for rows, columns, _ in SHAPES:
        values = np.random.default_rng(rows).normal(size=(rows, columns)).astype(np.float32)
        stored, wide = stored_as(values, kind)
        x = np.random.default_rng(4).normal(size=(33, columns)).astype(np.float32)
        wanted = x.astype(np.float64) @ wide.T.astype(np.float64)
        bound = (columns / 2 + 3) * 2.0**-24 * (np.abs(x) @ np.abs(wide).T)
        answers = set()
        for _ in each_set():
            for threads in (1, 2):
                laid = kernels.lay_floats(
                    np.ascontiguousarray(stored.T) if transposed else stored, kind, transposed, threads=threads
                )
                assert (laid.rows, laid.columns, laid.holds_codes) == (rows, columns, False)
                np.testing.assert_array_equal(kernels.rows_of(laid, np.arange(rows)), wide)
                got = kernels.product(x, laid, threads=threads)
                assert (np.abs(got - wanted) <= bound).all()
                answers |= {got.tobytes(), kernels.product(x, laid, False).tobytes()}
                for count in (1, 2, 4, 9):
                    np.testing.assert_array_equal(kernels.product(x[:count], laid), got[:count])
        assert len(answers) == 1


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
def test_float_weights_that_are_not_finite_keep_to_their_row(kind: str, each_set: Walk) -> None:
    values = np.ones((17, 33), dtype=np.float32)
    values[3, 32], values[5, 0] = np.nan, np.inf
    stored, _ = stored_as(values, kind)
    for _ in each_set():
        for count in (1, 9):
            got = kernels.product(np.ones((count, 33), dtype=np.float32), kernels.lay_floats(stored, kind))
            assert np.isnan(got[:, 3]).all()
            assert np.isinf(got[:, 5]).all()
            assert (np.delete(got, (3, 5), axis=1) == 33).all()


def test_the_layout_takes_the_bytes_that_were_stored(of_kind: Any, packed: Any, native: Any) -> None:
    for bits in range(2, 9):
        weight = packed(of_kind(bits), 512, 768, 64)
        stored = weight.packed.nbytes + weight.scale.nbytes
        assert kernels.lay(*weight).nbytes == stored
        assert kernels.lay(*packed(of_kind(bits), 512, 768, 32)).nbytes == stored + 512 * 24 + (512 if bits <= 4 else 0)
    ragged = packed(of_kind(4), 50257 // 100, 100, 32)
    filled = (512 // 16 * 16) * 128 / 2
    assert kernels.lay(*ragged).nbytes < 1.05 * (filled + 512 * 4 * 2)


def test_dropped_weights_give_their_memory_back_though_others_stay() -> None:
    """Small weights share slabs of memory; one that stays must not keep the pages of those that went."""
    if kernels.native() is None or not sys.platform.startswith("linux"):
        pytest.skip("the C++ extension is not built, or this is not Linux")
    weight = np.ones((1024, 1024), dtype=np.float32)  # 4 MB, of which whole pages are nearly all
    start = resident_bytes()
    laid = [kernels.lay_floats(weight, "f32") for _ in range(16)]
    full = resident_bytes()
    kept = laid[::8]
    del laid
    gc.collect()
    few = resident_bytes()
    assert full - start > 60e6
    assert few - start < 20e6, "two of sixteen weights stay, and more than theirs is resident"
    assert len(kept) == 2
