"""The contract of a number format, run over every format by name, block size and option.

A new family of formats is found here by itself. What differs between families (casts have no params, double quantization
ties blocks together) is asked of the format, never of its name.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from nybble import kernels
from nybble.errors import NumericError, UsageError
from nybble.formats import Format, QTensor, format_names, parse_format
from nybble.formats.base import spread
from nybble.methods import parse_method

BLOCKS = ("", ":tensor", ":channel", ":g32", ":g64", ":g128", ":g256")
OPTIONS = ("", ",asym", ",dq")
WIDE = ((":g64", ",f32"), (":g64", ",asym,f32"))
"""Scales in float32: one size of groups stands for all."""
SEARCHED = ("iq4_nl", "iq4_xs", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k")
"""Their params are searched without importance too."""
SHAPES = ((5, 172), (3, 64), (1, 1), (4, 1), (1, 300), (300, 2))


def specs_of(name: str) -> list[str]:
    """Every spec of a name, without those that the family refuses and those that mean the same."""
    found: list[str] = []
    for block, option in (*product(BLOCKS, OPTIONS), *WIDE):
        try:
            spec = str(parse_format(name + block + option))
        except UsageError:
            continue
        if spec not in found:
            found.append(spec)
    return found


def columns(fmt: Format, at_least: int) -> int:
    """So many columns, or a few more where rows are made of whole runs."""
    return -(-at_least // fmt.whole) * fmt.whole


SPECS = [spec for name in format_names() for spec in specs_of(name)]
PACKED = [spec for spec in SPECS if not parse_format(spec).is_cast]
INDEPENDENT = [spec for spec in PACKED if parse_format(spec).independent and parse_format(spec).granularity != "tensor"]


@pytest.fixture(params=SPECS)
def fmt(request: pytest.FixtureRequest) -> Format:
    return parse_format(request.param)


@pytest.fixture(params=PACKED)
def packed(request: pytest.FixtureRequest) -> Format:
    return parse_format(request.param)


def normal(shape: tuple[int, int], seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def kinds(shape: tuple[int, int]) -> dict[str, NDArray[np.float32]]:
    """Weights of many kinds, all of which every format can hold."""
    rng = np.random.default_rng(7)
    signs = np.where(rng.random(shape) < 0.5, np.float32(-0.0), np.float32(0.0))
    outlier = normal(shape)
    outlier[0, -1] = 1000.0
    return {
        "normal": normal(shape),
        "small": normal(shape) * np.float32(0.02),
        "student": np.clip(rng.standard_t(2, shape), -1e4, 1e4).astype(np.float32),
        "uniform": rng.uniform(-1, 1, shape).astype(np.float32),
        "positive": rng.uniform(0.5, 1, shape).astype(np.float32),
        "outlier": outlier,
        "constant": np.full(shape, -0.3, dtype=np.float32),
        "signed zeros": signs,
        "tiny": normal(shape) * np.float32(1e-30),
        "subnormal": normal(shape) * np.float32(3e-45),
        "one tiny row": np.concatenate([normal(shape)[:-1], normal(shape)[-1:] * np.float32(1e-30)]),
        "65504": np.sign(normal(shape)) * np.float32(65504),
    }


def bound(fmt: Format, weight: NDArray[np.float32], params: dict[str, Any]) -> NDArray[np.float64]:
    """The stated error bound of each weight."""
    if not fmt.is_cast:
        return np.broadcast_to(spread(fmt.max_error(params), weight.shape[1], fmt.block(weight.shape[1])), weight.shape)
    bits, smallest = {"fp32": (60, 0.0), "fp16": (11, 2.0**-25), "bf16": (8, 2.0**-134)}[fmt.name]
    return np.maximum(np.abs(weight.astype(np.float64)) * 2.0**-bits, smallest)


def round_trip(fmt: Format, weight: NDArray[np.float32]) -> NDArray[np.float32]:
    params = fmt.fit(weight)
    return fmt.decode(fmt.encode(weight, params), params)


def test_every_family_is_covered() -> None:
    counts = {name: len(specs_of(name)) for name in format_names()}
    expected = {"fp32": 1, "fp16": 1, "bf16": 1} | {f"int{b}": 14 for b in range(2, 9)} | {"nf4": 11, "fp4": 11}
    assert expected.items() <= counts.items()
    assert min(counts.values()) >= 1


def test_spec_round_trip(fmt: Format) -> None:
    assert parse_format(str(fmt)) == fmt
    assert hash(parse_format(str(fmt))) == hash(fmt)
    assert parse_format(f" {fmt} ") == fmt
    assert parse_format(fmt) is fmt


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_storage_is_what_it_says_and_inverts(fmt: Format, shape: tuple[int, int]) -> None:
    shape = (shape[0], columns(fmt, shape[1]))
    weight = normal(shape)
    params = fmt.fit(weight)
    codes = fmt.encode(weight, params)
    stored = fmt.to_storage(codes, params)
    assert {name: (array.dtype.name, array.shape) for name, array in stored.items()} == fmt.storage(shape)
    assert fmt.stored_bits(shape) == 8 * sum(array.nbytes for array in stored.values())
    assert fmt.bits_per_weight(shape) * weight.size == pytest.approx(fmt.stored_bits(shape))
    again, params_again = fmt.from_storage(stored, shape)
    assert again.dtype == codes.dtype
    assert np.array_equal(again, codes)
    assert {name: array.tobytes() for name, array in params_again.items()} == {k: v.tobytes() for k, v in params.items()}
    assert np.array_equal(QTensor.from_stored(fmt, stored, shape).decode(), fmt.decode(codes, params))


def test_codes_are_unsigned_and_in_range(fmt: Format) -> None:
    for kind, weight in kinds((5, columns(fmt, 172))).items():
        codes = fmt.encode(weight, fmt.fit(weight))
        assert codes.dtype.kind == "u", kind
        assert codes.shape == weight.shape
        assert int(codes.max()) < 2**fmt.bits


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_within_the_stated_bound(fmt: Format, shape: tuple[int, int]) -> None:
    shape = (shape[0], columns(fmt, shape[1]))
    for kind, weight in kinds(shape).items():
        params = fmt.fit(weight)
        value = fmt.decode(fmt.encode(weight, params), params)
        assert value.dtype == np.float32
        assert value.shape == shape
        error, limit = np.abs(value.astype(np.float64) - weight), bound(fmt, weight, params)
        worst = np.unravel_index(int((error - limit).argmax()), shape)
        assert (error <= limit).all(), f"{kind}: |{weight[worst]} - {value[worst]}| > {limit[worst]} at {worst}"


def test_error_is_not_smaller_than_rounding_makes_it(fmt: Format) -> None:
    """A codec that keeps the floats, or a bound that is far too wide, fails here."""
    weight = normal((16, 512))
    params = fmt.fit(weight)
    error = np.abs(round_trip(fmt, weight).astype(np.float64) - weight)
    if fmt.bits == 32:
        assert not error.any()
        return
    limit = bound(fmt, weight, params)
    if not fmt.is_cast:  # half a step, where the bound is more: ends that are clipped
        scale = np.abs(spread(fmt.grid(params)[0], 512, fmt.block(512)).astype(np.float64))
        limit = np.minimum(limit, scale * np.ptp(fmt.levels) / (len(np.unique(fmt.levels)) - 1) / 2)
    assert error.mean() >= 0.15 * limit.mean()
    assert (error > 0).mean() > 0.9
    assert (error / limit).max() > 0.75


def test_encode_picks_the_nearest_value(packed: Format) -> None:
    weight = normal((3, columns(packed, 172)), seed=3)
    params = packed.fit(weight)
    value = packed.decode(packed.encode(weight, params), params)
    every = np.stack([packed.decode(np.full(weight.shape, c, dtype=np.uint8), params) for c in range(2**packed.bits)])
    nearest = np.abs(every.astype(np.float64) - weight).min(axis=0)
    slack = np.abs(every).max() * 2.0**-22
    assert (np.abs(value.astype(np.float64) - weight) <= nearest + slack).all()


def test_decoded_values_encode_to_the_same_codes(fmt: Format) -> None:
    for kind, weight in kinds((5, columns(fmt, 172))).items():
        if kind == "subnormal":  # a scale of one or two float32 units cannot tell sixteen levels apart
            continue
        params = fmt.fit(weight)
        codes = fmt.encode(weight, params)
        assert np.array_equal(fmt.decode(fmt.encode(fmt.decode(codes, params), params), params), fmt.decode(codes, params)), kind
        if kind not in ("signed zeros", "tiny", "one tiny row"):
            assert np.array_equal(fmt.encode(fmt.decode(codes, params), params), codes), kind


def test_scaling_by_a_power_of_two_scales_the_result(fmt: Format) -> None:
    weight = normal((5, columns(fmt, 172)))
    weight += np.copysign(np.float32(2**-6), weight)  # keeps halves out of their subnormal range
    assert np.array_equal(round_trip(fmt, weight * np.float32(4)), round_trip(fmt, weight) * np.float32(4))


def test_rows_do_not_depend_on_their_order(fmt: Format) -> None:
    weight, order = normal((7, columns(fmt, 172))), np.array([3, 0, 6, 1, 5, 2, 4])
    changed, expected = round_trip(fmt, weight[order]), round_trip(fmt, weight)[order]
    if fmt.independent:
        assert np.array_equal(changed, expected)
    else:
        assert np.abs(changed - expected).max() < 1.0


@pytest.mark.parametrize("spec", INDEPENDENT)
def test_independent_blocks_do_not_see_their_neighbours(spec: str) -> None:
    fmt = parse_format(spec)
    weight = normal((3, columns(fmt, 600)))
    block = fmt.block(weight.shape[1])
    louder = weight.copy()
    louder[1] *= 100
    louder[:, block:] *= 10
    before, after = round_trip(fmt, weight), round_trip(fmt, louder)
    first = slice(0, block)
    assert np.array_equal(before[[0, 2], first], after[[0, 2], first])
    assert not np.array_equal(before[1], after[1])


def test_zero_blocks_decode_to_exact_zeros(fmt: Format) -> None:
    assert not round_trip(fmt, np.zeros((3, columns(fmt, 172)), dtype=np.float32)).any()
    weight = normal((3, 512))
    weight[1] = 0
    weight[:, 256:] = 0
    value = round_trip(fmt, weight)
    assert not value[1].any()
    assert not value[:, 256:].any()
    assert value[0, :256].any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(fmt: Format, bad: float) -> None:
    weight = normal((3, columns(fmt, 172)))
    params = fmt.fit(weight)
    weight[1, 7] = weight[2, 0] = bad
    message = rf"2 of {weight.size} weights are not finite, the first is {bad} at row 1, column 7"
    with pytest.raises(NumericError, match=message):
        fmt.fit(weight)
    with pytest.raises(NumericError, match=message):
        fmt.encode(weight, params)


def test_a_scale_that_overflows_its_type_is_refused(packed: Format) -> None:
    weight = normal((3, columns(packed, 172)))
    weight[1, 0] = 1e30
    if not {"scale", "d"} & {name for name, (dtype, _) in packed.storage(weight.shape).items() if dtype == "float16"}:
        assert np.isfinite(round_trip(packed, weight)).all()
        return
    way_out = "keep this tensor in float" if packed.whole > 1 else "use per-channel"
    with pytest.raises(NumericError, match=rf"scale .* of block \(1, 0\) exceeds 65504, the largest float16; {way_out}"):
        packed.fit(weight)


def test_the_largest_floats_never_decode_to_infinity(packed: Format) -> None:
    largest = np.finfo(np.float32).max
    weight = np.array([[largest, -largest, 1.0], [largest / 3, 0.0, -largest / 7]], dtype=np.float32)
    weight = np.pad(weight, ((0, 0), (0, columns(packed, 3) - 3)))
    if packed.name.startswith("int"):
        with pytest.raises(NumericError, match=r"magnitude 3.4028e\+38 is over 1.7014e\+38, half the largest float32"):
            packed.fit(weight)
        weight /= 2
    if "float16" not in {dtype for dtype, _ in packed.storage(weight.shape).values()}:
        assert np.isfinite(round_trip(packed, weight)).all()
        searched = packed.fit(weight, np.ones(weight.shape[1], dtype=np.float32))
        assert np.isfinite(packed.decode(packed.encode(weight, searched), searched)).all()


def plain_params(fmt: Format, weight: NDArray[np.float32]) -> dict[str, Any]:
    """Params of the plain range."""
    if fmt.name not in SEARCHED:
        return fmt.fit(weight)
    view = weight.reshape(len(weight), -1, fmt.block(weight.shape[1])).astype(np.float64)
    if fmt.shifted:
        low = np.minimum(view.min(-1), 0)
        return fmt.from_grid((view.max(-1) - low) / fmt.levels[-1], low)
    largest = np.take_along_axis(view, np.abs(view).argmax(-1)[..., None], -1)[..., 0]
    return fmt.from_grid(largest / fmt.levels[0], None)


def weighted_loss(fmt: Format, weight: NDArray[np.float32], params: dict[str, Any], importance: NDArray[np.float32]) -> float:
    error = fmt.decode(fmt.encode(weight, params), params).astype(np.float64) - weight
    return float((importance * error**2).sum())


@pytest.mark.parametrize("kind", ["normal", "student", "outlier", "one tiny row", "positive", "signed zeros", "constant"])
def test_search_is_never_worse_than_the_plain_range(packed: Format, kind: str) -> None:
    weight = kinds((3, columns(packed, 172)))[kind]
    importance = np.random.default_rng(5).gamma(0.5, 1.0, weight.shape[1]).astype(np.float32)
    plain = weighted_loss(packed, weight, plain_params(packed, weight), importance)
    searched = weighted_loss(packed, weight, packed.fit(weight, importance), importance)
    energy = float((importance * weight.astype(np.float64) ** 2).sum())  # a share of it: which float16 a scale becomes
    assert searched <= plain * (1 + 1e-6) + (energy * 2.0**-22 if packed.name in SEARCHED else 0)


@pytest.mark.parametrize("size", [1.0, 1e-4, 2e-5, 3e-6])
@pytest.mark.parametrize("spec", [spec for spec in INDEPENDENT if parse_format(spec).granularity == 32])
def test_search_is_never_worse_in_any_block(spec: str, size: float) -> None:
    """Rounding a searched scale to a half, above all to a subnormal one, can cost more than it gained: the plain one stays."""
    fmt = parse_format(spec)
    weight = normal((100, 64), seed=21) * np.float32(size)
    importance = np.random.default_rng(22).gamma(0.5, 1.0, 64).astype(np.float32)

    def loss(params: dict[str, Any]) -> NDArray[np.float64]:
        error = fmt.decode(fmt.encode(weight, params), params).astype(np.float64) - weight
        return (importance * error**2).reshape(100, 2, 32).sum(-1)

    assert (loss(fmt.fit(weight, importance)) <= loss(plain_params(fmt, weight)) * (1 + 1e-6)).all()


def test_search_lowers_the_loss_and_weighing_lowers_the_weighted_loss(packed: Format) -> None:
    rng = np.random.default_rng(11)
    weight = normal((8, 512), seed=11)
    importance = rng.gamma(0.3, 1.0, 512).astype(np.float32)
    even = np.ones(512, dtype=np.float32)
    plain, unweighted, weighted = packed.fit(weight), packed.fit(weight, even), packed.fit(weight, importance)
    before, after = (weighted_loss(packed, weight, params, even) for params in (plain, unweighted))
    assert after < (1.02 * before if packed.name in SEARCHED else before)  # both are searched, by lists of their own
    slack = 1.001 if packed.granularity == "tensor" else 1  # one scale for 4096 weights: the two searches end side by side
    assert weighted_loss(packed, weight, weighted, importance) < slack * weighted_loss(packed, weight, unweighted, importance)


def test_importance_per_weight_is_importance_per_column_repeated(packed: Format) -> None:
    weight = normal((3, columns(packed, 172)))
    importance = np.linspace(0, 2, weight.shape[1], dtype=np.float32)
    per_column = packed.fit(weight, importance)
    per_weight = packed.fit(weight, np.tile(importance, (3, 1)))
    assert {k: v.tobytes() for k, v in per_column.items()} == {k: v.tobytes() for k, v in per_weight.items()}


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan], ids=["shape", "negative", "nan"])
def test_importance_that_makes_no_sense_is_refused(packed: Format, value: float) -> None:
    weight = normal((3, columns(packed, 172)))
    importance = np.full(weight.shape[1] if value else 5, value or 1, dtype=np.float32)
    with pytest.raises(UsageError, match="importance"):
        packed.fit(weight, importance)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_decode_the_same_bits(packed: Format, shape: tuple[int, int]) -> None:
    shape = (shape[0], columns(packed, shape[1]))
    for kind, weight in kinds(shape).items():
        params = packed.fit(weight)
        codes = packed.encode(weight, params)
        stored = packed.to_storage(codes, params)["codes"]
        for grid in (packed.grid(params), packed.kernel_grid(params)):
            fast = kernels.decode(stored, shape[1], packed.bits, packed.levels, packed.block(shape[1]), *grid, packed.shifted)
            assert fast.tobytes() == packed.decode(codes, params).tobytes(), kind


def test_decode_is_levels_less_offset_times_scale(packed: Format) -> None:
    weight = normal((3, columns(packed, 172)))
    params = packed.fit(weight)
    codes = packed.encode(weight, params)
    scale, offset = packed.grid(params)
    assert scale.shape == packed.blocks(weight.shape)
    value = packed.decode(codes, params)
    for row, column in ((0, 0), (1, 171), (2, 64)):
        at = (row, column // packed.block(weight.shape[1])) if scale.shape != (1, 1) else (0, 0)
        less = np.float32(0) if offset is None else offset[at]
        level = packed.levels[codes[row, column]]
        assert value[row, column] == (level * scale[at] + less if packed.shifted else (level - less) * scale[at])


@settings(derandomize=True, max_examples=150, deadline=None)
@given(
    spec=st.sampled_from(SPECS),
    rows=st.integers(1, 5),
    count=st.integers(1, 140),
    seed=st.integers(0, 2**32 - 1),
    spread_of_exponents=st.integers(0, 12),
)
def test_any_weight_is_stored_and_read_within_the_bound(
    spec: str, rows: int, count: int, seed: int, spread_of_exponents: int
) -> None:
    fmt, rng = parse_format(spec), np.random.default_rng(seed)
    shape = (rows, columns(fmt, count))
    weight = rng.standard_normal(shape) * 2.0 ** rng.integers(-spread_of_exponents, 1, shape)
    weight = np.where(rng.random(shape) < 0.1, 0, weight).astype(np.float32)
    params = fmt.fit(weight)
    codes = fmt.encode(weight, params)
    read = QTensor.from_stored(fmt, fmt.to_storage(codes, params), weight.shape)
    assert np.array_equal(read.codes, codes)
    assert (np.abs(read.decode().astype(np.float64) - weight) <= bound(fmt, weight, params)).all()
    if not fmt.is_cast and not fmt.shifted and 0 in fmt.levels:  # a shift of few bits need not bring a level to 0
        assert not read.decode()[weight == 0].any()


@pytest.mark.parametrize("method", ["rtn", "rtn:mse"])
def test_rows_made_apart_are_those_of_the_whole(fmt: Format, method: str) -> None:
    """What lets a tensor be written a run of rows at a time."""
    rows, wide = 7, columns(fmt, 130)
    weight = np.random.default_rng(3).standard_normal((rows, wide)).astype(np.float32)
    weight[2] *= 40
    quantize = parse_method(method).quantize
    whole = quantize(weight, fmt).stored()
    parts = [quantize(weight[part], fmt).stored() for part in (slice(0, 1), slice(1, 3), slice(3, 7))]
    same = all(np.concatenate([part[key] for part in parts]).tobytes() == whole[key].tobytes() for key in whole)
    assert same or not fmt.by_rows
    assert fmt.by_rows or fmt.granularity == "tensor" or not fmt.independent
