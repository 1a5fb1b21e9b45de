"""Put packed weights in the place of float ones, in a model with data or on the meta device."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from nybble.errors import FileFormatError
from nybble.formats import QTensor
from nybble.formats.activations import Activations
from nybble.models.describe import sites
from nybble.models.packed import PackedWeight, put_packed


def replace_weights(
    model: nn.Module,
    packed: Mapping[str, QTensor | tuple[str, tuple[int, int]]],
    compute_dtype: torch.dtype = torch.float32,
    schemes: Mapping[str, Activations] | None = None,
) -> None:
    """Replace the named weights, in place: by the QTensors given, or by empty ones of (format spec, shape), which round their
    inputs as `schemes` says.

    Tied weights stay one tensor: every module that used the float weight uses the packed one.
    Raises FileFormatError for a name that the model lacks or a shape that is not the model's.
    """
    known = sites(model)
    for name, value in packed.items():
        if name not in known:
            raise FileFormatError(f"packed tensor {name!r} is not a weight of this {type(model).__name__}")
        owner, *others = known[name].modules
        float_shape = tuple(owner._parameters["weight"].shape)  # type: ignore[union-attr]
        expected = float_shape[::-1] if isinstance(owner, Conv1D) else float_shape
        shape = value.shape if isinstance(value, QTensor) else value[1]
        if tuple(shape) != expected:
            raise FileFormatError(f"packed tensor {name!r} has shape {tuple(shape)}, the model needs {expected}")
        if isinstance(value, QTensor):
            weight = PackedWeight.from_qtensor(value)
        else:
            weight = PackedWeight(*value, (schemes or {}).get(name))
        put_packed(owner, weight, owner=True, compute_dtype=compute_dtype)
        for module in others:
            put_packed(module, weight, owner=False, compute_dtype=compute_dtype)
    _forget_ties(model, set(packed))


def tie_parameters(model: nn.Module) -> None:
    """Let tied parameters of an empty model be one object, as they are in a loaded one."""
    for target, source in getattr(model, "all_tied_weights_keys", {}).items():
        path, _, leaf = target.rpartition(".")
        setattr(model.get_submodule(path), leaf, model.get_parameter(source))


def _forget_ties(model: nn.Module, packed: set[str]) -> None:
    """transformers must not tie again what is tied by sharing the packed weight."""
    for module in model.modules():
        ties = getattr(module, "all_tied_weights_keys", None)
        if isinstance(ties, dict):
            prefix = {name for name in ties if name in packed or ties[name] in packed}
            module.all_tied_weights_keys = {k: v for k, v in ties.items() if k not in prefix}  # type: ignore[assignment]
