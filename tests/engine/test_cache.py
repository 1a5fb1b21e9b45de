"""What keys and values are held in: how far each type moves the logits, and the bytes it takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from nybble import kernels
from nybble.engine import Decoder
from nybble.engine.decoder import CACHES

MODELS = Path(__file__).parents[3] / "shared" / "data" / "models"
TYPES = ("f16", "int8", "int4")  # without int16, whose error is about that of f16

pytestmark = pytest.mark.skipif(not kernels.native_available(), reason="the numpy path keeps no cache")


def logits_of(folder: Path, cache: str, ids: list[int], exact: bool = True) -> NDArray[np.float32]:
    return Decoder.load(folder, threads=1, exact=exact, cache=cache).logits(ids)


def errors(folder: Path, ids: list[int]) -> list[float]:
    """How far f16, int8 and int4 move the logits, as a share of their size."""
    wanted = logits_of(folder, "f32", ids).astype(np.float64)
    return [float(np.linalg.norm(logits_of(folder, cache, ids) - wanted) / np.linalg.norm(wanted)) for cache in TYPES]


# Measured: stdlib-gpt2-6m 1.0e-4, 2.3e-3, 0.030; stories260k-llama 2.0e-4, 0.011, 0.096. Halves have 11 bits, int8 a scale
# for 32 values and 7 bits, int4 3 bits: each step loses 4 bits, so errors grow about sixteenfold.
@pytest.mark.parametrize(
    ("name", "vocabulary", "bounds"),
    [
        ("stdlib-gpt2-6m", 4096, [(2e-5, 4e-4), (5e-4, 1e-2), (8e-3, 0.1)]),
        ("stories260k-llama", 512, [(4e-5, 8e-4), (2e-3, 4e-2), (2e-2, 0.3)]),
    ],
)
def test_errors_grow_as_bits_shrink(name: str, vocabulary: int, bounds: list[tuple[float, float]]) -> None:
    if not (MODELS / name).is_dir():
        pytest.skip(f"{MODELS / name} is not here")
    found = errors(MODELS / name, np.random.default_rng(1).integers(3, vocabulary, 64).tolist())
    for cache, error, (low, high) in zip(TYPES, found, bounds, strict=True):
        assert low < error < high, f"{cache}: {error:.2g}"
    assert found[1] > 5 * found[0]
    assert found[2] > 5 * found[1]


@pytest.mark.parametrize("head_dim", [8, 16, 20, 32, 40, 64])
@pytest.mark.parametrize("cache", CACHES)
def test_heads_of_any_width(cache: str, head_dim: int, families: dict[str, Any], tmp_path: Path) -> None:
    """A head's dimensions are filled up to 16 or 32; what fills them must not reach the logits."""
    import torch
    import transformers

    settings = {**families["llama"][1], "head_dim": head_dim}
    with torch.random.fork_rng():
        torch.manual_seed(head_dim)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).eval()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "model")
    ids = np.random.default_rng(1).integers(3, 97, 40)
    with torch.inference_mode():
        wanted = model(input_ids=torch.tensor(ids[None])).logits[0].numpy()
    error = np.linalg.norm(logits_of(tmp_path / "model", cache, ids.tolist()) - wanted) / np.linalg.norm(wanted)
    low, high = {"f32": (0, 1e-5), "f16": (1e-5, 1e-3), "int16": (1e-6, 1e-3), "int8": (2e-4, 0.02), "int4": (5e-3, 0.3)}[cache]
    assert low <= error < high, f"{error:.2g}"


