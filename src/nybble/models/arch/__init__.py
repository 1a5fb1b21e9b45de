"""What nybble knows of an architecture, as data: one table a file, found by the `model_type` of config.json.

A table names the matrices of one block and their roles, which of them are stored transposed, and what is tied. An
architecture without a table takes the generic path: everything is read off the modules themselves, and roles are unknown.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

_INDEX = re.compile(r"(?:^|\.)(\d+)\.")


@dataclass(frozen=True)
class Decoding:
    """How a decoder runs, for the engine: names are inside the block unless said; keys are those of config.json.

    A block is norm, attention, residual, norm, feed-forward, residual. Biases are used where the checkpoint has them.
    """

    attention_norm: str
    attention_in: tuple[str, ...]
    """Query, key and value: one matrix whose rows are all three, or three."""
    attention_out: str
    mlp_norm: str
    """Empty: attention and feed-forward read the same norm, side by side (Phi)."""
    mlp: tuple[str, ...]
    """(up, down), or (gate, up, down): activation(gate) * up."""
    final_norm: str
    """Full name."""
    centred: bool
    """LayerNorm; else RMSNorm."""
    eps: str
    """Key of the norms' epsilon."""
    activation: tuple[str, ...]
    """Keys of the activation's name; the first that is set counts."""
    width: str = "hidden_size"
    layers: str = "num_hidden_layers"
    heads: str = "num_attention_heads"
    context: str = "max_position_embeddings"
    positions: str = ""
    """Full name of a table of learned positions; empty: rotary ones."""
    position_offset: int = 0
    """Added to a position before the look-up."""
    query_norm: str = ""
    key_norm: str = ""
    """RMS norms of each head, before rotation."""
    attention_after: str = ""
    mlp_after: str = ""
    """Norms of what attention and feed-forward give, before it is added (Gemma 2)."""
    gain_offset: float = 0.0
    """Added to the gains of norms (Gemma: 1)."""
    scaled_embedding: bool = False
    """Embeddings are multiplied by the square root of the width (Gemma)."""
    query_scale: str = ""
    """Key of the number whose inverse square root scales scores; empty: dimensions of a head."""
    score_cap: str = ""
    logit_cap: str = ""
    """Keys of soft caps."""
    window_always: bool = False
    """`sliding_window` holds in every layer where config.json does not list the layers' types (Mistral)."""
    window_alternates: bool = False
    """... in every other layer, beginning with the first (Gemma 2)."""
    requires: tuple[tuple[str, object], ...] = ()
    """(key, value) that config.json must not contradict: variants that run in another way."""


@dataclass(frozen=True)
class Gguf:
    """How GGUF files hold an architecture, as llama.cpp reads them. Names are those of modules: `.weight` and `.bias` follow."""

    architecture: str
    """Value of `general.architecture`, and the first part of its keys."""
    classes: dict[str, str]
    """`model_type` -> class of transformers; a file that does not say which of several it is, is of the first."""
    inside: dict[str, str]
    """Name inside a block -> name behind `blk.{i}.`, in the order in which they are written."""
    before: dict[str, str]
    """Full name -> name, of what stands before the blocks."""
    after: dict[str, str]
    """The same of what stands behind them."""
    inner: str
    """Key of config.json for the width between the feed-forward matrices; null there: four times the model's width."""
    activations: tuple[str, ...]
    """What llama.cpp computes there; the first is what a file stands for."""
    keys: dict[str, str] = field(default_factory=dict)
    """Keys of its own -> those of config.json, beside the ones that follow from `Decoding`."""
    shared_heads: bool = False
    """Key-value heads may be fewer than query heads, and a head's dimensions are stated."""
    rotated: frozenset[str] = frozenset()
    """Modules inside a block whose rows stand in pairs of neighbours, since llama.cpp turns these together."""
    window: Literal["", "used", "unused"] = ""
    """What llama.cpp makes of a sliding window that is stated: "used"; "unused": every position sees all before it, so that a
    file states no more context than the window. Empty: a model that has one is refused."""
    widths_over_heads: int = 0
    """A model of just so many layers scales its scores by its width over its heads, not by a head's dimensions."""
    requires: tuple[tuple[str, object], ...] = ()
    """(key, value) that config.json must not contradict."""


@dataclass(frozen=True)
class Architecture:
    """One architecture's table. Names are those of Hugging Face parameters, without `.weight`."""

    model_types: tuple[str, ...]
    """Values of config.json's `model_type` that this table is for."""
    block: str = ""
    """Prefix of a block's modules, `{i}` standing for its index."""
    linears: dict[str, str] = field(default_factory=dict)
    """Matrices of a block in the order they run: name inside the block -> role."""
    transposed: frozenset[str] = frozenset()
    """Those of `linears` that are stored [in, out] (GPT-2's Conv1D)."""
    others: dict[str, str] = field(default_factory=dict)
    """Embeddings and head: name -> role."""
    tied: tuple[str, str] | None = None
    """(head, embedding) that share one tensor when config.json says `tie_word_embeddings`."""
    ties_by_default: bool = False
    """What holds where config.json does not say."""
    decoding: Decoding | None = None
    """How it runs; None: the engine cannot decode it."""
    gguf: Gguf | None = None
    """How GGUF holds it; None: llama.cpp does not run it, or not the same way."""

    def block_of(self, name: str) -> int | None:
        """Index of the block that holds a parameter, None outside the blocks."""
        if self.block:
            prefix = re.escape(self.block).replace(r"\{i\}", r"(\d+)")
            match = re.match(rf"{prefix}\.", name)
        else:
            match = _INDEX.search(name)
        return int(match.group(1)) if match else None

    def role_of(self, name: str) -> str:
        """Role of a parameter (`query, key and value`, `position table`), empty when the table does not say."""
        module = name.removesuffix(".weight")
        block = self.block_of(name)
        if block is not None and self.block:
            return self.linears.get(module.removeprefix(self.block.format(i=block) + "."), "")
        return self.others.get(module, "")


GENERIC = Architecture(model_types=())


@cache
def _tables() -> dict[str, Architecture]:
    tables: dict[str, Architecture] = {}
    for module in pkgutil.iter_modules(__path__):
        table: Architecture = importlib.import_module(f"{__name__}.{module.name}").TABLE
        tables.update(dict.fromkeys(table.model_types, table))
    return tables


def table_for(model_type: str) -> Architecture:
    """The table of a `model_type`; the generic one when there is none."""
    return _tables().get(model_type, GENERIC)


def tables() -> dict[str, Architecture]:
    """All tables by `model_type`."""
    return dict(_tables())
