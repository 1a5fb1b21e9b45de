"""Where each tensor of a model stands in a GGUF file, and how its rows lie there.

Two layouts differ from a Hugging Face checkpoint's: Conv1D matrices stand [out, in], and Llama's query and key rows stand in the
order in which llama.cpp turns them: it turns rows 2i and 2i + 1 of a head together, transformers rows i and i + width / 2.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nybble.containers.gguf_config import heads_of, parts_of
from nybble.models.arch import Architecture

BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
"""What old checkpoints carry beside their weights."""
LEAVES = (".weight", ".bias")


@dataclass(frozen=True)
class Place:
    """One module's place in a file."""

    module: str
    """Its name in a checkpoint."""
    name: str
    """Its name in the file."""
    heads: int = 0
    """Heads whose rows lie in another order; 0: none do."""
    transposed: bool = False
    """A checkpoint has its matrix [in, out] where it is float."""


def places(table: Architecture, config: Mapping[str, Any]) -> list[Place]:
    """Every module of a model that holds tensors, in the order in which a file is written."""
    how, gguf = parts_of(table)
    found = [Place(module, name) for module, name in gguf.before.items()]
    for i in range(config[how.layers]):
        block = table.block.format(i=i)
        for module, name in gguf.inside.items():
            heads, transposed = heads_of(config, table, module), module in table.transposed
            found.append(Place(f"{block}.{module}", f"blk.{i}.{name}", heads, transposed))
    return found + [Place(module, name) for module, name in gguf.after.items()]


def find(names: Iterable[str], table: Architecture) -> dict[str, str]:
    """Full name -> the name that a checkpoint uses, which may lack the base model's part (`h.0...` of `transformer.h.0...`)."""
    base = f"{table.block.partition('.')[0]}."
    outside = tuple(table.others)
    return {
        name if name.startswith(base) or name.rpartition(".")[0] in outside else f"{base}{name}": name
        for name in names
        if not name.endswith(BUFFERS)
    }


def order_of_rows(rows: int, heads: int) -> NDArray[np.intp]:
    """int [rows]: which row of a checkpoint's matrix each row of a file is."""
    return np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).reshape(rows)


def order_back(rows: int, heads: int) -> NDArray[np.intp]:
    """Inverse of `order_of_rows`: which row of a file's matrix each row of a checkpoint is."""
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(rows)