@pytest.mark.parametrize("cache", CACHES)
def test_a_text_has_the_same_bits_however_it_is_read(cache: str, tiny: Callable[..., Any], tmp_path: Path) -> None:
    """Rows that others of the same tile of sixteen positions surround, and caches that other texts have used."""
    for name in ("gpt2", "qwen3"):
        tiny(name).save_pretrained(tmp_path / name)
        ids = np.random.default_rng(2).integers(3, 97, 50).tolist()
        decoder = Decoder.load(tmp_path / name, threads=2, cache=cache)
        whole = decoder.logits(ids)
        decoder.generate(ids[::-1], max_new_tokens=14, stop_tokens=())
        for count in (1, 15, 16, 17, 33, 50):
            np.testing.assert_array_equal(decoder.prefill(ids[:count]), whole[count - 1])
        prompts = [ids[:31], ids[:1], ids[:16]]
        new = decoder.generate_batch(prompts, max_new_tokens=20, stop_tokens=())
        assert new == [decoder.generate(prompt, max_new_tokens=20, stop_tokens=()) for prompt in prompts]
        text = prompts[0] + new[0]
        assert [int(row.argmax()) for row in decoder.logits(text)[30:-1]] == new[0]


def test_zeros_and_large_values_in_a_cache(families: dict[str, Any], tmp_path: Path) -> None:
    """A group of zeros has scale 0; values far apart share one."""
    import torch
    import transformers

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**families["llama"][1])).eval()
    attention = model.model.layers[0].self_attn
    attention.v_proj.weight.data[:16] = 0
    attention.v_proj.weight.data[16] *= 1000
    attention.k_proj.weight.data[:] = 0
    model.save_pretrained(tmp_path / "model")
    ids = np.random.default_rng(3).integers(3, 97, 40).tolist()
    with torch.inference_mode():
        wanted = model(input_ids=torch.tensor([ids])).logits[0].numpy()
    for cache, most in (("f32", 1e-5), ("f16", 1e-3), ("int16", 1e-2), ("int8", 0.1), ("int4", 0.6)):
        got = logits_of(tmp_path / "model", cache, ids)
        assert np.linalg.norm(got - wanted) / np.linalg.norm(wanted) < most


def test_bytes_for_a_position(tiny_folder: Path, tiny: Callable[..., Any], tmp_path: Path) -> None:
    """Keys and values of 2 layers with 4 heads of 16: four bits are filled up to 32, scales are halves."""
    found = {cache: Decoder.load(tiny_folder, cache=cache).position_bytes for cache in CACHES}
    heads = 2 * 2 * 4
    assert found == {
        "f32": heads * 64,
        "f16": heads * 32,
        "int16": heads * (32 + 4),
        "int8": heads * (16 + 2),
        "int4": heads * (16 + 2),
    }
    tiny("llama").save_pretrained(tmp_path / "llama")  # two key-value heads serve four
    assert Decoder.load(tmp_path / "llama", cache="f16").position_bytes == 2 * 2 * 2 * 32


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "gemma2"])
def test_int16_rounds_as_the_reference_says(name: str, families: dict[str, Any], tmp_path: Path) -> None:
    """Several spans of positions; grouped heads, a window and capped scores among the families."""
    import torch
    import transformers

    from nybble.engine import reference

    kind, settings = families[name]
    longer = {key: 200 for key in ("n_positions", "max_position_embeddings") if key in settings}
    model_class = getattr(transformers, kind)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(model_class.config_class(**{**settings, **longer})).eval()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / name)
    ids = np.random.default_rng(4).integers(3, 97, 150)
    decoder = Decoder.load(tmp_path / name, threads=1, exact=True, cache="int16")
    weights, program = decoder._weights, decoder._program

    def decoded(matrix: Any) -> NDArray[np.float32]:
        laid = weights.matrix(matrix, 1)
        return kernels.rows_of(laid, np.arange(laid.rows))

    got = decoder.logits(ids.tolist())
    rounded, plain = (reference.logits(program, ids, decoded, weights.vector, shorts) for shorts in (True, False))
    size = np.linalg.norm(plain)
    rounding = np.linalg.norm(rounded - plain) / size
    assert 1e-6 < rounding < 1e-3
    assert np.linalg.norm(got - rounded) / size < 0.2 * rounding + 2e-6


def test_the_default_is_f32_when_exact(tiny_folder: Path) -> None:
    assert Decoder.load(tiny_folder, exact=True).cache == "f32"
    assert Decoder.load(tiny_folder).cache == "int16"
    assert Decoder.load(tiny_folder, exact=True, cache="int8").cache == "int8"
