"""ggml's formats beside ggml's own C code: rounding to the bit, decoding to the bit, and no larger error where we search.

Skipped where llama-cpp-python is not installed; NYBBLE_GGML_LIBRARY may name its libggml-base (ggml_library.py). A build whose
compiler fuses products with additions gives another code to a weight in a million; against such a build codes may then differ
by one, in at most ten of a million weights, and nothing else may.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ggml_layout import SIZES, pack, unpack
from ggml_library import Ggml, find
from numpy.typing import NDArray

from nybble.formats import parse_format

ROUNDED = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "mxfp4")
Weight = NDArray[np.float32]
UNDEFINED = 1e-36
"""Steps of smaller blocks have no float32 as inverse: their scale is 0, and which codes ggml has is up to its compiler."""


@pytest.fixture(scope="module")
def ggml() -> Ggml:
    path = find()
    if path is None:
        pytest.skip("llama-cpp-python, which brings ggml's library, is not installed")
    return Ggml(path)


def same(name: str, weight: Weight, ggml: Ggml) -> None:
    codes, params = parse_format(name).round(weight)
    theirs, their_params = ggml.round(name, weight)
    for key, values in params.items():
        np.testing.assert_array_equal(values.view(np.uint8), their_params[key].view(np.uint8), err_msg=key)
    if ggml.fuses_products():
        assert np.abs(codes.astype(int) - theirs).max() <= 1
        assert (codes != theirs).mean() <= 1e-5
    else:
        largest = np.abs(weight).reshape(len(weight), -1, 32).max(-1)
        defined = np.repeat((largest == 0) | (largest >= UNDEFINED), 32, axis=1)
        np.testing.assert_array_equal(codes[defined], theirs[defined])


def samples(rng: np.random.Generator, rows: int) -> dict[str, Weight]:
    """1,048,576 weights of each kind for 512 rows."""
    shape = (rows, 2048)
    ties = rng.integers(-254, 255, shape) / 2.0 * 2.0 ** rng.integers(-20, 5, (rows, 1))
    both_ends = rng.standard_normal(shape)
    both_ends.reshape(-1, 32)[:, 3] = 4.0
    both_ends.reshape(-1, 32)[:, 20] = -4.0
    sparse = np.where(rng.random(shape) < 0.97, 0, rng.standard_normal(shape))
    return {
        "normal": rng.standard_normal(shape),
        "student": rng.standard_t(2, shape).clip(-1e4, 1e4),
        "uniform": rng.uniform(-1, 1, shape),
        "of all sizes": rng.standard_normal(shape) * 2.0 ** rng.integers(-30, 12, (rows, 1)),
        "small scales": rng.standard_normal(shape) * 2.0 ** rng.integers(-26, -12, (rows, 1)),
        "ties": ties,
        "both ends": both_ends,
        "sparse": sparse,
    }  # fmt: skip


@pytest.mark.parametrize("name", ROUNDED)
def test_rounding(name: str, ggml: Ggml) -> None:
    """8 M weights."""
    for kind, weight in samples(np.random.default_rng(0), 512).items():
        same(name, weight.astype(np.float32), ggml), kind


@pytest.mark.parametrize("name", ROUNDED)
def test_rounding_of_edges(name: str, ggml: Ggml) -> None:
    """Zeros, subnormals, one weight alone at every place, weights next to the powers of two, and the largest that there are."""
    blocks = [np.zeros(32), np.full(32, -0.0), np.full(32, 2.0**-149), np.linspace(-1e-44, 1e-44, 32)]
    alone = np.eye(32)
    blocks += [*alone, *-alone, *(alone * 2.0**-24), *(alone * 1e-40)]
    for power in range(-149, 16):
        one = np.float32(2.0**power)
        for size in (one, np.nextafter(one, np.float32(0)), np.nextafter(one, np.float32(np.inf)), one * np.float32(1.5)):
            block = np.linspace(-1, 1, 32) * float(size)
            block[7] = size
            blocks += [block, -block]
    limit = {"q4_0": 65504 * 8, "q5_0": 65504 * 16, "q8_0": 65504 * 127, "mxfp4": 3e38}.get(name, 65504)
    blocks += [np.linspace(-1, 0.9, 32) * limit * share for share in (1, 0.5, 0.25)]
    if name == "mxfp4":
        blocks += [np.linspace(-1, 0.9, 32) * 2.0**power for power in range(16, 127)]
    weight = np.array(blocks).astype(np.float32).reshape(1, -1)
    if name in ("q4_1", "q5_1"):
        weight[0, -96:] *= np.float32(0.5)  # their shift, too, is a float16
    same(name, weight, ggml)


@pytest.mark.parametrize("name", SIZES)
def test_decoding_over_every_scale_and_code(name: str, ggml: Ggml) -> None:
    """All float16 (or exponents) with all codes; of scales of scales, every multiplier with every float16 in turn."""
    fmt = parse_format(name)
    _, columns, size = SIZES[name]
    count = 256 if name == "mxfp4" else 1 << 16
    rng = np.random.default_rng(1)
    with np.errstate(all="ignore"):
        for _ in range(4 if columns == 256 else -(-(2**fmt.bits) // 32)):
            blocks = rng.integers(0, 256, (16, count // 16, size), dtype=np.uint8)
            codes, params = unpack(name, blocks)
            for key in params:
                if params[key].dtype == np.float16:
                    params[key] = rng.permutation(np.arange(count, dtype=np.uint16)).view(np.float16).reshape(params[key].shape)
            if columns == 32:
                codes = np.resize(rng.permutation(2**fmt.bits).astype(np.uint8), codes.shape)
            if name == "mxfp4":
                params["exponent"] = np.arange(256, dtype=np.uint8).reshape(params["exponent"].shape)
            blocks = pack(name, codes, params)
            again, params_again = unpack(name, blocks)
            np.testing.assert_array_equal(again, codes)
            ours, theirs = fmt.decode(codes, params_again), ggml.decode(name, blocks)
            finite = np.isfinite(theirs)
            np.testing.assert_array_equal(ours[finite], theirs[finite])
            np.testing.assert_array_equal(
                ours.view(np.uint32)[finite & (ours != 0)], theirs.view(np.uint32)[finite & (theirs != 0)]
            )
            np.testing.assert_array_equal(np.isnan(ours), np.isnan(theirs))


def loss(name: str, weight: Weight, found: tuple[Any, Any], importance: Weight | None) -> float:
    error = parse_format(name).decode(*found).astype(np.float64) - weight
    return float((error**2 * (1 if importance is None else importance)).sum())


@pytest.mark.parametrize("kind", ["normal", "student", "uniform", "of all sizes", "sparse", "both ends"])
@pytest.mark.parametrize("name", SIZES)
def test_no_larger_error_than_ggml_leaves(name: str, kind: str, ggml: Ggml) -> None:
    """With importance in every format (ggml takes it into account in all but q8_0 and mxfp4), without it where we search."""
    rng = np.random.default_rng(2)
    weight = samples(rng, 128)[kind].astype(np.float32)
    importance = rng.gamma(0.4, 1, 2048).astype(np.float32) + np.float32(1e-4)
    for weights in (None, importance) if name not in ROUNDED else (importance,):
        ours = loss(name, weight, parse_format(name).round(weight, weights), weights)
        theirs = loss(name, weight, ggml.round(name, weight, weights), weights)
        assert ours <= theirs * 1.000001


@pytest.mark.parametrize("name", SIZES)
def test_gguf_py_decodes_the_same(name: str) -> None:
    gguf = pytest.importorskip("gguf", reason="gguf-py is not installed")
    blocks = np.random.default_rng(3).integers(0, 256, (64, 8, SIZES[name][2]), dtype=np.uint8)
    codes, params = unpack(name, blocks)
    kind = gguf.GGMLQuantizationType[name.upper()]
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(parse_format(name).decode(codes, params), gguf.dequantize(blocks.reshape(64, -1), kind))
