"""Layers that compute with a packed weight.

They are made by changing the class of an existing one, so that a subclass with a forward of its own (OPT's positions,
Gemma's scaled embedding) keeps it and everything it holds; only what reads the weight is replaced.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from nybble.errors import UsageError, unknown_name
from nybble.models.packed_weight import PackedWeight

__all__ = ["PackedConv1D", "PackedEmbedding", "PackedLinear", "PackedWeight", "put_packed", "replaceable", "set_activations"]

ACTIVATIONS = {"float": True, "int8": False}
"""Name -> whether products are exact."""


class PackedLinear(nn.Linear):
    """nn.Linear whose `weight` is a PackedWeight [out, in]."""

    weight: PackedWeight  # type: ignore[assignment]  # nn.Linear's is a tensor; that is what this class is for

    def forward(self, input: Tensor) -> Tensor:
        return self.weight.linear(input, self.bias)


class PackedConv1D(Conv1D):
    """transformers' Conv1D whose `weight` is a PackedWeight [out, in], not transposed."""

    weight: PackedWeight

    def forward(self, x: Tensor) -> Tensor:
        return self.weight.linear(x, self.bias)


class PackedEmbedding(nn.Embedding):
    """nn.Embedding whose `weight` is a PackedWeight [entries, width]."""

    weight: PackedWeight  # type: ignore[assignment]  # as in PackedLinear
    compute_dtype: torch.dtype | None = None

    def forward(self, input: Tensor) -> Tensor:
        return self.weight.embedding(input).to(self.compute_dtype or torch.float32)


_PACKED = {nn.Linear: PackedLinear, Conv1D: PackedConv1D, nn.Embedding: PackedEmbedding}


def replaceable(module: nn.Module) -> type[nn.Module] | None:
    """The layer class (Linear, Conv1D or Embedding) whose weight can be packed in this module; None when there is none."""
    for base in _PACKED:
        if isinstance(module, base):
            return base
    return None


_MIXED: dict[type[nn.Module], type[nn.Module]] = {}


def _packed_class(cls: type[nn.Module], base: type[nn.Module]) -> type[nn.Module]:
    """`cls` with the packed layer between it and `base`: its own forward still runs, and `super()` finds ours."""
    packed = _PACKED[base]
    if cls is base:
        return packed
    if cls not in _MIXED:
        _MIXED[cls] = type(f"Packed{cls.__name__}", (cls, packed), {"__module__": cls.__module__})
    return _MIXED[cls]


def put_packed(module: nn.Module, weight: PackedWeight, owner: bool, compute_dtype: torch.dtype) -> None:
    """Turn a float layer into a packed one, in place. The owner of a tied weight registers it; the others only refer to
    it, so that the state dict has it once."""
    base = replaceable(module)
    assert base is not None, f"{type(module).__name__} has no weight to replace"
    del module._parameters["weight"]
    weight.compute_dtype = compute_dtype
    if owner:
        module._modules["weight"] = weight
    else:
        module.__dict__["weight"] = weight
    module.__class__ = _packed_class(type(module), base)
    # transformers may skip it after loading, unless it has a buffer that no file holds (Gemma's scale of the embedding)
    module._is_hf_initialized = not module._non_persistent_buffers_set  # type: ignore[assignment]
    if base is nn.Embedding:
        module.compute_dtype = compute_dtype  # type: ignore[assignment]


def set_activations(model: nn.Module, activations: str) -> None:
    """How the packed weights of a model multiply on the CPU: with "float" activations, as they come (the default, and what
    figures of quality are about), or rounded to "int8" in blocks of 64 columns, which is faster.

    Raises UsageError for another name, and for a model without packed weights.
    """
    if activations not in ACTIVATIONS:
        raise unknown_name("kind of activations", activations, ACTIVATIONS)
    weights = [module for module in model.modules() if isinstance(module, PackedWeight)]
    if not weights:
        raise UsageError(f"this {type(model).__name__} has no packed weights; quantize it first")
    for weight in weights:
        weight.exact = ACTIVATIONS[activations]
