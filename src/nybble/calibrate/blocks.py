"""A model as a row of blocks: run one block at a time over all calibration windows, and look at what its layers are fed.

Only the hidden states between two blocks are kept, float32 [windows, T, width], in memory or on disk; a block's own
activations live for one window. What else a block is called with (masks, rotary tables) is the same for every window, and taken
from the first.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nybble.calibrate.states import States, new_states
from nybble.calibrate.watching import Stop, inputs_of, no_cache
from nybble.calibrate.workers import Workers
from nybble.errors import BlocksError
from nybble.models.packed import replaceable
from nybble.models.shelf import Shelf


class Blocks:
    """The repeated blocks of a model and the hidden states that enter the first of them. Making it raises BlocksError for a model
    that is no row of blocks."""

    def __init__(
        self, model: nn.Module, windows: NDArray[np.integer[Any]], shelf: Shelf | None = None, folder: Path | None = None
    ) -> None:
        """`shelf` is where the model's weights are, if not in it; hidden states are kept in a folder, if not in memory."""
        self.prefix, self.modules = find_blocks(model)
        self._model, self._windows, self._shelf = model, windows, shelf or Shelf()
        self._arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._rests: list[tuple[Any, ...] | None] = []
        first = self._look_at_arguments()
        self.hidden = new_states(folder, len(windows), first)
        entered: list[Tensor] = []

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entered.append(args[0] if args else kwargs["hidden_states"])
            raise Stop

        hook = self.modules[0].register_forward_pre_hook(enter, with_kwargs=True)
        try:
            with torch.no_grad(), self.around():
                for window in range(1, len(windows)):
                    with suppress(Stop):
                        self._forward(window)
                    self.hidden[window] = entered.pop().detach().clone()
        finally:
            hook.remove()

    def _look_at_arguments(self) -> Tensor:
        """What blocks are called with beside hidden states, and give beside them; returns what enters the first."""
        hidden: list[Tensor] = []
        taken = ExitStack()

        def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if args:
                state, rest = args[0], args[1:]
            else:
                kwargs = dict(kwargs)
                state, rest = kwargs.pop("hidden_states"), ()
            self._arguments.append((rest, kwargs))
            if len(self._arguments) == 1:
                hidden.append(state.detach().clone())
            taken.enter_context(self._shelf.out(module))

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            taken.close()
            self._rests.append(output[1:] if isinstance(output, tuple) else None)

        def stop(*_: Any) -> None:
            raise Stop

        head = self._head()
        hooks = [module.register_forward_pre_hook(watch, with_kwargs=True) for module in self.modules]
        hooks += [module.register_forward_hook(after) for module in self.modules]
        if head is not None:  # all that is before it runs: a block might run again
            hooks.append(head.register_forward_pre_hook(stop))
        try:
            with torch.no_grad(), self.around(), suppress(Stop):
                self._forward(0)
        finally:
            taken.close()
            for hook in hooks:
                hook.remove()
        if len(self._arguments) != len(self.modules):
            raise BlocksError(f"the blocks {self.prefix} of this {type(self._model).__name__} do not run once each, in order")
        return hidden[0]

    def _forward(self, window: int) -> Any:
        ids = torch.from_numpy(self._windows[window : window + 1].astype(np.int64))
        return self._model(ids, **no_cache(self._model))

    def _head(self) -> nn.Module | None:
        head: nn.Module | None = getattr(self._model, "get_output_embeddings", lambda: None)()
        return head

    @contextmanager
    def around(self) -> Iterator[None]:
        """Within it all that is not in the blocks has its weights, but for a head of its own."""
        head, table = self._head(), getattr(self._model, "get_input_embeddings", lambda: None)()
        but = list(self.modules)
        if head is not None and (table is None or head._parameters.get("weight") is not table._parameters.get("weight")):
            but.append(head)
        with self._shelf.out(self._model, but=but):
            yield

    @contextmanager
    def skipped(self, states: States | Mapping[int, Tensor]) -> Iterator[Callable[[int], Any]]:
        """Within it the model's blocks do nothing but give `states`, what the last of them would: the function given runs all
        the rest on a window, on any thread."""
        here = threading.local()

        def stub(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                state = args[0] if args else kwargs["hidden_states"]
                if index == len(self.modules) - 1:
                    state = states[here.window]
                rest = self._rests[index]
                return state if rest is None else (state, *rest)

            return forward

        def run(window: int) -> Any:
            here.window = window
            return self._forward(window)

        own = [module.__dict__.get("forward") for module in self.modules]  # what somebody put in the place of the class's
        for index, module in enumerate(self.modules):
            module.forward = stub(index)
        try:
            with self.around():
                yield run
        finally:
            for module, before in zip(self.modules, own, strict=True):
                del module.forward
                if before is not None:
                    module.forward = before

    def __len__(self) -> int:
        return len(self.modules)

    def run(self, index: int, state: Tensor, module: nn.Module | None = None) -> Tensor:
        """What block `index` makes of one window's hidden states [1, T, width]; `module` in its place."""
        with torch.no_grad():
            return self._call(index, state, module)

    def trace(self, index: int, state: Tensor) -> Tensor:
        """The same with its graph."""
        with torch.enable_grad():
            return self._call(index, state)

    def advance(self, index: int, states: States, workers: Workers, module: nn.Module | None = None) -> None:
        """Hidden states one block on, in place: two whole streams would be the most memory that a walk takes."""
        for window, state in enumerate(workers.map(lambda w: self.run(index, states[w], module), range(len(states)))):
            states[window] = state

    def _call(self, index: int, state: Tensor, module: nn.Module | None = None) -> Tensor:
        args, kwargs = self._arguments[index]
        result = (module or self.modules[index])(state, *args, **kwargs)
        found = result[0] if isinstance(result, tuple) else result
        assert isinstance(found, Tensor)
        return found

    def slope(self, index: int, state: Tensor, aim: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
        """Gradient by leaf tensors of the block of the mean squared difference between what it gives and `aim`; zeros for what
        it does not use."""
        with torch.enable_grad():
            loss = (self._call(index, state) - aim).float().square().mean()
            return torch.autograd.grad(loss, leaves, materialize_grads=True)

    def inputs(self, index: int, state: Tensor, layer: nn.Module, module: nn.Module | None = None) -> Tensor:
        """float32 [T, K]: what a layer of the block is fed for one window; the block runs no further."""
        found = inputs_of(layer, lambda: self.run(index, state, module))
        assert found is not None, "inputs() needs catch_inputs(layer) around it"
        return found

    def calls(self, index: int, state: Tensor, layers: dict[str, nn.Module]) -> list[list[str]]:
        """Names of the block's layers in the order they run, those that are fed the same tensor together."""
        groups: list[tuple[Tensor, list[str]]] = []

        def watch(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
                for tensor, names in groups:
                    if tensor is args[0]:
                        if name not in names:
                            names.append(name)
                        return
                groups.append((args[0], [name]))

            return hook

        hooks = [module.register_forward_pre_hook(watch(name)) for name, module in layers.items()]
        try:
            self.run(index, state)
        finally:
            for hook in hooks:
                hook.remove()
        seen: set[str] = set()
        result = []
        for _, names in groups:
            fresh = [name for name in names if name not in seen]
            seen.update(fresh)
            if fresh:
                result.append(fresh)
        return result


def find_blocks(model: nn.Module) -> tuple[str, list[nn.Module]]:
    """(path, modules) of the list of blocks: the outermost list that holds most packable weights."""
    best: tuple[int, str, list[nn.Module]] = (0, "", [])
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module):
            inner = [layer for layer in module.modules() if replaceable(layer) and not isinstance(layer, nn.Embedding)]
            weights = sum(parameter.numel() for layer in inner if (parameter := layer._parameters["weight"]) is not None)
            if weights > best[0]:
                best = (weights, path, list(module))
    if not best[2]:
        raise BlocksError(f"this {type(model).__name__} has no list of blocks with linear layers to calibrate")
    return best[1], best[2]
