"""Models, and other people's readers. `make interop` installs the readers and says so with NYBBLE_INTEROP: then one that is
missing is a failure. In the ordinary tests all of this is skipped."""

from __future__ import annotations

import importlib
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from nybble import demo

DATA = Path(__file__).parents[3] / "shared" / "data"
MODELS = ("stdlib-gpt2-6m", "stories260k-llama", "tiny-qwen2", "tiny-qwen3")
TINY = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def reader(name: str) -> Any:
    """Another project's module. Skips the tests of a file without it, fails where `make interop` promised it."""
    if not os.environ.get("NYBBLE_INTEROP"):
        return pytest.importorskip(name, reason=f"{name} is not installed; `make interop` does that")
    return importlib.import_module(name)


def data(*parts: str) -> Path:
    """A file or folder of the shared data. Skips a test without it."""
    path = DATA.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"no {'/'.join(parts)} in the shared data")
    return path


def make_qwen(kind: str, folder: Path) -> Path:
    """A small Qwen with random weights and the tokenizer of the model that ships. Random weights as they are first drawn give
    nearly flat logits; three times as large, they do not."""
    import torch
    import transformers

    cls, settings = {
        "tiny-qwen2": (transformers.Qwen2ForCausalLM, {**TINY, "tie_word_embeddings": False}),
        "tiny-qwen3": (transformers.Qwen3ForCausalLM, {**TINY, "tie_word_embeddings": True, "head_dim": 64}),
    }[kind]
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = cls(cls.config_class(**settings)).eval()
        for name, parameter in model.named_parameters():
            parameter.data *= 1 if "norm" in name else 3
            parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo.model_folder() / name, folder / name)
    return folder
