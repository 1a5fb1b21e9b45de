"""Blocks of ggml's formats small enough to quantize by hand, with the answers worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from nybble import kernels
from nybble.errors import NumericError, UsageError
from nybble.formats import QTensor, format_names, parse_format

Weight = NDArray[np.float32]
SIZES = {
    "q4_0": 4.5, "q4_1": 5, "q5_0": 5.5, "q5_1": 6, "q8_0": 8.5, "iq4_nl": 4.5, "mxfp4": 4.25,
    "q2_k": 2.625, "q3_k": 3.4375, "q4_k": 4.5, "q5_k": 5.5, "q6_k": 6.5625, "iq4_xs": 4.25,
}  # fmt: skip
"""Bits per weight of ggml's blocks: bytes of a block over its weights."""


def row(*values: float, columns: int = 32) -> Weight:
    return np.array([[*values, *[0.0] * (columns - len(values))]], dtype=np.float32)


def rounded(spec: str, weight: Weight) -> tuple[list[int], list[float], dict[str, Any]]:
    fmt = parse_format(spec)
    codes, params = fmt.round(weight)
    return codes[0].tolist(), fmt.decode(codes, params)[0].tolist(), params


@pytest.mark.parametrize("spec", SIZES)
def test_bits_are_those_of_ggml(spec: str) -> None:
    fmt = parse_format(spec)
    assert fmt.bits_per_weight((3, 768)) == SIZES[spec]
    assert str(fmt) == spec
    assert spec in format_names()


def test_q4_0_divides_the_largest_by_minus_eight() -> None:
    codes, values, params = rounded("q4_0", row(8, -8, 7, -4, 0.5, -0.5, 1.5, 0.4))
    assert params["scale"].tolist() == [[-1.0]]  # the first of two largest: 8 is level -8, and -8 is cut to level 7
    assert codes[:8] == [0, 15, 1, 12, 8, 9, 7, 8]  # halves of the quotient go up: -0.5 to 0, 0.5 to 1, -1.5 to -1
    assert values[:8] == [8, -7, 7, -4, 0, -1, 1, 0]
    assert codes[8:] == [8] * 24


def test_q5_0_divides_the_largest_by_minus_sixteen() -> None:
    codes, values, params = rounded("q5_0", row(-16, 15.4, 15.6, 3))
    assert params["scale"].tolist() == [[1.0]]
    assert codes[:4] == [0, 31, 31, 19]
    assert values[:4] == [-16, 15, 15, 3]


def test_q4_1_spans_the_range_in_fifteen_steps() -> None:
    codes, values, params = rounded("q4_1", np.linspace(-5, 10, 31, dtype=np.float32)[None, [*range(31), 0]])
    assert params["scale"].tolist() == [[1.0]]
    assert params["shift"].tolist() == [[-5.0]]
    assert codes[:6] == [0, 1, 1, 2, 2, 3]  # halves go up
    assert values[:3] == [-5, -4, -4]
    assert codes[30] == 15


def test_q5_1_of_numbers_that_are_all_positive() -> None:
    codes, values, params = rounded("q5_1", np.arange(100, 132, dtype=np.float32)[None])
    assert params["scale"].tolist() == [[1.0]]
    assert params["shift"].tolist() == [[100.0]]
    assert codes == list(range(32))
    assert values == list(range(100, 132))


def test_q8_0_divides_by_127_and_rounds_halves_away_from_zero() -> None:
    codes, values, params = rounded("q8_0", row(127, -127, 0.5, -0.5, 1.5, -1.5, 63.49))
    assert params["scale"].tolist() == [[1.0]]
    assert codes[:7] == [255, 1, 129, 127, 130, 126, 191]
    assert values[:7] == [127, -127, 1, -1, 2, -2, 63]


def test_q8_0_chooses_codes_by_the_scale_that_is_not_stored_yet() -> None:
    third = 1 / 3
    codes, values, params = rounded("q8_0", row(127 * third, 126.5001 * third))
    assert params["scale"].item() == np.float16(third) > third * 0.999
    assert codes[:2] == [255, 255]
    assert values[0] == 127 * float(np.float16(third)) != 127 * third


def test_mxfp4_takes_the_power_of_two_below_a_quarter_of_the_largest() -> None:
    weight = row(12, -12, 1, 2, 3, 4, 6, 8, -1, 0.5, 0.500001, 1.5, 2.5, 3.5, 5, 7, 10, -7, -0.5)
    codes, values, params = rounded("mxfp4", weight)
    assert params["exponent"].tolist() == [[128]]  # 12 lies from 8 to 16: 2^3 / 4 / 2 a level
    assert codes[:19] == [7, 15, 1, 2, 3, 4, 5, 6, 9, 0, 1, 1, 2, 3, 4, 5, 6, 13, 0]  # halfway: the one nearer to zero
    assert values[:19] == [12, -12, 1, 2, 3, 4, 6, 8, -1, 0, 1, 1, 2, 3, 4, 6, 8, -6, 0]


def test_mxfp4_exponents_below_zero_wrap_around_as_ggml_has_them() -> None:
    codes, values, params = rounded("mxfp4", row(2.0**-130))
    assert params["exponent"].tolist() == [[251]]
    assert values == codes == [0] * 32


def test_iq4_nl_finds_the_scale_of_its_own_levels() -> None:
    levels = parse_format("iq4_nl").levels
    assert levels.tolist() == [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]
    weight = np.concatenate([levels, levels[::-1]])[None] * np.float32(0.25)
    codes, values, params = rounded("iq4_nl", weight)
    assert codes == [*range(16), *range(15, -1, -1)]
    assert params["scale"].tolist() == [[0.25]]
    assert values == weight[0].tolist()


