"""What `nybble formats` says is what the format objects do, and what torch says of the floats."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from nybble.errors import UsageError
from nybble.formats import format_names, parse_format
from nybble.formats.cast import Cast
from nybble.formats.codebook import Codebook
from nybble.formats.explain import MOST_LEVELS, SHAPE, Explanation, explain, explain_all
from nybble.formats.floating import OTHERS, Floating
from nybble.formats.number_line import count_in_cells, format_figure, number_line

ROWS = explain_all()
PACKED = [row for row in ROWS if not row.floating]
FLOATS = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


def name_of(row: Explanation) -> str:
    return row.spec


def weight() -> np.ndarray:
    """Blocks of very different magnitude and middle, so large that what bounds add for subnormal scales is nothing to them."""
    rng = np.random.default_rng(5)
    rows = rng.standard_normal((8, 512)) * 10.0 ** rng.uniform(0, 3, (8, 1)) + 100 * rng.standard_normal((8, 1))
    return rows.astype(np.float32)


def spread_to(values: np.ndarray, like: np.ndarray) -> np.ndarray:
    """A stored number of runs, or of the whole tensor, for each of the blocks [N, B]."""
    if values.ndim == 1:  # double quantization: one for 256 scales, in row order
        return np.repeat(values, 256)[: like.size].reshape(like.shape)
    return np.broadcast_to(np.repeat(values, like.shape[1] // values.shape[1], axis=1), like.shape)


def layout(name: str) -> Floating:
    floating = explain(name).floating
    assert floating is not None
    return floating


@pytest.mark.parametrize("name", FLOATS)
def test_floats_agree_with_torch(name: str) -> None:
    row, info = explain(name), torch.finfo(FLOATS[name])
    assert (row.lowest, row.highest) == (info.min, info.max)
    assert row.bits == info.bits
    assert row.largest_step == layout(name).epsilon == info.eps
    assert layout(name).smallest_normal == info.smallest_normal == info.tiny
    assert row.smallest_step == layout(name).smallest == info.smallest_normal * info.eps
    assert row.bound == {"weight": info.eps / 2}


@pytest.mark.parametrize("name", ["fp16", "bf16", "fp8_e4m3", "fp8_e5m2"])
def test_all_floats_of_a_type(name: str) -> None:
    """Every bit pattern by torch: as many finite ones, the same ones, and as many up to any of them."""
    bits = explain(name).bits
    codes = torch.arange(2**bits, dtype=torch.int32).to(torch.uint16 if bits == 16 else torch.uint8)
    values = codes.view(FLOATS[name]).to(torch.float64).numpy()
    values = np.unique(values[np.isfinite(values)])
    floating = layout(name)
    assert explain(name).count == len(values)
    positive = values[values > 0].tolist()
    assert [floating.value(code) for code in range(1, floating.positive + 1)] == positive
    assert [floating.count_to(value) for value in positive] == list(range(1, len(positive) + 1))
    assert [floating.count_to(math.nextafter(value, 0)) for value in positive] == list(range(len(positive)))


def test_known_figures() -> None:
    assert explain("fp16").highest == 65504
    assert explain("fp8_e4m3").highest == 448
    assert explain("fp8_e5m2").highest == 57344
    assert explain("fp4_e2m1").levels == (-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6)
    assert [2 * level for level in explain("fp4_e2m1").levels] == list(explain("mxfp4").levels)
    assert explain("int4:g64,asym").bits_per_weight == 4.3125
    assert explain("q4_k").bits_per_weight == 4.5
    assert explain("q8_0").bound == {"scale": 0.562}
    assert explain("q4_0").bound == pytest.approx({"scale": 1 + 8 / 2048}, rel=1e-5)
    assert explain("q5_1").bound == pytest.approx({"scale": 0.5 + 31 / 2048, "shift": 1 / 2048}, rel=1e-5)


def test_the_table_has_every_format() -> None:
    assert {parse_format(row.spec).name for row in ROWS if row.spec not in OTHERS} == set(format_names())
    assert {row.spec for row in ROWS} >= {*OTHERS, "int8:channel", "int4:g64", "int4:g64,asym", "nf4:g64,dq", "q4_k"}
    assert len({row.spec for row in ROWS}) == len(ROWS)
    assert all(explain(row.spec) == row for row in ROWS)
    assert [row.spec for row in ROWS][:7] == ["fp64", "fp32", "fp16", "bf16", "fp8_e4m3", "fp8_e5m2", "fp4_e2m1"]


@pytest.mark.parametrize("row", PACKED, ids=name_of)
def test_levels_are_what_all_codes_decode_to(row: Explanation) -> None:
    fmt = parse_format(row.spec)
    columns = max(2**fmt.bits, fmt.whole)
    codes = np.resize(np.arange(2**fmt.bits, dtype=np.uint8), (1, columns))
    ones = np.ones(fmt.blocks((1, columns)))
    params = fmt.from_grid(ones, np.zeros_like(ones) if row.offset else None)
    scale, offset = fmt.grid(params)
    assert (offset is not None) == row.offset
    decoded = np.unique(fmt.decode(codes, params) / scale.flat[0])  # d of a run is a float16: its scales are not quite 1
    np.testing.assert_allclose(decoded, row.levels, rtol=1e-6, atol=1e-9)
    assert row.count == len(row.levels) <= MOST_LEVELS
    assert (row.lowest, row.highest) == (row.levels[0], row.levels[-1])
    assert (row.smallest_step, row.largest_step) == (np.diff(row.levels).min(), np.diff(row.levels).max())


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_bits_are_those_of_the_format(row: Explanation) -> None:
    if row.spec in OTHERS:
        assert row.bits_per_weight == row.bits
        return
    fmt = parse_format(row.spec)
    assert row.bits_per_weight == fmt.bits_per_weight(SHAPE)
    assert sum(part.bits for part in row.stored) / row.run == pytest.approx(row.bits_per_weight, rel=1e-12)


@pytest.mark.parametrize("row", PACKED, ids=name_of)
def test_the_bound_is_that_of_the_format(row: Explanation) -> None:
    """As a sum over stored numbers it gives `max_error`, and holds."""
    fmt = parse_format(row.spec)
    rows = weight()
    codes, params = fmt.round(rows)
    scale = np.abs(fmt.grid(params)[0].astype(np.float64))
    total = np.zeros_like(scale)
    for name, factor in row.bound.items():
        stored = scale if name in ("s", "scale") else spread_to(np.abs(params[name].astype(np.float64)), scale)
        total += factor * stored
    np.testing.assert_allclose(total, fmt.max_error(params), rtol=2e-4, atol=5e-4)
    error = np.abs(fmt.decode(codes, params) - rows)
    block = fmt.block(rows.shape[1])
    assert (error.reshape(len(rows), -1, block).max(-1) <= total + 5e-4).all()


@pytest.mark.parametrize("row", PACKED, ids=name_of)
def test_halves_are_rounded_as_it_says(row: Explanation) -> None:
    """Weights midway between levels, on a grid of scale 1; ggml's own rounding of integers is by its unrounded scale."""
    fmt = parse_format(row.spec)
    if "ggml's own" in row.rounding or row.offset:
        return
    levels = np.array(row.levels, np.float32)
    middle = (levels[1:] + levels[:-1]) / 2
    columns = max(fmt.whole, len(middle))
    weights = np.resize(middle, (1, columns))
    params = fmt.from_grid(np.full(fmt.blocks((1, columns)), 1.0 if fmt.whole < 256 else 32.0), None)
    scale = fmt.grid(params)[0].flat[0]
    got = (fmt.decode(fmt.encode(weights * scale, params), params) / scale)[0, : len(middle)]
    if "even" in row.rounding:
        expected = np.rint(middle)
    elif "lower level" in row.rounding or "lower one" in row.rounding:
        expected = levels[:-1]
    else:
        assert "nearer to zero" in row.rounding
        expected = np.where(middle > 0, levels[:-1], levels[1:])
    if isinstance(fmt, Codebook):  # not all midpoints are float32
        assert np.abs(got - middle).max() <= row.largest_step / 2 + 1e-6
    else:
        np.testing.assert_array_equal(got, expected)


