"""gguf-py and nybble read each other's GGUF files: every value to the bit, every code and key kept. Names and the order of rows
are those of gguf-py's tables and of llama.cpp's converter, not of ours."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from decoders import names, rows_there, values_of
from ggml_layout import SIZES, pack, unpack
from llama import quantize
from readers import MODELS, reader

from nybble import demo
from nybble.containers import open_contents
from nybble.convert import convert
from nybble.files.gguf import GgufFile
from nybble.formats import parse_format

gguf = reader("gguf")
CASTS = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
QUANTIZES = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "mxfp4")
"""Formats that gguf-py encodes."""
FILE_TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "IQ4_NL", "IQ4_XS")
FEW = ("Q5_1", "Q2_K", "Q3_K_M", "Q4_K_M", "IQ4_XS")
"""File types for all models but the first, and those that also go through a folder of ours."""


def tensors_of(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def raw(tensors: Mapping[str, Any]) -> dict[str, tuple[str, bytes]]:
    return {name: (tensor.tensor_type.name, tensor.data.tobytes()) for name, tensor in tensors.items()}


@pytest.mark.parametrize("model", MODELS)
def test_it_decodes_what_we_write(model: str, written: Callable[[str, str], Path]) -> None:
    for spec in (*CASTS, *SIZES, "q4_k_m", "q3_k_m"):
        path = written(model, spec)
        contents, theirs = open_contents(path), tensors_of(path)
        there = names(contents.config)
        seen = set()
        for name in (*contents.packed, *contents.floats):
            ours = contents.read_packed(name).decode() if name in contents.packed else contents.float32(name)
            if name in contents.floats and ours.ndim == 2 and ".h." in name:  # Conv1D
                ours = ours.T
            tensor = theirs[there(name)]
            np.testing.assert_array_equal(values_of(tensor), rows_there(name, contents.config, ours), err_msg=f"{spec}: {name}")
            seen.add(tensor.name)
        assert seen == set(theirs), spec
        if spec in SIZES and model != "stories260k-llama":
            assert spec.upper() in {tensor.tensor_type.name for tensor in theirs.values()}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("spec", [*QUANTIZES, "F16", "BF16"])
def test_we_read_what_it_writes(
    spec: str, model: str, source: Callable[[str], Path], written: Callable[[str, str], Path], tmp_path: Path
) -> None:
    """A file made by gguf-py of the float model, with its own names, quantizer and writer."""
    original = open_contents(source(model))
    config = original.config
    there, number = names(config), getattr(gguf.GGMLQuantizationType, spec.upper())
    writer = gguf.GGUFWriter(tmp_path / "theirs.gguf", config["model_type"])
    for key, field in gguf.GGUFReader(written(model, "q8_0")).fields.items():
        if not key.startswith(("GGUF.", "nybble.")) and key != "general.architecture":
            kind = field.types[0]
            writer.add_key_value(key, field.contents(), kind, field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None)
    writer.add_string("general.author", "somebody")
    expected = {}
    for name in original.floats:
        if name == "lm_head.weight" and config.get("tie_word_embeddings", True):
            continue
        values = original.float32(name)
        if values.ndim == 2 and ".h." in name:
            values = values.T
        values = np.ascontiguousarray(rows_there(name, config, values))
        if values.ndim == 1 or "wpe" in name or (spec in QUANTIZES and values.shape[1] % 32):
            writer.add_tensor(there(name), values)
        else:
            blocks = gguf.quants.quantize(values, number)
            expected[name] = blocks
            writer.add_tensor(there(name), blocks, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    contents = open_contents(tmp_path / "theirs.gguf")
    assert contents.details["metadata"]["general.author"].data == b"somebody"
    same = ("vocab_size", "num_hidden_layers", "n_layer", "hidden_size", "n_embd", "num_key_value_heads", "tie_word_embeddings")
    assert {key: contents.config.get(key) for key in same if key in config} == {key: config[key] for key in same if key in config}
    assert json.loads(contents.extras["tokenizer.json"])["model"]["vocab"]
    assert expected.keys() <= {*contents.packed, *contents.floats}
    for name, blocks in expected.items():
        if spec not in QUANTIZES:
            ours = contents.float32(name).T if ".h." in name else contents.float32(name)
            np.testing.assert_array_equal(rows_there(name, config, ours), gguf.quants.dequantize(blocks, number))
            continue
        tensor = contents.read_packed(name)
        codes, params = unpack(spec, blocks.reshape(blocks.shape[0], -1, SIZES[spec][2]))
        np.testing.assert_array_equal(rows_there(name, config, tensor.codes), codes)
        assert params.keys() == tensor.params.keys()
        for suffix, array in params.items():
            np.testing.assert_array_equal(rows_there(name, config, tensor.params[suffix]), array)
    convert(tmp_path / "theirs.gguf", tmp_path / "again.gguf")
    assert raw(tensors_of(tmp_path / "again.gguf")) == raw(tensors_of(tmp_path / "theirs.gguf"))
    kept = {key: value for key, value in GgufFile(tmp_path / "again.gguf").metadata.items() if not key.startswith("nybble.")}
    written = GgufFile(tmp_path / "theirs.gguf").metadata
    assert {key: value for key, value in kept.items() if key != "general.file_type"} == {
        key: value for key, value in written.items() if key != "general.file_type"
    }


@pytest.mark.parametrize("model", MODELS)
def test_nothing_is_lost_of_what_llama_cpp_quantizes(model: str, written: Callable[[str, str], Path], tmp_path: Path) -> None:
    """Every code and param of its files, read and written again: the same bytes; also through a folder of ours."""
    for file_type in FILE_TYPES if model == MODELS[0] else FEW:
        theirs = tmp_path / "theirs.gguf"
        assert quantize(written(model, "fp16"), theirs, file_type)
        again = convert(theirs, tmp_path / "again.gguf", force=True)
        assert not again.changed
        assert raw(tensors_of(tmp_path / "again.gguf")) == raw(tensors_of(theirs)), file_type
        if file_type in FEW:
            convert(theirs, tmp_path / "ours", force=True)
            convert(tmp_path / "ours", tmp_path / "back.gguf", force=True)
            assert raw(tensors_of(tmp_path / "back.gguf")) == raw(tensors_of(theirs)), file_type


@pytest.mark.parametrize("spec", QUANTIZES)
def test_it_encodes_as_we_do(spec: str) -> None:
    """Random, real and special weights: the same bytes."""
    rng = np.random.default_rng(3)
    blocks = [rng.standard_normal((64, 1024)).astype(np.float32) * scale for scale in (1e-7, 0.02, 1, 3000)]
    special = np.zeros((8, 1024), np.float32)
    special[1], special[2, ::7], special[3] = 1, -2.5, np.tile(np.arange(32) - 16, 32)
    special[4, 0], special[5], special[6, 5] = 1e-9, -3, -0.0
    real = open_contents(demo.model_folder()).float32("transformer.h.0.attn.c_attn.weight").T
    fmt = parse_format(spec)
    for weight in (*blocks, special, np.ascontiguousarray(real)):
        codes, params = fmt.round(weight)
        theirs = gguf.quants.quantize(weight, getattr(gguf.GGMLQuantizationType, spec.upper()))
        np.testing.assert_array_equal(pack(spec, codes, params).reshape(theirs.shape), theirs)
