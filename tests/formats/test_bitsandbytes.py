"""nf4 and fp4 against bitsandbytes, where it is installed: the same tables, code order, scales and decoded bits.

Compared with bitsandbytes 0.50.2 on the CPU. What differs and is meant to: under double quantization bitsandbytes picks
codes for the scales before they were quantized, nybble for the scales as stored; and a midpoint of FP4 may round otherwise.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from nybble.formats import parse_format
from nybble.formats.codebook import LEVELS, dynamic_levels

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
functional: Any = pytest.importorskip("bitsandbytes.functional")
torch: Any = pytest.importorskip("torch")

SHAPE = (96, 256)
BLOCKS = (96, 4)


@pytest.fixture
def weight() -> NDArray[np.float32]:
    return (np.random.default_rng(0).standard_normal(SHAPE) * 0.02).astype(np.float32)


def quantize(weight: NDArray[np.float32], name: str, nested: bool) -> tuple[NDArray[np.uint8], Any, NDArray[np.float32]]:
    """(codes [N, K], state, decoded weight) of bitsandbytes; it packs the first of two codes in the high half."""
    packed, state = functional.quantize_4bit(torch.tensor(weight), blocksize=64, quant_type=name, compress_statistics=nested)
    both = packed.numpy().ravel()
    codes = np.stack([both >> 4, both & 15], axis=1).reshape(weight.shape)
    return codes, state, functional.dequantize_4bit(packed, state).numpy()


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_tables_and_code_order(name: str) -> None:
    theirs = functional.get_4bit_type(name, device="cpu").numpy()
    assert theirs.tobytes() == np.array(LEVELS[name], dtype=np.float32).tobytes()


def test_dynamic_map() -> None:
    assert functional.create_dynamic_map().numpy().tobytes() == dynamic_levels().tobytes()


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_decoded_bits(name: str, weight: NDArray[np.float32]) -> None:
    codes, state, theirs = quantize(weight, name, nested=False)
    params = {"scale": state.absmax.numpy().reshape(BLOCKS)}
    assert parse_format(f"{name}:g64").decode(codes, params).tobytes() == theirs.tobytes()


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_decoded_bits_of_double_quantization(name: str, weight: NDArray[np.float32]) -> None:
    codes, state, theirs = quantize(weight, name, nested=True)
    params = {
        "scale_codes": state.absmax.numpy().reshape(BLOCKS),
        "scale_scale": state.state2.absmax.numpy(),
        "scale_offset": np.array([state.offset.item()], dtype=np.float32),
    }
    assert parse_format(f"{name}:g64,dq").decode(codes, params).tobytes() == theirs.tobytes()


def test_nf4_codes(weight: NDArray[np.float32]) -> None:
    codes, state, _ = quantize(weight, "nf4", nested=False)
    params = {"scale": state.absmax.numpy().reshape(BLOCKS)}
    assert np.array_equal(parse_format("nf4:g64").encode(weight, params), codes)


def test_scales_of_double_quantization(weight: NDArray[np.float32]) -> None:
    _, state, _ = quantize(weight, "nf4", nested=True)
    params = parse_format("nf4:g64,dq").fit(weight)
    assert np.array_equal(params["scale_codes"].ravel(), state.absmax.numpy().ravel())
    np.testing.assert_allclose(params["scale_scale"], state.state2.absmax.numpy(), rtol=1e-6)
    np.testing.assert_allclose(params["scale_offset"], [state.offset.item()], rtol=1e-6)
