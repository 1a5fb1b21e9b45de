"""The packed weights of a file or folder as others decode them, by their names in a checkpoint: float32 [out, in] each.

GGUF by gguf-py, with its names and llama.cpp's order of rows; bitsandbytes and compressed-tensors by these libraries; GPTQ and
AWQ by the few lines below, from the formats' descriptions. None of nybble's code.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from readers import reader

gguf, bnb, _ = (reader(name) for name in ("gguf", "bitsandbytes", "compressed_tensors"))
Weight = NDArray[np.float32]
Part = Callable[[str], NDArray[Any]]
PARTS = {"gptq": "qweight", "awq": "qweight", "compressed-tensors": "weight_scale", "bitsandbytes": "weight"}
"""Container -> a part that each packed module has."""


def decoded(path: Path) -> dict[str, Weight]:
    """All packed weights of a GGUF file, or of a folder whose config.json names another project's method."""
    return decoded_gguf(path) if path.is_file() else decoded_folder(path)


def names(config: Mapping[str, Any]) -> Callable[[str], str]:
    """Name of a checkpoint's tensor -> its name in a GGUF file, by gguf-py."""
    number = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == config["model_type"])
    table = gguf.get_tensor_name_map(number, config.get("num_hidden_layers") or config["n_layer"])
    return lambda name: str(table.get_name(name, try_suffixes=(".weight", ".bias")))


def heads_of(name: str, config: Mapping[str, Any]) -> int:
    """Heads whose rows llama.cpp's converter turns in pairs: those of Llama's queries and keys; 0 for all else."""
    part = name.split(".")[-2]
    if config["model_type"] != "llama" or part not in ("q_proj", "k_proj"):
        return 0
    return int(config["num_attention_heads" if part == "q_proj" else "num_key_value_heads"])


def rows_there(name: str, config: Mapping[str, Any], values: NDArray[Any]) -> NDArray[Any]:
    """Rows of a checkpoint's tensor as they lie in a GGUF file."""
    heads = heads_of(name, config)
    return values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape) if heads else values


def rows_here(name: str, config: Mapping[str, Any], values: NDArray[Any]) -> NDArray[Any]:
    """Inverse of `rows_there`."""
    heads = heads_of(name, config)
    return values.reshape(heads, -1, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape) if heads else values


def values_of(tensor: Any) -> Weight:
    """float32 of a tensor of gguf-py's reader."""
    found: Weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
    return found


def decoded_gguf(path: Path) -> dict[str, Weight]:
    """By gguf-py; checkpoint names are found by turning its table round."""
    from nybble.containers import open_contents  # for the names of the tensors alone

    contents = open_contents(path)
    there = names(contents.config)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    return {name: rows_here(name, contents.config, values_of(tensors[there(name)])) for name in contents.packed}


def decoded_folder(path: Path) -> dict[str, Weight]:
    """By the method that config.json names."""
    from safetensors.torch import load_file

    settings = json.loads((path / "config.json").read_text())["quantization_config"]
    tensors, method = load_file(path / "model.safetensors"), settings["quant_method"]
    suffix = f".{PARTS[method]}"
    modules = [name.removesuffix(suffix) for name in tensors if name.endswith(suffix)]
    if method == "bitsandbytes":
        modules = [m for m in modules if f"{m}.weight.absmax" in tensors or f"{m}.SCB" in tensors]
    how = {"gptq": gptq, "awq": awq, "bitsandbytes": bitsandbytes, "compressed-tensors": compressed_tensors}[method]
    return {
        f"{m}.weight": how({n.removeprefix(f"{m}."): t for n, t in tensors.items() if n.startswith(f"{m}.")}, settings)
        for m in modules
    }


def words(packed: NDArray[np.int32], bits: int) -> NDArray[np.int64]:
    """[R, W] of words -> [R, W * 32 / bits] of fields, the lowest first."""
    fields = packed.astype(np.int64)[..., None] >> np.arange(0, 32, bits)
    return (fields & (2**bits - 1)).reshape(len(packed), -1)


def gptq(parts: Mapping[str, Any], settings: Mapping[str, Any]) -> Weight:
    """qweight is packed along the rows of [in, out], qzeros along its columns, less one in version 1."""
    part = {name: tensor.numpy() for name, tensor in parts.items()}
    bits, one = settings["bits"], int(settings["checkpoint_format"] == "gptq")
    codes, zeros, group = words(part["qweight"].T, bits).T, words(part["qzeros"], bits) + one, part["g_idx"]
    return ((codes - zeros[group]) * part["scales"].astype(np.float32)[group]).T.astype(np.float32)


def awq(parts: Mapping[str, Any], settings: Mapping[str, Any]) -> Weight:
    """Both are packed along the columns of [in, out], eight of which stand in the order 0 2 4 6 1 3 5 7."""
    part = {name: tensor.numpy() for name, tensor in parts.items()}
    order = np.argsort([0, 2, 4, 6, 1, 3, 5, 7])
    codes, zeros = (words(part[name], 4).reshape(len(part[name]), -1, 8)[..., order] for name in ("qweight", "qzeros"))
    codes, zeros = codes.reshape(len(codes), -1), zeros.reshape(len(zeros), -1)
    group = np.arange(len(codes)) // settings["group_size"]
    return ((codes - zeros[group]) * part["scales"].astype(np.float32)[group]).T.astype(np.float32)


def bitsandbytes(parts: Mapping[str, Any], settings: Mapping[str, Any]) -> Weight:
    """Its own functions; values of 8 bits as transformers takes them apart: code * SCB * (1/127)."""
    if "SCB" in parts:
        wide = parts["weight"].numpy().astype(np.float32) * parts["SCB"].numpy()[:, None]
        return (wide * np.float32(1 / 127)).astype(np.float32)
    stored = {name.removeprefix("weight."): tensor for name, tensor in parts.items() if name.startswith("weight.")}
    state = bnb.functional.QuantState.from_dict(stored, device="cpu")
    state.dtype = torch.float32
    found: Weight = bnb.functional.dequantize_4bit(parts["weight"], state).numpy()
    return found


def compressed_tensors(parts: Mapping[str, Any], settings: Mapping[str, Any]) -> Weight:
    """The library's own decompressor."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    scheme = QuantizationScheme(**settings["config_groups"]["group_0"])
    kept = {name: tensor for name, tensor in parts.items() if name.startswith("weight")}
    found: Weight = BaseCompressor.get_value_from_registry(settings["format"]).decompress(kept, scheme)["weight"].float().numpy()
    return found
