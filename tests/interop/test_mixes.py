"""The types that llama.cpp's quantizer chooses for each mix are those that we choose, tensor by tensor.

Where ours differ, and why: rows of q2_k and q3_k that are no multiple of 256 become iq4_nl here and Q4_0 there (the issue that
mixes follow says so, and it is the better of two types of 4.5 bits). llama.cpp writes Q2_K_S with an importance matrix only.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from llama import FILE_TYPES, quantize

from nybble.convert import convert
from nybble.files.gguf import GgufFile
from nybble.mixes import MIXES, PREFIX, every, find_mix, mix_names

LLAMA = {
    "vocab_size": 256,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2, 12 layers, tied": ("gpt2", {"n_layer": 12}),
    "gpt2, 5 layers, untied": ("gpt2", {"n_layer": 5, "tie_word_embeddings": False}),
    "llama, 12 layers": ("llama", {"num_hidden_layers": 12, "num_key_value_heads": 4}),
    "llama, 9 layers, 4 queries share a value, tied": (
        "llama",
        {"num_hidden_layers": 9, "num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
    "llama, 32 layers, 2 queries share a value": ("llama", {"num_hidden_layers": 32, "num_key_value_heads": 2}),
    "llama, rows of 64 and 172": (
        "llama",
        {"num_hidden_layers": 3, "num_key_value_heads": 2, "hidden_size": 64, "intermediate_size": 172},
    ),
    "qwen2, 4 layers, tied": ("qwen2", {"num_hidden_layers": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen3, 3 layers": ("qwen3", {"num_hidden_layers": 3, "num_key_value_heads": 4, "head_dim": 64}),
}
MANY = 30
"""Layers from which on only mixes that tell layers apart are tried."""
DIFFERENT = {("IQ4_NL", "Q4_0")}
"""(ours, llama.cpp's) where a row is no multiple of 256."""


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A GGUF file of zeros in float16: which type a tensor gets does not depend on what is in it."""
    import torch
    import transformers

    root, made = tmp_path_factory.mktemp("mixes"), {}

    def make(shape: str) -> Path:
        if shape not in made:
            kind, settings = SHAPES[shape]
            common = {"n_embd": 256, "n_head": 4, "vocab_size": 256, "n_positions": 64} if kind == "gpt2" else LLAMA
            config = transformers.AutoConfig.for_model(kind, **{**common, **settings})
            with torch.device("meta"):
                model = transformers.AutoModelForCausalLM.from_config(config)
            folder = root / str(len(made))
            state = {name: torch.zeros(tensor.shape, dtype=torch.float16) for name, tensor in model.state_dict().items()}
            model.to_empty(device="cpu").tie_weights()
            model.save_pretrained(folder, state_dict=state)
            made[shape] = root / f"{len(made)}.gguf"
            convert(folder, made[shape], to="fp16")
        return made[shape]

    return make


def types(path: Path) -> dict[str, str]:
    return {name: entry.type.name for name, entry in GgufFile(path).tensors.items()}


@pytest.mark.parametrize("shape", SHAPES)
def test_types(shape: str, floats: Callable[[str], Path], tmp_path: Path) -> None:
    source = floats(shape)
    columns = {name: entry.shape[1] for name, entry in GgufFile(source).tensors.items() if len(entry.shape) == 2}
    for mix in mix_names():
        name = mix.removeprefix(PREFIX)
        if len(columns) > 7 * MANY and all(rule.layers is every for rule in MIXES[name].rules):
            continue
        assert quantize(source, tmp_path / "theirs.gguf", name.upper(), importance=columns if name == "q2_k_s" else None), mix
        convert(source, tmp_path / "ours.gguf", to=mix, force=True)
        ours, theirs = types(tmp_path / "ours.gguf"), types(tmp_path / "theirs.gguf")
        assert ours.keys() == theirs.keys()
        wrong = {
            tensor: (kind, theirs[tensor])
            for tensor, kind in ours.items()
            if kind != theirs[tensor] and not (columns.get(tensor, 0) % 256 and (kind, theirs[tensor]) in DIFFERENT)
        }
        assert not wrong, mix


def test_every_mix_is_compared() -> None:
    """Mixes are llama.cpp's file types, and all of those whose formats we have."""
    assert {name.lower() for name in FILE_TYPES} - {"f16", "bf16"} == set(MIXES)
    assert all(find_mix(name) for name in mix_names())


def test_without_importance_there_is_no_q2_k_s_there(floats: Callable[[str], Path], tmp_path: Path) -> None:
    assert not quantize(floats("llama, 12 layers"), tmp_path / "theirs.gguf", "Q2_K_S")
