"""Ends of blocks and whole steps: every instruction set to the bit of the reference, and what the reference says by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nybble import kernels
from nybble.errors import NumericError
from nybble.formats import Format, parse_format
from nybble.kernels import reference_uniform
from nybble.kernels.arguments import Bytes, Floats

Walk = Callable[[], Iterator[str]]
many = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def ends(weight: Floats, block: int) -> tuple[Floats, Floats]:
    each = (len(weight), -(-weight.shape[1] // block))
    low, high = np.empty(each, np.float32), np.empty(each, np.float32)
    reference_uniform.extremes(weight, block, low, high)
    return low, high


def steps(weight: Floats, bits: int, block: int, scale: Floats, zero: Floats | None) -> Bytes:
    codes = np.empty(weight.shape, np.uint8)
    reference_uniform.uniform(weight, bits, block, scale, zero, codes)
    return codes


@pytest.mark.parametrize("bits", [2, 4, 5, 8])
@many
@given(
    rows=st.integers(1, 9), columns=st.integers(1, 200), block=st.sampled_from([1, 16, 32, 64, 200]),
    seed=st.integers(0, 2**32 - 1), zeros=st.booleans(),
)  # fmt: skip
def test_every_instruction_set_to_the_bit(
    bits: int, rows: int, columns: int, block: int, seed: int, zeros: bool, each_set: Walk
) -> None:
    random = np.random.default_rng(seed)
    weight = random.normal(size=(rows, columns)) * 2.0 ** random.integers(-149, 120, (rows, 1))
    kind = random.integers(0, 5, rows)
    weight[kind == 0] = 0.0 * random.choice([-1, 1], weight[kind == 0].shape)
    weight[kind == 1] = random.integers(-15, 16, weight[kind == 1].shape) / 2
    weight = weight.astype(np.float32)
    low, high = ends(weight, block)
    with np.errstate(over="ignore"):
        scale = (np.maximum(-low, high) / (2 ** (bits - 1) - 1 or 1)).astype(np.float16).astype(np.float32)
    scale[~np.isfinite(scale)] = 0
    scale[kind == 1] = random.choice([1, -1, 0.5])  # quotients half way between two steps
    zero = random.integers(0, 2**bits, scale.shape).astype(np.float32) if zeros else None
    wanted = steps(weight, bits, block, scale, zero)
    for isa in each_set():
        for threads in (1, 3):
            found = kernels.extremes(weight, block, threads)
            assert all(np.array_equal(mine, its) for mine, its in zip(found, (low, high), strict=True)), isa
            assert kernels.uniform(weight, bits, block, scale, zero, threads).tobytes() == wanted.tobytes(), isa


def test_by_hand(each_set: Walk) -> None:
    weight = np.array([[-4.0, -1.5, -0.5, 0.5, 1.5, 2.5, 100, 0.49]], np.float32)
    for isa in each_set():
        found = kernels.extremes(weight, 5)
        assert found[0].tolist() == [[-4.0, np.float32(0.49)]], isa
        assert found[1].tolist() == [[1.5, 100.0]], isa
        codes = kernels.uniform(weight, 4, 8, np.ones((1, 1), np.float32))
        assert codes.tolist() == [[4, 6, 8, 8, 10, 10, 15, 8]], isa  # halves to even
        codes = kernels.uniform(weight, 4, 8, np.zeros((1, 1), np.float32), np.full((1, 1), 3, np.float32))
        assert codes.tolist() == [[0, 1, 3, 3, 5, 5, 15, 3]], isa


def test_quotients_are_not_rounded_twice(each_set: Walk) -> None:
    """1.5 less a little, over 3: in float32 it would be exactly half."""
    scale = np.float32(3)
    weight = np.nextafter(np.float32(1.5), np.float32(0)).reshape(1, 1)
    for isa in each_set():
        assert kernels.uniform(weight * np.float32(1), 4, 1, scale.reshape(1, 1)).tolist() == [[8]], isa
        assert kernels.uniform(weight * np.float32(3), 4, 1, scale.reshape(1, 1)).tolist() == [[9]], isa


GOOD: dict[str, Any] = {"weight": np.ones((2, 64), np.float32), "bits": 4, "block": 32, "scale": np.ones((2, 2), np.float32)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": np.ones((2, 64))}, "weight must"),
        ({"weight": np.ones(64, np.float32)}, "weight must"),
        ({"bits": 9}, "bits must"),
        ({"block": 0}, "block must"),
        ({"scale": np.ones((2, 3), np.float32)}, "scale must have shape"),
        ({"zero": np.ones((1, 2), np.float32)}, "zero must have shape"),
        ({"threads": 0}, "threads must"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], message: str) -> None:
    assert kernels.uniform(**GOOD).tolist() == [[9] * 64] * 2
    with pytest.raises((ValueError, TypeError), match=message):
        kernels.uniform(**{**GOOD, **change})


def test_nothing_is_nothing() -> None:
    empty = np.empty((0, 64), np.float32)
    assert kernels.extremes(empty, 32)[0].shape == (0, 2)
    assert kernels.uniform(empty, 4, 32, np.empty((0, 2), np.float32)).shape == (0, 64)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@many
@given(
    rows=st.integers(1, 9), columns=st.integers(1, 200), granularity=st.sampled_from(["g32", "g64", "channel"]),
    seed=st.integers(0, 2**32 - 1), asymmetric=st.booleans(), wide=st.booleans(), kind=st.sampled_from(["f32", "f16", "bf16"]),
)  # fmt: skip
def test_one_pass_is_the_plain_way(
    bits: int, rows: int, columns: int, granularity: str, seed: int, asymmetric: bool, wide: bool, kind: str, each_set: Walk
) -> None:
    options = f"{',asym' if asymmetric else ''}{',f32' if wide and granularity != 'channel' else ''}"
    fmt = parse_format(f"int{bits}:{granularity}{options}")
    random = np.random.default_rng(seed)
    weight = random.normal(size=(rows, columns)) * 2.0 ** random.integers(-40, 8, (rows, 1))
    style = random.integers(0, 6, rows)
    weight[style == 0] = 0.0 * random.choice([-1, 1], weight[style == 0].shape)
    weight[style == 1] = random.integers(-15, 16, weight[style == 1].shape) / 2  # quotients half way between two steps
    weight[style == 2] = np.abs(weight[style == 2])
    weight[style == 3] *= 2.0**-110  # less than any half
    if kind == "bf16":
        values = (weight.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        widened = (values.astype(np.uint32) << 16).view(np.float32)
    else:
        values = weight.astype(np.float16 if kind == "f16" else np.float32)
        widened = values.astype(np.float32)
    codes, params = Format.round(fmt, widened)  # fit, then encode
    for isa in each_set():
        found = fmt.round_stored(values, kind)
        assert found is not None, isa
        assert found[0].tobytes() == codes.tobytes(), isa
        assert {n: v.tobytes() for n, v in found[1].items()} == {n: v.tobytes() for n, v in params.items()}, isa


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_one_pass_leaves_what_is_wrong_to_the_plain_way(bad: float) -> None:
    weight = np.ones((3, 100), np.float32)
    weight[2, 99] = bad
    fmt = parse_format("int4:g32")
    assert fmt.round_stored(weight, "f32") is None
    with pytest.raises(NumericError):
        fmt.round(weight)


def test_one_pass_leaves_scales_without_room_to_the_plain_way() -> None:
    weight = np.full((2, 64), 1e6, np.float32)
    assert parse_format("int2:g64").round_stored(weight, "f32") is None
    with pytest.raises(NumericError, match="exceeds"):
        parse_format("int2:g64").round(weight)
    assert parse_format("int2:channel").round_stored(weight, "f32") is not None