def test_what_is_no_format() -> None:
    with pytest.raises(UsageError, match="unknown format 'fp8_e4m2'; did you mean fp8_e5m2 or fp8_e4m3"):
        explain("fp8_e4m2")
    with pytest.raises(UsageError, match="unknown format 'int9'; did you mean"):
        explain("int9:g64")
    with pytest.raises(UsageError, match="'g63' is not a block"):
        explain("int4:g63")
    with pytest.raises(UsageError, match="format fp64 has no blocks and no options; write 'fp64' alone"):
        explain("fp64:g64")


@pytest.mark.parametrize("row", ROWS, ids=name_of)
@pytest.mark.parametrize("cells", [72, 121])
def test_cells_hold_every_level_once(row: Explanation, cells: int) -> None:
    counts = count_in_cells(row, cells)
    assert len(counts) == cells
    assert sum(counts) == row.count
    assert min(counts) >= 0
    assert counts[0] > 0
    assert counts[-1] > 0


def test_cells_of_a_float_are_those_of_its_levels() -> None:
    """float16 counted by arithmetic and one by one."""
    levels = np.unique(parse_format("fp16").levels[np.isfinite(Cast("fp16").levels)]).astype(np.float64)
    at = np.floor((levels + 65504) / (2 * 65504) * 120 + 0.5).astype(int)
    counted = np.array(count_in_cells(explain("fp16"), 121))
    assert np.abs(counted - np.bincount(at)).max() <= 1  # a level on an edge may lie on either side
    assert np.abs(counted - counted[::-1]).max() <= 1


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_lines(row: Explanation) -> None:
    line, ends, legend = number_line(row)
    assert len(line) == len(ends) == 72
    assert len(legend) <= 80
    assert ends.split()[0] == format_figure(row.lowest)
    assert ends.split()[-1] == format_figure(row.highest)
    if row.count <= 32 and row.bits < 8 and not row.spec.startswith("fp4:"):
        assert line.count("|") == row.count
        if row.lowest < 0 and 0.0 in row.levels:
            assert line[ends.index(" 0 ") + 1] == "|"


@pytest.mark.parametrize(
    ("value", "text"),
    [(65504.0, "65504"), (-128.0, "-128"), (5.9604644775390625e-08, "5.96e-8"), (3.4028234663852886e38, "3.403e38"), (0.0, "0")],
)
def test_figures(value: float, text: str) -> None:
    assert format_figure(value) == text
