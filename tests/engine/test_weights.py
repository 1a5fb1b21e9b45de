"""What a folder holds, and what the engine makes of it: shards, halves, weights that are broken, bytes in memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from nybble.engine import Decoder
from nybble.errors import InputError, NumericError
from nybble.models.loading import load_model

LIMIT = 1e-4
"""What exact mode may differ by, as a share of the largest logit."""


@pytest.fixture(scope="module")
def text() -> list[int]:
    found: list[int] = np.random.default_rng(1).integers(3, 97, 20).tolist()
    return found


@pytest.fixture(scope="module")
def decoder(tiny_folder: Path) -> Decoder:
    """The tiny GPT-2, one thread, exact."""
    return Decoder.load(tiny_folder, threads=1, exact=True)


def torch_logits(model: Any, ids: list[int]) -> NDArray[np.float32]:
    with torch.inference_mode():
        found: NDArray[np.float32] = model(input_ids=torch.tensor([ids])).logits[0].numpy()
    return found


def apart(got: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    return float(np.abs(got.astype(np.float64) - wanted).max() / np.abs(wanted).max())


def one_line(error: BaseException) -> None:
    assert "\n" not in str(error)
    assert len(str(error)) < 250


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("gpt2", "transformer.wte.weight"), ("gpt2", "transformer.h.0.attn.c_attn.weight"),
        ("gpt2", "transformer.h.1.attn.c_proj.weight"), ("gpt2", "transformer.h.0.mlp.c_fc.weight"),
        ("gpt2", "transformer.h.1.mlp.c_proj.weight"), ("llama", "model.layers.0.self_attn.q_proj.weight"),
        ("llama", "model.layers.0.self_attn.k_proj.weight"), ("llama", "model.layers.1.self_attn.v_proj.weight"),
        ("llama", "model.layers.1.mlp.gate_proj.weight"), ("llama", "lm_head.weight"),
    ],
)  # fmt: skip
def test_weights_that_are_not_finite_are_an_error(
    name: str, place: str, value: float, tiny: Callable[..., Any], tmp_path: Path, text: list[int]
) -> None:
    """Whatever a broken weight makes of the logits, no text comes out of it."""
    model = tiny(name)
    weight = dict(model.named_parameters())[place]
    weight.data[5:7] = value  # rows, or for Conv1D columns: in c_attn queries, keys and values alike
    model.save_pretrained(tmp_path / "broken")
    for exact in (True, False):
        for how in ({}, {"temperature": 0.8}):
            with pytest.raises(NumericError, match="not finite") as caught:
                Decoder.load(tmp_path / "broken", threads=1, exact=exact).generate([5, 6, *text], max_new_tokens=3, **how)
            one_line(caught.value)


@pytest.mark.parametrize("columns", [slice(0, 4), slice(64, 68), slice(128, 132)], ids=["queries", "keys", "values"])
def test_nan_in_one_part_of_attention_is_an_error(
    columns: slice, tiny: Callable[..., Any], tmp_path: Path, text: list[int]
) -> None:
    model = tiny("gpt2")
    model.transformer.h[0].attn.c_attn.weight.data[:, columns] = math.nan
    model.save_pretrained(tmp_path / "broken")
    for exact in (True, False):
        with pytest.raises(NumericError, match="not finite"):
            Decoder.load(tmp_path / "broken", threads=1, exact=exact).generate(text, max_new_tokens=3)


def test_nan_before_a_relu_is_an_error(families: dict[str, Any], tmp_path: Path, text: list[int]) -> None:
    import transformers

    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**families["gpt2"][1], activation_function="relu"))
    model.transformer.h[0].mlp.c_fc.weight.data[:, 3] = math.nan
    model.save_pretrained(tmp_path / "broken")
    for exact in (True, False):
        with pytest.raises(NumericError, match="not finite"):
            Decoder.load(tmp_path / "broken", threads=1, exact=exact).generate(text, max_new_tokens=3)


def test_a_norm_that_is_not_finite_is_found_when_loading(tiny: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny("llama")
    model.model.norm.weight.data[3] = math.nan
    model.save_pretrained(tmp_path / "broken")
    with pytest.raises(InputError, match=r"model.norm.weight has values that are not finite") as caught:
        Decoder.load(tmp_path / "broken")
    one_line(caught.value)


# ---- folders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_checkpoint_in_shards_and_in_halves(
    dtype: torch.dtype, tiny: Callable[..., Any], tmp_path: Path, text: list[int]
) -> None:
    for name in ("gpt2", "llama"):
        model = tiny(name).to(dtype)
        model.save_pretrained(tmp_path / name, max_shard_size="40KB")
        assert len(list((tmp_path / name).glob("*.safetensors"))) > 1
        wanted = torch_logits(load_model(tmp_path / name), text)
        assert apart(Decoder.load(tmp_path / name, threads=1, exact=True).logits(text), wanted) < LIMIT


def test_a_checkpoint_of_the_base_model(tiny: Callable[..., Any], tmp_path: Path, decoder: Decoder, text: list[int]) -> None:
    """Names without `transformer.`, as GPT-2 is published."""
    tiny("gpt2").transformer.save_pretrained(tmp_path / "base")
    got = Decoder.load(tmp_path / "base", threads=1, exact=True).logits(text)
    np.testing.assert_array_equal(got, decoder.logits(text))


def test_bytes_are_those_of_the_weights(decoder: Decoder) -> None:
    # 97 rows are filled up to 112, in the tied table and head too, which are there once.
    layers = 2 * (64 * 192 + 64 * 64 + 2 * 64 * 256) * 4
    assert decoder.weight_bytes == layers + (112 + 64) * 64 * 4
    assert decoder.token_bytes == layers + 112 * 64 * 4
    assert decoder.position_bytes == 2 * 2 * 64 * 4