@pytest.mark.parametrize(("spec", "sign"), [("q4_k", 1), ("q5_k", 1), ("q2_k", 1), ("q3_k", -1), ("q6_k", -1), ("iq4_xs", -1)])
def test_scales_are_products_of_small_whole_numbers(spec: str, sign: int) -> None:
    """A run whose values the format holds: found with their params, or others that give the same values."""
    fmt, rng = parse_format(spec), np.random.default_rng(0)
    blocks = 256 // fmt.block(256)
    levels = fmt.levels
    m = np.arange(blocks) % 5 + 11 if sign > 0 else np.arange(blocks) % 7 + 25
    codes = rng.integers(0, len(levels), (blocks, fmt.block(256)))
    codes[:, 0], codes[:, 1] = 0, len(levels) - 1
    weight = 2.0**-7 * m[:, None] * levels[codes] - (0.5 * (np.arange(blocks) % 4 + 12)[:, None] if sign > 0 else 0)
    weight = weight.reshape(1, 256).astype(np.float32)
    found = QTensor(fmt, *fmt.round(weight))
    assert np.abs(found.decode() - weight).max() < 2.0**-6 * float(np.abs(weight).max())
    if spec not in ("q2_k",):  # of four codes in sixteen weights another scale explains most
        assert (found.codes == codes.reshape(1, 256)).mean() > 0.9


def test_q4_k_from_its_parts() -> None:
    fmt = parse_format("q4_k")
    params = {
        "d": np.array([[0.5]], np.float16),
        "dmin": np.array([[0.25]], np.float16),
        "scale": kernels.pack(np.array([[1, 2, 3, 4, 5, 6, 62, 63]], np.uint8), 6),
        "min": kernels.pack(np.array([[0, 4, 8, 63, 0, 0, 0, 1]], np.uint8), 6),
    }
    stored = {"codes": np.zeros((1, 128), np.uint8), **params}
    assert {name: (array.dtype.name, array.shape) for name, array in stored.items()} == fmt.storage((1, 256))
    scale, offset = fmt.grid(params)
    assert scale.tolist() == [[0.5, 1, 1.5, 2, 2.5, 3, 31, 31.5]]
    assert offset is not None
    assert offset.tolist() == [[0, -1, -2, -15.75, 0, 0, 0, -0.25]]
    values = fmt.decode(np.full((1, 256), 15, np.uint8), params)
    assert values[0, ::32].tolist() == [7.5, 14, 20.5, 14.25, 37.5, 45, 465, 472.25]


def test_q6_k_and_q3_k_from_their_parts() -> None:
    six = parse_format("q6_k")
    params = {"d": np.array([[2]], np.float16), "scale": np.arange(-8, 8, dtype=np.int8)[None] * np.int8(16)}
    assert six.grid(params)[0].tolist() == [[32.0 * m for m in range(-8, 8)]]
    assert six.decode(np.full((1, 256), 63, np.uint8), params)[0, 0] == -256 * 31
    three = parse_format("q3_k")
    stored = kernels.pack(np.arange(16, dtype=np.uint8)[None] * np.uint8(4), 6)
    assert three.grid({"d": np.array([[1]], np.float16), "scale": stored})[0].tolist() == [[4.0 * i - 32 for i in range(16)]]


def test_rows_that_do_not_fit() -> None:
    fallbacks = {
        "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0", "q2_k": "iq4_nl", "q3_k": "iq4_nl", "iq4_xs": "iq4_nl",
    }  # fmt: skip
    for spec, other in fallbacks.items():
        fmt = parse_format(spec)
        assert fmt.fallback(288) == other
        assert fmt.fallback(100) == "fp16"
        assert fmt.fallback(512) is None
        with pytest.raises(UsageError, match=f"format {spec} holds rows of a multiple of 256 columns, not 288; use {other} for"):
            fmt.fit(np.zeros((2, 288), np.float32))
        with pytest.raises(UsageError, match="not 288"):
            fmt.storage((2, 288))
    for spec in ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl", "mxfp4"):
        fmt = parse_format(spec)
        assert fmt.fallback(64) is None
        assert fmt.fallback(100) == "fp16"
        with pytest.raises(UsageError, match=f"format {spec} holds rows of a multiple of 32 columns, not 100; use fp16"):
            fmt.round(np.zeros((2, 100), np.float32))


@pytest.mark.parametrize("spec", ["q4_0:g32", "q4_k:channel", "mxfp4:g64"])
def test_specs_have_no_blocks(spec: str) -> None:
    name = spec.partition(":")[0]
    with pytest.raises(UsageError, match=f"format {name} has blocks of its own; write '{name}' alone"):
        parse_format(spec)
    with pytest.raises(UsageError, match="unknown option 'asym'; it has none"):
        parse_format(f"{name},asym")


def test_a_shift_that_overflows_is_refused() -> None:
    with pytest.raises(NumericError, match=r"shift -1e\+05 of block \(0, 0\) exceeds 65504"):
        parse_format("q4_1").fit(np.full((1, 32), -1e5, np.float32))
    with pytest.raises(NumericError, match=r"scale .* of block \(1, 2\) exceeds 65504"):
        parse_format("q4_k").fit(np.pad(np.full((1, 1), 1e9, np.float32), ((1, 0), (70, 185))))
