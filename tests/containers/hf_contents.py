"""Small models as `Contents`, and folders of theirs written, read, changed and written again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nybble.containers import find_container
from nybble.containers.contents import Contents
from nybble.files.safetensors import SafetensorsFile, write
from nybble.formats import QTensor, parse_format

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "dtype": "float32",
    "tie_word_embeddings": False,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
}
GPT2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "dtype": "float32", "n_embd": 64, "n_head": 4, "n_layer": 1}
QUERY = "model.layers.0.self_attn.q_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"
Tagged = tuple[str, NDArray[Any]]


def weight(shape: tuple[int, int], seed: int = 0) -> NDArray[np.float32]:
    """A float weight [N, K]."""
    return (np.random.default_rng(seed).standard_normal(shape) * 0.05).astype(np.float32)


def rounded(spec: str, shape: tuple[int, int], seed: int = 0) -> QTensor:
    """A weight rounded to a format."""
    fmt = parse_format(spec)
    return QTensor(fmt, *fmt.round(weight(shape, seed)))


def grid(spec: str, shape: tuple[int, int]) -> QTensor:
    """The matrix of the golden tests, ((37 i mod 101) - 50) / 64 for i = 0, 1, ... in row order, rounded to a format."""
    fmt = parse_format(spec)
    values = (37 * np.arange(shape[0] * shape[1]) % 101 - 50).reshape(shape).astype(np.float32) / np.float32(64)
    return QTensor(fmt, *fmt.round(values))


def model(tensors: Mapping[str, QTensor], floats: Mapping[str, Tagged] | None = None, **other: Any) -> Contents:
    """Contents with these tensors, and a norm unless floats are given."""
    plain = {"model.norm.weight": ("F32", np.linspace(0.5, 1.5, 64, dtype=np.float32))} if floats is None else dict(floats)
    settings = {"config": LLAMA, "extras": {"tokenizer.json": b"{}\n"}, "provenance": {"plan_hash": "abc"}, **other}
    return Contents(
        container="nybble",
        path=Path("model"),
        packed={name: (str(tensor.format), tensor.shape) for name, tensor in tensors.items()},
        floats={name: (tag, array.shape) for name, (tag, array) in plain.items()},
        read_packed=lambda name: tensors[name],
        read_float=lambda name: plain[name][1],
        **settings,
    )


def two_layers(spec: str) -> Contents:
    """A model with two packed layers of different shapes."""
    return model({QUERY: rounded(spec, (64, 128), 1), DOWN: rounded(spec, (96, 256), 2)})


def written(name: str, contents: Contents, folder: Path, options: Mapping[str, str] | None = None) -> Path:
    """Contents as a folder of a container."""
    folder.mkdir(parents=True)
    find_container(name).write(folder, contents, options or {})
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    """The bytes of all files of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def assert_same(found: QTensor, wanted: QTensor) -> None:
    """Two tensors are equal in format, codes, params and what becomes of their inputs."""
    assert found.format == wanted.format
    assert np.array_equal(found.codes, wanted.codes)
    assert set(found.params) == set(wanted.params)
    for name, array in wanted.params.items():
        assert found.params[name].dtype == array.dtype
        assert np.array_equal(found.params[name], array)
    assert found.activations == wanted.activations


def assert_round_trip(name: str, contents: Contents, folder: Path, options: Mapping[str, str] | None = None) -> Contents:
    """What was written reads back as it was, and is written again byte for byte."""
    first = written(name, contents, folder / "first", options)
    again = find_container(name).read(first)
    assert again.container == name
    assert set(again.packed) == {n for n, (spec, _) in contents.packed.items() if not parse_format(spec).is_cast}
    for key in again.packed:
        assert_same(again.read_packed(key), contents.read_packed(key))
        assert again.packed[key] == contents.packed[key]
    for key, (tag, _) in contents.floats.items():
        assert again.floats[key][0] == tag
        assert np.array_equal(again.read_float(key), contents.read_float(key))
    assert again.config == contents.config
    assert again.extras == contents.extras
    assert again.provenance == contents.provenance
    assert files_of(written(name, again, folder / "second", options)) == files_of(first)
    return again


def arrays_of(folder: Path) -> dict[str, Tagged]:
    """Every tensor of a folder's safetensors file, copied."""
    file = SafetensorsFile(folder / "model.safetensors")
    return {name: (entry.dtype, file.read(name).copy()) for name, entry in file.entries.items()}


def changed(folder: Path, change: Callable[[dict[str, Tagged], dict[str, Any]], None]) -> Path:
    """A folder after `change(arrays, settings)` had its way with its tensors and its quantization_config."""
    arrays, config = arrays_of(folder), json.loads((folder / "config.json").read_text())
    change(arrays, config["quantization_config"])
    metadata = SafetensorsFile(folder / "model.safetensors").metadata
    tags = {name: tag for name, (tag, _) in arrays.items()}
    write(folder / "model.safetensors", [(name, array) for name, (_, array) in arrays.items()], metadata, tags)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def settings_of(folder: Path) -> dict[str, Any]:
    """The quantization_config of a folder."""
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


def bits_of(words: NDArray[np.int32]) -> list[int]:
    """The bits of words, lowest first."""
    return [(int(word) >> place) & 1 for word in words.view(np.uint32) for place in range(32)]


def gptq_values(arrays: dict[str, Tagged], module: str, bits: int, v1: bool) -> NDArray[np.float32]:
    """A weight [N, K] from a folder's tensors, bit by bit: shares no code with what is tested."""
    qweight, qzeros, scales, index = (arrays[f"{module}.{part}"][1] for part in ("qweight", "qzeros", "scales", "g_idx"))
    columns, rows = len(index), qweight.shape[1]
    result = np.empty((rows, columns), np.float32)
    zeros = np.empty(scales.shape, np.int64)
    for group, words in enumerate(qzeros):
        line = bits_of(words)
        for row in range(rows):
            zeros[group, row] = sum(line[row * bits + i] << i for i in range(bits)) + v1
    for row in range(rows):
        line = bits_of(np.ascontiguousarray(qweight[:, row]))
        for column, group in enumerate(index):
            code = sum(line[column * bits + i] << i for i in range(bits))
            result[row, column] = np.float32(scales[group, row]) * np.float32(code - zeros[group, row])
    return result
