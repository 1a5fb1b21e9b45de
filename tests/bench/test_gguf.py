"""The GGUF file that llama.cpp is raced with: the order of rotary rows by its meaning, and the file by gguf's own reader."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nybble.bench.gguf_writer import rotary_order, write_gguf
from nybble.errors import InputError, NumericError

HEADS, WIDTH = 3, 8


def turned(x: np.ndarray[Any, Any], position: int, neighbours: bool) -> np.ndarray[Any, Any]:
    """A head's vector [WIDTH] under the rotary embedding: pairs of neighbours, or of the two halves."""
    angle = position * 10000.0 ** (-np.arange(WIDTH // 2) * 2 / WIDTH)
    first, second = (x[0::2], x[1::2]) if neighbours else (x[: WIDTH // 2], x[WIDTH // 2 :])
    parts = first * np.cos(angle) - second * np.sin(angle), first * np.sin(angle) + second * np.cos(angle)
    return np.stack(parts, axis=-1).ravel() if neighbours else np.concatenate(parts)


def test_rotary_order_keeps_attention_scores() -> None:
    """Query times key after each runtime's own rotation is the same number: what the order of rows is for."""
    rng = np.random.default_rng(0)
    query, key = (rng.standard_normal((HEADS * WIDTH, 16)).astype(np.float32) for _ in range(2))
    x, y = rng.standard_normal((2, 16))
    for head in range(HEADS):
        rows = slice(head * WIDTH, (head + 1) * WIDTH)
        q, k = (turned(m[rows] @ v, at, False) for m, v, at in ((query, x, 11), (key, y, 4)))
        q2, k2 = (turned(rotary_order(m, WIDTH)[rows] @ v, at, True) for m, v, at in ((query, x, 11), (key, y, 4)))
        assert q @ k == pytest.approx(q2 @ k2, rel=1e-5)
        assert not np.allclose(q, q2), "the order is not the same, only the product is"


def test_rotary_order_of_a_bias_goes_with_its_matrix() -> None:
    rows = np.arange(HEADS * WIDTH, dtype=np.float32)
    matrix = np.repeat(rows[:, None], 5, axis=1)
    assert (rotary_order(matrix, WIDTH)[:, 0] == rotary_order(rows, WIDTH)).all()
    assert rotary_order(rows, WIDTH)[:WIDTH].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


@pytest.fixture(scope="module")
def gguf() -> Any:
    return pytest.importorskip("gguf", reason="needs the gguf package (pip install gguf), whose reader is the judge")


@pytest.fixture(scope="module")
def folders(gguf: Any, tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., Any]) -> Path:
    root = tmp_path_factory.mktemp("gguf")
    for name in ("gpt2", "llama", "llama-tied", "mistral"):
        tiny(name).save_pretrained(root / name)
    return root


def read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
    reader = importlib.import_module("gguf").GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: np.array(tensor.data) for tensor in reader.tensors}


def state(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    from transformers import AutoModelForCausalLM

    return {name: t.detach().numpy() for name, t in AutoModelForCausalLM.from_pretrained(folder).state_dict().items()}


def test_gpt2_is_written_whole(folders: Path, tmp_path: Path) -> None:
    write_gguf(folders / "gpt2", tmp_path / "m.gguf")
    fields, tensors = read(tmp_path / "m.gguf")
    weights = state(folders / "gpt2")
    assert fields["general.architecture"] == "gpt2"
    assert fields["gpt2.vocab_size"] == 97
    assert fields["gpt2.block_count"] == 2
    assert fields["gpt2.attention.head_count"] == 4
    assert fields["gpt2.feed_forward_length"] == 256
    assert fields["tokenizer.ggml.model"] == "none"
    assert len(tensors) == len(set(weights) - {"lm_head.weight"})
    half = np.float16
    assert (tensors["blk.1.attn_qkv.weight"] == weights["transformer.h.1.attn.c_attn.weight"].T.astype(half)).all()
    assert (tensors["blk.0.ffn_down.weight"] == weights["transformer.h.0.mlp.c_proj.weight"].T.astype(half)).all()
    assert (tensors["blk.0.ffn_up.bias"] == weights["transformer.h.0.mlp.c_fc.bias"]).all()
    assert (tensors["token_embd.weight"] == weights["transformer.wte.weight"].astype(half)).all()
    assert (tensors["position_embd.weight"] == weights["transformer.wpe.weight"]).all()
    assert (tensors["output_norm.bias"] == weights["transformer.ln_f.bias"]).all()


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_llama_is_written_whole(name: str, folders: Path, tmp_path: Path) -> None:
    write_gguf(folders / name, tmp_path / "m.gguf")
    fields, tensors = read(tmp_path / "m.gguf")
    weights = state(folders / name)
    assert fields["llama.attention.head_count_kv"] == 2
    assert fields["llama.rope.dimension_count"] == 16
    assert fields["llama.rope.freq_base"] == 10000.0
    assert fields["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    assert ("output.weight" in tensors) == (name == "llama")
    half = np.float16
    key = weights["model.layers.1.self_attn.k_proj.weight"]
    assert (tensors["blk.1.attn_k.weight"] == rotary_order(key, 16).astype(half)).all()
    assert (tensors["blk.1.attn_v.weight"] == weights["model.layers.1.self_attn.v_proj.weight"].astype(half)).all()
    assert (tensors["blk.0.ffn_gate.weight"] == weights["model.layers.0.mlp.gate_proj.weight"].astype(half)).all()
    assert (tensors["blk.0.ffn_norm.weight"] == weights["model.layers.0.post_attention_layernorm.weight"]).all()


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("mistral", {}, "'mistral'"),
        ("gpt2", {"activation_function": "relu"}, "'relu'"),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "'llama3'"),
        ("llama", {"hidden_act": "gelu"}, "'gelu'"),
    ],
)
def test_what_it_cannot_say_is_refused(name: str, change: dict[str, Any], words: str, folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / name, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(InputError, match=words):
        write_gguf(tmp_path / "m", tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.usefixtures("gguf")
def test_a_weight_beyond_float16_is_refused(tiny: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny("gpt2")
    model.transformer.h[1].mlp.c_fc.weight.data[3, 5] = 70000.0
    model.save_pretrained(tmp_path / "m")
    with pytest.raises(NumericError, match=r"h\.1\.mlp\.c_fc\.weight: a weight of 7e"):
        write_gguf(tmp_path / "m", tmp_path / "m.gguf")
