"""The model that ships: complete, float16, tied, finite, and small enough for a package."""

from __future__ import annotations

import json

import numpy as np
from safetensors.numpy import load_file

from nybble.demo import model_folder


def test_the_folder_is_a_complete_float16_checkpoint() -> None:
    folder = model_folder()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert (config["model_type"], config["dtype"], config["tie_word_embeddings"]) == ("gpt2", "float16", True)
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "README.md"):
        assert (folder / name).stat().st_size > 0
    tensors = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in tensors
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(np.float16)}
    assert sum(tensor.size for tensor in tensors.values()) == 5_918_720
    assert all(np.isfinite(tensor).all() for tensor in tensors.values())
    assert (folder / "model.safetensors").stat().st_size < 12_000_000
