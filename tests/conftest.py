"""Tiny models with random weights, made from transformers' own classes, and the command line as its user runs it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import nybble

# A shell that starts the tests in the background has them, and all they start, ignore interrupts; some of them interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

VOCABULARY = 97
SOURCES = str(Path(nybble.__file__).parents[1])

_LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_GPT2 = {"vocab_size": VOCABULARY, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4}
_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", _GPT2),
    "gpt2-untied": ("GPT2LMHeadModel", {**_GPT2, "tie_word_embeddings": False}),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 64,
            "hidden_size": 48,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 8,
        },
    ),
    "llama": ("LlamaForCausalLM", _LLAMA),
    "llama-tied": ("LlamaForCausalLM", {**_LLAMA, "tie_word_embeddings": True}),
    "mistral": ("MistralForCausalLM", _LLAMA),
    "qwen2": ("Qwen2ForCausalLM", _LLAMA),
    "qwen3": ("Qwen3ForCausalLM", {**_LLAMA, "head_dim": 16, "tie_word_embeddings": True}),
    "phi": ("PhiForCausalLM", {**_LLAMA, "num_key_value_heads": 4}),
    "gemma": ("GemmaForCausalLM", {**_LLAMA, "head_dim": 16}),
    "gemma2": ("Gemma2ForCausalLM", {**_LLAMA, "head_dim": 16, "sliding_window": 8}),
    "gemma3": ("Gemma3ForCausalLM", {**_LLAMA, "head_dim": 16, "sliding_window": 8}),
    "opt": (
        "OPTForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 48,
            "ffn_dim": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 32,
        },
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", {k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"}),
    "bloom": ("BloomForCausalLM", {"vocab_size": VOCABULARY, "hidden_size": 48, "n_layer": 2, "n_head": 4}),
    "falcon": (
        "FalconForCausalLM",
        {"vocab_size": VOCABULARY, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    ),
    "bert": (
        "BertForMaskedLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
        },
    ),
}
"""Name -> (class of transformers, settings of its config)."""


def make_tiny(name: str, seed: int = 0) -> Any:
    """A model of two small layers, in evaluation mode, its weights drawn with a seed (norms and biases too)."""
    import torch
    import transformers

    cls_name, settings = FAMILIES[name]
    cls = getattr(transformers, cls_name)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = cls(cls.config_class(**{**_IDS, **settings})).eval()
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def token_ids(count: int = 12, seed: int = 3) -> Any:
    """Token ids [1, count]."""
    import torch

    return torch.randint(3, VOCABULARY, (1, count), generator=torch.Generator().manual_seed(seed))


def logits_of(model: Any, ids: Any) -> Any:
    """Logits [1, tokens, vocabulary]."""
    import torch

    with torch.inference_mode():
        return model(input_ids=ids).logits


@pytest.fixture(scope="session")
def families() -> dict[str, tuple[str, dict[str, Any]]]:
    return FAMILIES


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Any]:
    return make_tiny


@pytest.fixture(scope="session")
def ids() -> Any:
    return token_ids()


@pytest.fixture(scope="session")
def logits() -> Callable[[Any, Any], Any]:
    return logits_of


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float GPT-2 of two layers on disk, without a tokenizer."""
    folder = tmp_path_factory.mktemp("tiny") / "gpt2"
    make_tiny("gpt2").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """The environment of a user's shell, with the package of this checkout and no progress noise."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    return {**kept, "PYTHONPATH": SOURCES, "PYTHONWARNINGS": "default", "NO_COLOR": "1"}


@pytest.fixture(scope="session")
def nybble_command(environment: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `python -m nybble ARGUMENTS...` to its end."""

    def run(*arguments: str | Path, cwd: Path | None = None, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "nybble", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=timeout, check=False)

    return run


@pytest.fixture(scope="session")
def python_script(environment: dict[str, str]) -> Callable[..., str]:
    """Runs a program text in a new Python and gives what it printed; fails with its traceback."""

    def run(program: str, *arguments: str | Path) -> str:
        done = subprocess.run(
            [sys.executable, "-c", program, *map(str, arguments)],
            capture_output=True, text=True, env=environment, timeout=240, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """torch on one thread: float32 sums depend on how many share them, and models this small run no faster on more."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
