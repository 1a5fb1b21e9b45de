"""Where a model's weights are while nothing computes with them: in the model, as they mostly are, or still in their file.

A model on a shelf has the modules, shapes and names of any other, and weights without memory. Within `out` those of some modules
have their values, in float32; when it ends they are given back. What was changed in between is forgotten, but for what `redo`
makes again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from nybble.files.safetensors import FLOAT_TAGS, NAMES, SafetensorsFile, widen
from nybble.models.checkpoint import Checkpoint
from nybble.models.loading import check_values, load_state
from nybble.models.mapped import give_back


class Shelf:
    """Of a model that holds all its weights: nothing has to be taken out, or put back."""

    @contextmanager
    def out(self, *modules: nn.Module, but: Iterable[nn.Module] = ()) -> Iterator[None]:
        """Within it all parts of these modules have their weights, except `but` and what is in them."""
        yield

    def redo(self, module: nn.Module, change: Callable[[], object]) -> None:
        """Have `change` made whenever a module is taken out from now on: it has been made to what is out."""

    def forget(self, module: nn.Module) -> None:
        """Have no change made to a module any more."""


class FileShelf(Shelf):
    """Of a model whose matrices lie in a checkpoint. Vectors are small: they stay in memory, as they were loaded."""

    def __init__(self, model: PreTrainedModel, places: Mapping[int, tuple[str, SafetensorsFile]]) -> None:
        """`places`: where a tensor of the model begins in memory -> (name in the checkpoint, file)."""
        # tensors are known by where they are: they must not go, whatever becomes of the model
        self._tensors = [*model.parameters(), *model.buffers()]
        self._names: dict[int, str] = {}
        self._places: dict[str, tuple[str, SafetensorsFile]] = {}
        self._resting: dict[int, Tensor] = {}
        self._out: dict[int, int] = {}
        self._changes: dict[int, list[Callable[[], object]]] = {}
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            self._names[id(tensor)], self._resting[id(tensor)] = name, tensor.data
            if tensor.data_ptr() in places:
                self._places[name] = places[tensor.data_ptr()]

    def stored(self, name: str) -> tuple[str, NDArray[Any]]:
        """(dtype tag, array as it lies in the file) of a parameter or buffer of the model."""
        if name in self._places:
            inside, file = self._places[name]
            return file.entries[inside].dtype, file.read(inside)
        resting = {self._names[key]: tensor for key, tensor in self._resting.items()}
        array = resting[name].numpy()  # transformers made it of something else: none of the file's
        return NAMES[array.dtype.name], array

    def float32(self, name: str) -> NDArray[np.float32]:
        """A copy of the same, widened."""
        values: NDArray[np.float32] = _float32(*self.stored(name)).numpy()
        return values

    @contextmanager
    def out(self, *modules: nn.Module, but: Iterable[nn.Module] = ()) -> Iterator[None]:
        """Raises NumericError, naming the tensor, for values that are not finite."""
        left = {id(part) for module in but for part in module.modules()}
        parts = {id(part): part for module in modules for part in module.modules() if id(part) not in left}
        own = (tensor for part in parts.values() for tensor in _own(part))
        found = {id(tensor): tensor for tensor in own if id(tensor) in self._names}  # what came later is in the model
        changed = [key for key in self._changes if key in parts and self._rests(parts[key])]
        with ExitStack() as stack:
            for tensor in found.values():
                stack.enter_context(self._one(tensor))
            for change in (change for key in changed for change in self._changes[key]):
                change()
            yield

    def redo(self, module: nn.Module, change: Callable[[], object]) -> None:
        self._changes.setdefault(id(module), []).append(change)

    def forget(self, module: nn.Module) -> None:
        self._changes.pop(id(module), None)

    def _rests(self, module: nn.Module) -> bool:
        """Whether no part of a module is out."""
        return not any(self._out.get(id(tensor)) for part in module.modules() for tensor in _own(part))

    @contextmanager
    def _one(self, tensor: Tensor) -> Iterator[None]:
        key = id(tensor)
        if not self._out.get(key):
            tensor.data = self._values(key)
        self._out[key] = self._out.get(key, 0) + 1
        try:
            yield
        finally:
            self._out[key] -= 1
            if not self._out[key]:
                tensor.data = self._resting[key]

    def _values(self, key: int) -> Tensor:
        """A copy of a tensor's values."""
        name = self._names[key]
        if name not in self._places or self._resting[key].dim() < 2:
            return self._resting[key].clone()
        tag, stored = self.stored(name)
        values = _float32(tag, stored)
        check_values(name, values)
        give_back(stored)
        return values


def shelved_model(checkpoint: Checkpoint) -> tuple[PreTrainedModel, FileShelf] | None:
    """The model of a checkpoint with its matrices left in the file, in eval mode, float32 as `load_model` gives it; None where
    transformers makes some of several of the file's.

    Errors are those of `load_model`; a matrix's values are looked at when it is taken out.
    """
    state: dict[str, Tensor] = {}
    places: dict[int, tuple[str, SafetensorsFile]] = {}
    for file in map(SafetensorsFile, checkpoint.files):
        for name, entry in file.entries.items():
            if len(entry.shape) > 1 and entry.dtype in FLOAT_TAGS and entry.bytes:
                point = torch.zeros(())  # in place of all values; where it lies says whose it is
                state[name] = point.expand(entry.shape)
            else:
                floats = entry.dtype in FLOAT_TAGS
                state[name] = _float32(entry.dtype, file.read(name)) if floats else torch.from_numpy(np.array(file.read(name)))
                check_values(name, state[name])
            places[state[name].data_ptr()] = name, file
    model = load_state(dict(checkpoint.config), state, torch.float32, checkpoint.folder, check=False)
    matrices = [tensor for tensor in model.state_dict().values() if tensor.is_floating_point() and tensor.dim() > 1]
    if any(tensor.data_ptr() not in places for tensor in matrices):
        return None
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model, FileShelf(model, places)


def _own(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers that a module itself holds."""
    return [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]


def _float32(tag: str, values: NDArray[Any]) -> Tensor:
    """A copy of what lies in a file, widened."""
    wide = widen(tag, values, "")
    return torch.from_numpy(np.array(wide) if wide is values or np.shares_memory(wide, values) else wide)
