"""A float GPT-2 or Llama folder as a GGUF file in F16, for llama.cpp: matrices in float16, vectors in float32.

Written with llama.cpp's own `gguf` package, which knows the tensors' names. What it does not know is done here: GPT-2's
Conv1D matrices stand transposed, and Llama's query and key rows are put in the order of llama.cpp's rotary embedding.
No tokenizer is written (`tokenizer.ggml.model` is "none"): a race hands over token ids.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nybble.errors import InputError, NumericError
from nybble.files.safetensors import SafetensorsFile

NOT_WEIGHTS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
"""Buffers that old checkpoints carry."""


def write_gguf(source: Path, target: Path) -> None:
    """Write the folder `source` (config.json, *.safetensors) as `target`.

    Raises InputError for an architecture or a setting that this writer does not know, NumericError for a weight that
    float16 cannot hold.
    """
    gguf: Any = importlib.import_module("gguf")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    architecture = config.get("model_type")
    if architecture not in ("gpt2", "llama"):
        raise InputError(f"model_type {architecture!r}: only gpt2 and llama are written as GGUF for llama.cpp")
    out = gguf.GGUFWriter(None, architecture)
    (_describe_gpt2 if architecture == "gpt2" else _describe_llama)(out, config)
    out.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    out.add_vocab_size(config["vocab_size"])
    out.add_tokenizer_model("none")
    layers = config["n_layer" if architecture == "gpt2" else "num_hidden_layers"]
    kind = gguf.MODEL_ARCH.GPT2 if architecture == "gpt2" else gguf.MODEL_ARCH.LLAMA
    names = gguf.get_tensor_name_map(kind, layers)
    for name, values in _tensors(source):
        if name == "lm_head.weight" and config.get("tie_word_embeddings", architecture == "gpt2"):
            continue
        known = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if known is None:
            raise InputError(f"tensor {name!r} has no place in a GGUF file of {architecture}")
        out.add_tensor(known, _as_stored(name, values, config))
    out.write_header_to_file(path=target)
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def _describe_gpt2(out: Any, config: dict[str, Any]) -> None:
    _check(config, "activation_function", "gelu_new", "gelu_new")
    out.add_context_length(config["n_positions"])
    out.add_embedding_length(config["n_embd"])
    out.add_feed_forward_length(config.get("n_inner") or 4 * config["n_embd"])
    out.add_block_count(config["n_layer"])
    out.add_head_count(config["n_head"])
    out.add_layer_norm_eps(config["layer_norm_epsilon"])


def _describe_llama(out: Any, config: dict[str, Any]) -> None:
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    _check(config, "hidden_act", "silu", "silu")
    _check(rope, "rope_type", "default", "default")
    heads, width = config["num_attention_heads"], _head_width(config)
    out.add_context_length(config["max_position_embeddings"])
    out.add_embedding_length(config["hidden_size"])
    out.add_feed_forward_length(config["intermediate_size"])
    out.add_block_count(config["num_hidden_layers"])
    out.add_head_count(heads)
    out.add_head_count_kv(config.get("num_key_value_heads") or heads)
    out.add_layer_norm_rms_eps(config["rms_norm_eps"])
    out.add_key_length(width)
    out.add_value_length(width)
    out.add_rope_dimension_count(width)
    out.add_rope_freq_base(float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0))


def _check(config: dict[str, Any], key: str, default: str, wanted: str) -> None:
    if config.get(key, default) != wanted:
        raise InputError(f"{key} {config[key]!r}: llama.cpp's GGUF of this architecture is written for {wanted!r} only")


def _head_width(config: dict[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _tensors(source: Path) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """(name as transformers calls it, float32 values) of every weight in the folder, one at a time."""
    for path in sorted(source.glob("*.safetensors")):
        file = SafetensorsFile(path)
        for name, entry in file.entries.items():
            if name.endswith(NOT_WEIGHTS):
                continue
            values = file.read(name)
            if entry.dtype == "BF16":
                values = (values.astype(np.uint32) << 16).view(np.float32)
            yield name, values.astype(np.float32)


def _as_stored(name: str, values: NDArray[np.float32], config: dict[str, Any]) -> NDArray[Any]:
    if config["model_type"] == "gpt2" and name.endswith(".weight") and ".c_" in name:
        values = values.T
    if ".q_proj." in name or ".k_proj." in name:
        values = rotary_order(values, _head_width(config))
    if values.ndim == 1 or name.endswith("wpe.weight"):
        return np.ascontiguousarray(values)
    with np.errstate(over="ignore"):
        half = np.ascontiguousarray(values, dtype=np.float16)
    if not np.isfinite(half).all():
        raise NumericError(f"{name}: a weight of {np.abs(values).max():.3g} does not fit float16 (65504), which GGUF's F16 needs")
    return half


def rotary_order(values: NDArray[np.float32], width: int) -> NDArray[np.float32]:
    """Rows [heads * width, ...] of a query or key projection in llama.cpp's order.

    transformers turns rows i and i + width / 2 of a head together, llama.cpp rows 2i and 2i + 1.
    """
    pairs = values.reshape(-1, 2, width // 2, *values.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(values.shape))
