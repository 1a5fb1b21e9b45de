"""Blocks small enough to quantize by hand, with the answers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from nybble.errors import NumericError
from nybble.formats import parse_format


def row(*values: float) -> np.ndarray:
    return np.array([values], dtype=np.float32)


def codes_and_values(spec: str, weight: np.ndarray) -> tuple[list[int], list[float], dict[str, np.ndarray]]:
    fmt = parse_format(spec)
    params = fmt.fit(weight)
    codes = fmt.encode(weight, params)
    return codes.ravel().tolist(), fmt.decode(codes, params).ravel().tolist(), params


def test_int8_absmax_divides_by_127() -> None:
    codes, values, params = codes_and_values("int8:channel", row(127, -127, -63.5, 0.4, 0.5, 1.5, 2.5))
    assert params["scale"].tolist() == [[1.0]]
    assert codes == [255, 1, 64, 128, 128, 130, 130]  # halves go to the even neighbour
    assert values == [127, -127, -64, 0, 0, 2, 2]


def test_int8_zero_point_uses_255_steps() -> None:
    codes, values, params = codes_and_values("int8:tensor,asym", row(-100, 155, 0.6, -50.5))
    assert params["scale"].tolist() == [[1.0]]
    assert params["zero"].tolist() == [[100]]
    assert codes == [0, 255, 101, 50]
    assert values == [-100, 155, 1, -50]


@pytest.mark.parametrize(("sign", "zero", "codes"), [(1, 0, [20, 255]), (-1, 255, [235, 0])])
def test_the_range_of_a_zero_point_always_holds_zero(sign: int, zero: int, codes: list[int]) -> None:
    found, values, params = codes_and_values("int8:channel,asym", row(sign * 20, sign * 255))
    assert params["zero"].tolist() == [[zero]]
    assert found == codes
    assert values == [sign * 20, sign * 255]


def test_int4_block() -> None:
    codes, values, params = codes_and_values("int4:g32", row(7, -7, 3.4, -2.5, 0))
    assert params["scale"].dtype == np.float16
    assert params["scale"].tolist() == [[1.0]]
    assert codes == [15, 1, 11, 6, 8]
    assert values == [7, -7, 3, -2, 0]


def test_int4_zero_point_block() -> None:
    codes, values, params = codes_and_values("int4:g32,asym", row(-5, 10, 2.2))
    assert params["zero"].tolist() == [[5]]
    assert codes == [0, 15, 7]
    assert values == [-5, 10, 2]


def test_int3_blocks_of_one_row_have_scales_of_their_own() -> None:
    weight = np.concatenate([row(*[3.0, -2.0] * 16), row(6, -4)], axis=1)
    codes, values, params = codes_and_values("int3:g32", weight)
    assert params["scale"].tolist() == [[1.0, 2.0]]
    assert codes == [7, 2] * 17
    assert values == weight.ravel().tolist()


def test_int2_absmax_has_three_values() -> None:
    codes, values, _ = codes_and_values("int2:channel", row(1, -1, 0.4, 0.6, -0.5))
    assert codes == [3, 1, 2, 3, 2]
    assert values == [1, -1, 0, 1, 0]


def test_a_searched_scale_may_use_the_extra_level_of_the_other_end() -> None:
    fmt = parse_format("int2:channel")
    weight = row(2, 1, 0, -1, 2, 1, 0, -1)
    params = fmt.fit(weight, np.ones(8, dtype=np.float32))
    assert params["scale"].tolist() == [[-1.0]]
    assert fmt.decode(fmt.encode(weight, params), params).tolist() == weight.tolist()


def test_scales_are_rounded_up_so_that_nothing_clips() -> None:
    third = 7 * (1 + 2.0**-11)  # its scale lies between two halves
    codes, values, params = codes_and_values("int4:g32", row(third, -third))
    assert params["scale"].tolist() == [[1 + 2.0**-10]]
    assert codes == [15, 1]
    assert values[0] >= third


def test_nf4_block() -> None:
    codes, values, params = codes_and_values("nf4:g64", row(2, -2, 0, 1, 0.2, -1.7))
    assert params["scale"].tolist() == [[2.0]]
    assert codes == [15, 0, 7, 12, 8, 0]  # 0.5 is nearer to 0.4407 than to 0.5626, 0.1 to 0.0796 than to 0.1609
    assert values == pytest.approx([2, -2, 0, 0.88141966, 0.1591606, -2], rel=1e-6)


def test_fp4_block_in_the_order_of_its_codes() -> None:
    codes, values, params = codes_and_values("fp4:g64", row(12, -12, 0, 0.0625, 8, 6, 4, 3, 2, 0.03, 0.04, -8, -0.03))
    assert params["scale"].tolist() == [[12.0]]
    assert codes == [3, 11, 0, 1, 2, 5, 4, 7, 6, 0, 1, 10, 0]
    assert values == pytest.approx([12, -12, 0, 0.0625, 8, 6, 4, 3, 2, 0, 0.0625, -8, 0], rel=1e-6)


def test_double_quantized_scales() -> None:
    weight = np.concatenate([np.full((1, 32), 1.0), np.full((1, 32), -3.0)], axis=1).astype(np.float32)
    codes, values, params = codes_and_values("nf4:g32,dq", weight)
    assert params["scale_offset"].tolist() == [2.0]
    assert params["scale_scale"].tolist() == [1.0]
    assert params["scale_codes"].tolist() == [[0, 255]]  # 1 - 2 = -1 lies below the lowest level, -0.99296875
    assert codes == [15] * 32 + [0] * 32
    assert values == pytest.approx([1.00703125] * 32 + [-3.0] * 32, rel=1e-6)


def test_casts_round_half_to_even() -> None:
    halves = row(1 + 2.0**-11, 1 + 3 * 2.0**-11, -(1 + 2.0**-11 + 2.0**-20), 65519, 2.0**-25, 3 * 2.0**-25)
    assert codes_and_values("fp16", halves)[1] == [1, 1 + 2.0**-9, -(1 + 2.0**-10), 65504, 0, 2.0**-23]
    brain = row(1 + 2.0**-8, 1 + 3 * 2.0**-8, -(1 + 2.0**-8 + 2.0**-20), 3e38)
    assert codes_and_values("bf16", brain)[1][:3] == [1, 1 + 2.0**-6, -(1 + 2.0**-7)]
    assert codes_and_values("bf16", row(1, -2))[0] == [0x3F80, 0xC000]


@pytest.mark.parametrize(("spec", "value"), [("fp16", 65520.0), ("fp16", 1e6), ("bf16", 3.4e38)])
def test_casts_refuse_what_overflows(spec: str, value: float) -> None:
    weight = np.array([[1, 2], [3, -value]], dtype=np.float32)
    with pytest.raises(NumericError, match=rf"1 weights overflow {spec}, the first is .* at \(1, 1\)"):
        parse_format(spec).encode(weight, {})


@pytest.mark.parametrize(
    ("spec", "bits"),
    [
        ("int4:g64", 4 + 16 / 64),
        ("int4:g64,asym", 4 + 16 / 64 + 4 / 64),
        ("int3:g64", 3 + 16 / 64),
        ("int8:channel", 8 + 32 / 512),
        ("int8:tensor", 8 + 32 / (256 * 512)),
        ("int8:tensor,asym", 8 + (32 + 8) / (256 * 512)),
        ("nf4:g64", 4 + 16 / 64),
        ("nf4:g64,dq", 4 + 8 / 64 + 32 / (64 * 256) + 32 / (256 * 512)),
        ("fp16", 16),
    ],
)
def test_bits_per_weight(spec: str, bits: float) -> None:
    assert parse_format(spec).bits_per_weight((256, 512)) == bits


def test_rows_are_padded_to_whole_bytes() -> None:
    assert parse_format("int3:channel").stored_bits((2, 5)) == 2 * (16 + 32)  # 15 bits take two bytes
