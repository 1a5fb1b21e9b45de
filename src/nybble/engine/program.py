"""From an architecture's table and a config.json to the list of operations that decode one model. Pure; no weights here.

An operation reads and writes buffers of one row a token: `residual` (the stream that every part adds to), `normed`,
`projected` (queries, keys and values), `mixed` (what attention gives), `inner` (the wide part of the feed-forward layer),
`logits`. reference.py says what each operation computes, and runs it in numpy; the C++ engine runs the same list.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from nybble.engine.rotary import frequencies
from nybble.errors import InputError
from nybble.models.arch import Architecture, Decoding, table_for, tables

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "quick_gelu": "gelu_quick",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
}


@dataclass(frozen=True)
class Matrix:
    """A weight [out, in] by its name in the checkpoint, without `.weight`."""

    name: str
    transposed: bool = False
    """A float checkpoint stores it [in, out]."""
    bias: bool = False


@dataclass(frozen=True)
class Embed:
    """residual = tokens[id] * scale + positions[position + offset]."""

    tokens: Matrix
    positions: Matrix | None
    offset: int
    scale: float


@dataclass(frozen=True)
class Norm:
    """LayerNorm (centred) or RMSNorm of each row; `name.weight` + gain_offset is the gain."""

    source: str
    target: str
    centred: bool
    eps: float
    name: str
    bias: bool
    gain_offset: float = 0.0


@dataclass(frozen=True)
class Linear:
    """target = or += activation(source @ weight.T + bias), matrices side by side; gated: activation(first) * second."""

    source: str
    target: str
    matrices: tuple[Matrix, ...]
    activation: str = "none"
    add: bool = False
    gated: bool = False


@dataclass(frozen=True)
class Attend:
    """mixed = causal attention over the cache, which the keys and values of `projected` are added to first."""

    layer: int
    heads: int
    shared: int
    """Key-value heads; each serves heads / shared query heads that follow each other."""
    dimensions: int
    frequencies: tuple[float, ...]
    """Radians a position, for pairs (i, i + count) of a head's first dimensions; none: no rotation."""
    scale: float
    cap: float
    window: int
    """Positions seen, the own one included; 0: all."""
    query_norm: str
    key_norm: str
    eps: float
    gain_offset: float


@dataclass(frozen=True)
class Add:
    """target += source."""

    source: str
    target: str


@dataclass(frozen=True)
class Select:
    """From here on only the rows whose logits are wanted: behind the last attention no row needs another."""


@dataclass(frozen=True)
class Cap:
    """logits = cap * tanh(logits / cap)."""

    cap: float


Operation: TypeAlias = Embed | Norm | Linear | Attend | Add | Select | Cap


@dataclass(frozen=True)
class Program:
    """What decodes one model."""

    operations: tuple[Operation, ...]
    vocabulary: int
    context: int
    """Positions that the model was made for."""


def supported() -> list[str]:
    """The values of config.json's `model_type` that can be decoded."""
    return sorted(name for name, table in tables().items() if table.decoding is not None)


def make_program(config: Mapping[str, Any], shape_of: Callable[[str], tuple[int, ...] | None]) -> Program:
    """The program of a model. `shape_of(name)` is the shape of a tensor of the checkpoint, None where there is none; a
    matrix's is [out, in].

    Raises InputError for a model that the engine has no table for, or a variant that runs in another way.
    """
    model_type = str(config.get("model_type"))
    table = table_for(model_type)
    if table.decoding is None:
        raise InputError(f"the engine cannot decode model_type {model_type!r}; it knows {', '.join(supported())}")
    how = table.decoding
    for key, value in how.requires:
        if config.get(key, value) != value:
            raise InputError(f"the engine decodes {model_type} with {key} {value!r} only, config.json says {config[key]!r}")
    return _Builder(config, table, how, shape_of).build()


