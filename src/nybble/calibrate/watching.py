"""Looking at what layers are fed and what they give, while several threads run the same model.

Hooks are registered once, by the thread that starts the work; what they see goes to the thread that runs the model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nybble.models.loading import quiet


class Stop(Exception):  # not an error: it ends a forward pass whose rest is not wanted
    """Raised inside a forward pass by a hook that has seen what it was waiting for."""


class _Here(threading.local):
    layer: nn.Module | None = None
    found: Tensor | None = None
    outputs: dict[str, Tensor] | None = None


_here = _Here()


@contextmanager
def catch_inputs(*layers: nn.Module | None) -> Iterator[None]:
    """Within it `inputs_of` can look at what these layers are fed, on any thread."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        if _here.layer is module:
            _here.found = args[0]
            raise Stop

    handles = [layer.register_forward_pre_hook(hook) for layer in layers if layer is not None]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def inputs_of(layer: nn.Module, run: Callable[[], object]) -> Tensor | None:
    """float32 [T, K]: what a layer is fed when `run` is called, which goes no further; None where it is not reached."""
    _here.layer, _here.found = layer, None
    try:
        with suppress(Stop):
            run()
    finally:
        found, _here.layer, _here.found = _here.found, None, None
    return None if found is None else found.detach().reshape(-1, found.shape[-1]).float()


def watch_inputs(
    model: nn.Module,
    layers: Iterable[tuple[str, nn.Module]],
    windows: NDArray[np.integer[Any]],
    see: Callable[[str, Tensor], None],
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Run a model over token windows, integers [windows, tokens], one after the other on this thread, and show what layers are
    fed: `see(name, inputs [..., T, K])` for each time one runs."""

    def watch(name: str) -> Callable[..., None]:
        return lambda _, inputs: see(name, inputs[0].detach())

    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers]
    try:
        with quiet(), torch.inference_mode():
            for i, window in enumerate(windows):
                model(torch.from_numpy(window[None].astype(np.int64)), **no_cache(model))
                if progress:
                    progress(i + 1, len(windows))
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def keep_outputs(layers: Mapping[str, nn.Module]) -> Iterator[Callable[[], dict[str, Tensor]]]:
    """Within it the outputs of layers are kept, with their graph: the function given yields those that were kept on this
    thread since it was last called, by name."""

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if _here.outputs is None:
                _here.outputs = {}
            _here.outputs[name] = output

        return hook

    def take() -> dict[str, Tensor]:
        outputs, _here.outputs = _here.outputs, None
        return outputs or {}

    handles = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    try:
        yield take
    finally:
        for handle in handles:
            handle.remove()


def no_cache(model: nn.Module) -> dict[str, Any]:
    """Arguments that keep a model from building a cache of keys and values."""
    return {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
