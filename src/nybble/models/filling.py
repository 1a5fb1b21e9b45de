"""Whether a checkpoint's tensors are those of the model that its config.json describes, by their names and shapes. No torch.

Loading would find out too, but only with the whole model in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nybble.errors import FileFormatError
from nybble.models.arch import table_for

WIDTHS = ("hidden_size", "n_embd", "d_model")
BLOCKS = ("num_hidden_layers", "n_layer", "num_layers")
OTHER_WIDTHS = ("word_embed_proj_dim", "embedding_size")
"""A model with one of these has tables narrower than its blocks."""


def check_filling(config: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Raise FileFormatError where tensors (name -> shape) lack a block or a layer, or have another shape than config.json says.
    Architectures without a table are taken as they are."""
    table = table_for(str(config.get("model_type")))
    if not table.block:
        return
    # the base model's checkpoints lack the first part of every name
    parts = {name.removeprefix(table.block.partition(".")[0] + "."): shape for name, shape in tensors.items()}
    tokens = next((module for module, role in table.others.items() if role == "token table"), None)
    missing, others = [], []
    if tokens is not None:
        name = f"{tokens.removeprefix(table.block.partition('.')[0] + '.')}.weight"
        if name not in parts:
            missing.append(f"{tokens}.weight")
        elif not _fits(parts[name], config):
            others.append(f"{tokens}.weight")
    blocks: dict[int, dict[str, tuple[int, ...]]] = {}
    for name, shape in tensors.items():
        index = table.block_of(name)
        if index is not None:
            blocks.setdefault(index, {})[name.removeprefix(f"{table.block.format(i=index)}.")] = shape
    count = next((config[key] for key in BLOCKS if isinstance(config.get(key), int)), len(blocks))
    missing += [table.block.format(i=i) for i in range(count) if i not in blocks]
    known: dict[str, tuple[int, ...]] = {}
    for block in blocks.values():
        known.update({name: shape for name, shape in block.items() if name.removesuffix(".weight") in table.linears})
    for index, block in blocks.items():
        missing += [f"{table.block.format(i=index)}.{name}" for name in known if name not in block]
        others += [f"{table.block.format(i=index)}.{name}" for name in known if name in block and block[name] != known[name]]
    if missing or others:
        names = ", ".join((missing + others)[:3])
        raise FileFormatError(
            f"{path} does not fill its model: {len(missing)} tensors or blocks missing, {len(others)} of another shape ({names}"
            f"{', ...' if len(missing + others) > 3 else ''}); is config.json of another model?"
        )


def _fits(shape: tuple[int, ...], config: Mapping[str, Any]) -> bool:
    """Whether a table of tokens has as many rows and columns as config.json says."""
    width = next((config[key] for key in WIDTHS if isinstance(config.get(key), int)), None)
    narrow = any(config.get(key) for key in OTHER_WIDTHS)
    expected = (config.get("vocab_size"), None if narrow else width)
    return len(shape) == 2 and all(wanted is None or wanted == found for wanted, found in zip(expected, shape, strict=True))