class _Builder:
    def __init__(
        self, config: Mapping[str, Any], table: Architecture, how: Decoding, shape_of: Callable[[str], tuple[int, ...] | None]
    ) -> None:
        self.config, self.table, self.how, self.shape_of = config, table, how, shape_of
        self.width = self.whole(how.width)
        self.heads = self.whole(how.heads)
        self.shared = int(config.get("num_key_value_heads") or self.heads)
        self.dimensions = int(config.get("head_dim") or self.width // self.heads)
        self.eps = float(config.get(how.eps, 1e-5 if how.centred else 1e-6)) if how.eps else 1e-5
        self.layers = self.whole(how.layers)
        self.activation = self.activation_name()

    def whole(self, key: str) -> int:
        value = self.config.get(key)
        if type(value) is not int or value < 1:
            raise InputError(f"config.json has {key} {value!r}, not a positive whole number; the engine cannot run it")
        return value

    def activation_name(self) -> str:
        name = next((str(self.config[key]) for key in self.how.activation if self.config.get(key)), "")
        if name not in ACTIVATIONS:
            raise InputError(f"config.json has activation {name!r}; the engine knows {', '.join(ACTIVATIONS)}")
        # Gemma's first configurations say gelu and mean its tanh form (transformers does the same).
        return "gelu_tanh" if name == "gelu" and "hidden_activation" in self.how.activation else ACTIVATIONS[name]

    def matrix(self, name: str, transposed: bool = False) -> Matrix:
        shape = self.shape_of(f"{name}.weight")
        if shape is None or len(shape) != 2:
            raise InputError(f"the checkpoint has no matrix {name}.weight, which {self.config['model_type']} needs")
        return Matrix(name, transposed, self.shape_of(f"{name}.bias") is not None)

    def inside(self, i: int, name: str) -> Matrix:
        return self.matrix(f"{self.table.block.format(i=i)}.{name}", name in self.table.transposed)

    def norm(self, name: str, source: str, target: str) -> Norm:
        if self.shape_of(f"{name}.weight") is None:
            raise InputError(f"the checkpoint has no {name}.weight, which {self.config['model_type']} needs")
        bias = self.shape_of(f"{name}.bias") is not None
        return Norm(source, target, self.how.centred, self.eps, name, bias, self.how.gain_offset)

    def build(self) -> Program:
        how, config = self.how, self.config
        roles = {role: name for name, role in self.table.others.items()}
        tokens = self.matrix(roles["token table"])
        shape = self.shape_of(f"{tokens.name}.weight")
        if shape is None or shape[1] != self.width:
            raise InputError(f"{tokens.name}.weight has shape {shape}, not {self.width} columns; the engine cannot run it")
        positions = self.matrix(how.positions) if how.positions else None
        scale = float(np.float32(math.sqrt(self.width))) if how.scaled_embedding else 1.0
        operations: list[Operation] = [Embed(tokens, positions, how.position_offset, scale)]
        for i in range(self.layers):
            operations += self.block(i)
        operations.append(self.norm(how.final_norm, "residual", "normed"))
        tied = config.get("tie_word_embeddings", self.table.ties_by_default)
        head = tokens if tied or self.shape_of(f"{roles['head']}.weight") is None else self.matrix(roles["head"])
        if head is tokens:
            head = Matrix(tokens.name, tokens.transposed, False)
        operations.append(Linear("normed", "logits", (head,)))
        if how.logit_cap and config.get(how.logit_cap):
            operations.append(Cap(float(config[how.logit_cap])))
        shape = self.shape_of(f"{head.name}.weight")
        assert shape is not None
        return Program(tuple(operations), shape[0], self.whole(how.context))

    def block(self, i: int) -> list[Operation]:
        how = self.how
        inner = "projected"  # where a part's result waits for a norm of its own
        operations: list[Operation] = [
            self.norm(self.name(i, how.attention_norm), "residual", "normed"),
            Linear("normed", "projected", tuple(self.inside(i, name) for name in how.attention_in)),
            self.attention(i),
        ]
        if i + 1 == self.layers and how.mlp_norm:  # side by side, the feed-forward part still reads the norm of all rows
            operations.append(Select())
        operations += self.into_residual("mixed", self.inside(i, how.attention_out), i, how.attention_after, inner)
        if how.mlp_norm:
            operations.append(self.norm(self.name(i, how.mlp_norm), "residual", "normed"))
        *first, down = (self.inside(i, name) for name in how.mlp)
        operations.append(Linear("normed", "inner", tuple(first), self.activation, gated=len(first) == 2))
        operations += self.into_residual("inner", down, i, how.mlp_after, inner)
        if i + 1 == self.layers and not how.mlp_norm:
            operations.append(Select())
        return operations

    def name(self, i: int, inside: str) -> str:
        return f"{self.table.block.format(i=i)}.{inside}"

    def into_residual(self, source: str, matrix: Matrix, i: int, after: str, inner: str) -> list[Operation]:
        if not after:
            return [Linear(source, "residual", (matrix,), add=True)]
        norm = self.norm(self.name(i, after), inner, inner)
        return [Linear(source, inner, (matrix,)), norm, Add(inner, "residual")]

    def attention(self, i: int) -> Attend:
        how, config = self.how, self.config
        seed = float(config.get(how.query_scale) or self.dimensions) if how.query_scale else float(self.dimensions)
        sliding = self.slides(i)
        rotary = () if how.positions else frequencies(config, self.dimensions)
        return Attend(
            layer=i,
            heads=self.heads,
            shared=self.shared,
            dimensions=self.dimensions,
            frequencies=rotary,
            scale=1.0 / math.sqrt(seed),
            cap=float(config.get(how.score_cap) or 0.0) if how.score_cap else 0.0,
            window=int(config["sliding_window"]) if sliding else 0,
            query_norm=self.name(i, how.query_norm) if how.query_norm else "",
            key_norm=self.name(i, how.key_norm) if how.key_norm else "",
            eps=self.eps,
            gain_offset=how.gain_offset,
        )

    def slides(self, i: int) -> bool:
        """Whether layer i sees a window only. Qwen lists its layers or says from which one on, and has a switch."""
        config = self.config
        if not config.get("sliding_window") or config.get("use_sliding_window") is False:
            return False
        types = config.get("layer_types")
        if isinstance(types, list) and i < len(types):
            return bool(types[i] == "sliding_attention")
        if self.how.window_alternates:
            return i % 2 == 0
        if config.get("use_sliding_window"):
            return i >= int(config.get("max_window_layers") or 0)
        return self.how.window_always and config.get("model_type") == "mistral"
