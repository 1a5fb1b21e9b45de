"""How many bytes one new token makes the machine read: what decoding speed is held against the memory's bandwidth with.

Counted: every weight that enters a product, one row of each table that is only looked up, and the keys and values cached
so far, at the average length of the timed text. Not counted: activations, which stay in the caches.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from nybble.containers import open_contents
from nybble.files.safetensors_header import ITEM_BYTES
from nybble.formats import parse_format
from nybble.models.arch import table_for

LOOKED_UP = ("token table", "position table")


def bytes_of_folder(path: Path) -> tuple[int, int]:
    """(bytes of all tensors, bytes of weights that one token reads) of a model that any container holds.

    Raises FileFormatError for a broken file.
    """
    contents = open_contents(path)
    config = contents.config
    sizes = {name: parse_format(spec).stored_bits(shape) // 8 for name, (spec, shape) in contents.packed.items()}
    sizes |= {name: math.prod(shape) * ITEM_BYTES[tag] for name, (tag, shape) in contents.floats.items()}
    rows = {name: (shape or (1,))[0] for name, (_, shape) in (*contents.packed.items(), *contents.floats.items())}
    roles = {name: _role(str(config.get("model_type")), name) for name in sizes}
    tied = bool(config.get("tie_word_embeddings", True)) or "head" not in roles.values()
    read = {
        name: size // rows[name] if roles[name] in LOOKED_UP and not (tied and roles[name] == "token table") else size
        for name, size in sizes.items()
        if not (tied and roles[name] == "head")
    }
    return sum(sizes.values()), sum(read.values())


def _role(model_type: str, name: str) -> str:
    """Role of a table or the head by the architecture's table, also where a file leaves the first part of a name out."""
    module = name.removesuffix(".weight")
    for known, role in table_for(model_type).others.items():
        if known == module or known.endswith(f".{module}"):
            return role
    return ""


def cached_numbers(config: dict[str, Any]) -> int:
    """Keys and values that a model caches for one position, by its config.json."""
    width = int(config.get("hidden_size") or config.get("n_embd") or 0)
    layers = int(config.get("num_hidden_layers") or config.get("n_layer") or 0)
    heads = int(config.get("num_attention_heads") or config.get("n_head") or 1)
    head_width = int(config.get("head_dim") or width // heads)
    return 2 * layers * int(config.get("num_key_value_heads") or heads) * head_width


def bytes_per_token(weights: int, cached_bytes: int, prompt_tokens: int, new_tokens: int) -> int:
    """Bytes read for one of `new_tokens` after a prompt, on average; `cached_bytes` is what a position holds.

    The i-th new token (from 0) reads the cache of prompt_tokens + i positions.
    """
    return weights + math.ceil(cached_bytes * (prompt_tokens + (new_tokens - 1) / 2))
