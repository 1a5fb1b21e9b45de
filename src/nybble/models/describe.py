"""The weights of a torch model, described: what can be packed, what cannot and why. Works on the meta device too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from nybble.models.arch import table_for
from nybble.models.info import TensorInfo
from nybble.models.packed import replaceable

KINDS = {nn.Linear: "linear", Conv1D: "conv1d", nn.Embedding: "embedding"}
TAGS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}


@dataclass(frozen=True)
class Site:
    """Where a packable weight sits: the modules that use it, the owner first."""

    name: str
    modules: tuple[nn.Module, ...]


def describe(model: nn.Module, stored: str | None = None) -> list[TensorInfo]:
    """Every tensor of a model's state, in the order of its modules: tied ones once, under their first name.

    `stored` is the type tag of the float tensors in the checkpoint, where the model was loaded in another.
    """
    table = table_for(getattr(getattr(model, "config", None), "model_type", ""))
    users: dict[int, list[tuple[str, nn.Module, str]]] = {}
    tensors: dict[int, torch.Tensor] = {}
    for path, module in model.named_modules():
        for leaf, tensor in _state(module):
            name = f"{path}.{leaf}" if path else leaf
            users.setdefault(id(tensor), []).append((name, module, leaf))
            tensors[id(tensor)] = tensor
    result = []
    for key, uses in users.items():
        (name, module, leaf), tensor = uses[0], tensors[key]
        base = replaceable(module) if leaf == "weight" else None
        reason = "" if base else _why_not(tensor, module, leaf)
        if base and not all(leaf_ == "weight" and replaceable(m) for _, m, leaf_ in uses):
            base, reason = None, "shared with a module that reads it in another way"
        shape = tuple(tensor.shape)
        if base is Conv1D:
            shape = (shape[1], shape[0])
        result.append(
            TensorInfo(
                name=name,
                aliases=tuple(other for other, _, _ in uses[1:]),
                kind=KINDS[base] if base else "float",
                shape=shape,
                dtype=_tag(tensor, stored),
                block=table.block_of(name),
                role=table.role_of(name),
                reason=reason,
            )
        )
    return result


def sites(model: nn.Module) -> dict[str, Site]:
    """Packable weight name -> the modules that use it. The float weight is still in place."""
    found: dict[int, tuple[str, list[nn.Module]]] = {}
    for path, module in model.named_modules():
        weight: Any = module._parameters.get("weight")
        if weight is not None and replaceable(module):
            found.setdefault(id(weight), (f"{path}.weight" if path else "weight", []))[1].append(module)
    return {name: Site(name, tuple(modules)) for name, modules in found.values()}


def _state(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers that a module itself holds."""
    buffers = [
        (name, buffer)
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    ]
    return [(name, p) for name, p in module._parameters.items() if p is not None] + buffers


def _tag(tensor: torch.Tensor, stored: str | None) -> str:
    if stored and tensor.dtype in TAGS:
        return stored
    return TAGS.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))


def _why_not(tensor: torch.Tensor, module: nn.Module, leaf: str) -> str:
    if not tensor.is_floating_point():
        return "not a floating-point tensor"
    if tensor.ndim == 1:
        return "bias" if leaf == "bias" else "norm gain or other vector"
    if tensor.ndim == 2:
        return f"{type(module).__name__}.{leaf} is not a Linear, Conv1D or Embedding weight"
    return f"{tensor.ndim}-dimensional; formats hold matrices"
