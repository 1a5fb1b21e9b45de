"""Where training begins: a model that is there, or a new one with random weights, perhaps with a tokenizer of its own."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nybble.containers import open_contents
from nybble.convert import convert
from nybble.errors import InputError, UsageError, unknown_name
from nybble.formats import parse_format
from nybble.models.checkpoint import check_float, open_checkpoint, read_json
from nybble.models.config_check import check_config
from nybble.models.loading import context_length, load_model, load_tokenizer, quiet
from nybble.models.shapes import SHAPES

END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 4096
SMALL: dict[str, dict[str, Any]] = {
    "gpt2-2m": {"model_type": "gpt2", "n_layer": 4, "n_embd": 128, "n_head": 4, "n_positions": 512},
    "gpt2-6m": {"model_type": "gpt2", "n_layer": 6, "n_embd": 256, "n_head": 8, "n_positions": 512},
    "llama-6m": {
        "model_type": "llama", "num_hidden_layers": 6, "hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 8,
        "num_key_value_heads": 4, "max_position_embeddings": 512, "tie_word_embeddings": True,
    },
}  # fmt: skip
"""Shapes that a CPU trains in minutes to hours, beside those of `nybble.models.shapes`."""


@dataclass(frozen=True)
class Start:
    """A model to train, with what turns text into its tokens."""

    model: Any
    """transformers' model in float32."""
    tokenizer: Any
    end: int | None
    """Id that stands between documents."""
    name: str
    """For people: a folder, or the shape."""
    context: int
    """Most tokens of a window."""


def load(folder: Path) -> Start:
    """A float model's folder, pruned or not. Raises InputError for one that is quantized, or has no tokenizer."""
    contents = open_contents(folder)
    if contents.packed and all(parse_format(spec).is_cast for spec, _ in contents.packed.values()):
        with tempfile.TemporaryDirectory() as place:  # a pruned model in sparse storage
            convert(contents, Path(place) / "model", "float")
            model = load_model(Path(place) / "model")
    else:
        check_float(open_checkpoint(folder))
        model = load_model(folder)
    tokenizer = load_tokenizer(folder)
    return Start(model, tokenizer, tokenizer.eos_token_id, str(folder), context_length(model))


def check_shape(shape: str) -> None:
    """Raise UsageError for the name of a shape that is none."""
    if not shape.endswith(".json") and shape not in SMALL and shape not in SHAPES:
        raise unknown_name("shape", shape, [*SMALL, *SHAPES])


def new(shape: str, tokenizer: Any, seed: int) -> Start:
    """Random weights in a named shape, or in that of a config.json; its vocabulary is the tokenizer's. Raises UsageError for an
    unknown name, InputError for a config that transformers cannot build."""
    from transformers import AutoConfig, AutoModelForCausalLM

    check_shape(shape)
    if shape.endswith(".json"):
        settings = dict(read_json(Path(shape)))
        check_config(settings, shape)
    else:
        settings = dict({**SHAPES, **SMALL}[shape])
    end = tokenizer.eos_token_id
    tokenizer.model_max_length = (
        settings.get("n_positions") or settings.get("max_position_embeddings") or tokenizer.model_max_length
    )
    settings |= {"vocab_size": len(tokenizer), "bos_token_id": end, "eos_token_id": end}
    if settings.get("model_type") == "gpt2":  # small models on little text: as the one that ships
        settings = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, **settings}
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config = AutoConfig.for_model(settings.pop("model_type"), **settings)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        message = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"transformers cannot build {shape}: {message}") from error
    tokenizer.model_max_length = context_length(model)
    return Start(model, tokenizer, end, shape, context_length(model))


def make_tokenizer(documents: Sequence[str], size: int) -> Any:
    """A byte-level BPE tokenizer of so many tokens (Sennrich et al. 2016; bytes as in GPT-2) learnt from documents; id 0 stands
    between texts. Raises UsageError for a size that bytes alone exceed, InputError where the text makes fewer tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if not 258 <= size <= 1 << 20:
        raise UsageError(f"a vocabulary of {size} tokens: give 258 (all bytes, an end and one more) to {1 << 20}")
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(documents, trainer)
    if raw.get_vocab_size() < size:
        raise InputError(f"the text makes {raw.get_vocab_size()} tokens, not {size}; give more text or --vocabulary smaller")
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, unk_token=END_OF_TEXT)
