"""Static grids for the inputs of a packed model that is not held: one block at a time is packed, run and given up."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nybble.calibrate.blocks import Blocks, find_blocks
from nybble.calibrate.histogram import Histogram
from nybble.calibrate.watching import catch_inputs, inputs_of
from nybble.calibrate.workers import Workers
from nybble.errors import NumericError
from nybble.formats import QTensor
from nybble.formats.activations import Activations
from nybble.methods.steps.observe import static_grid
from nybble.methods.steps.settings import Settings
from nybble.models.loading import quiet
from nybble.models.packed import PackedWeight, put_packed
from nybble.models.replace import replace_weights
from nybble.models.shelf import Shelf
from nybble.plan import Plan

Progress = Callable[[str, int, int], None]


def static_grids(
    model: nn.Module,
    plan: Plan,
    settings: Settings,
    windows: NDArray[np.integer[Any]],
    read: Callable[[str], QTensor],
    moved: Mapping[str, Tensor],
    shelf: Shelf,
    scratch: Path | None,
    threads: int | None,
    progress: Progress,
) -> dict[str, Activations]:
    """Name -> the grid of every weight that the plan gives a static one: of the inputs that the packed model has on calibration
    windows, none of them rounded yet, as `run.quantize` finds it on a model that is held.

    `read` gives packed weights, `moved` what became of biases and norms; `shelf` and `scratch` are as of `Blocks`. The model is
    left with packed weights outside its blocks. Raises BlocksError for a model that is no row of blocks, NumericError that names
    a weight whose inputs are not finite.
    """
    rows = {row.tensor.name: row for row in plan.packed}
    found = {name: Histogram() for name, row in rows.items() if row.activations == "static"}
    prefix, _ = find_blocks(model)
    outside = [name for name in rows if not name.startswith(f"{prefix}.")]
    for name in outside:
        shelf.forget(model.get_submodule(_owner(name)))
    replace_weights(model, {name: read(name) for name in outside})
    with quiet(), Workers(threads) as workers:
        blocks = Blocks(model, windows, shelf, scratch)
        states = blocks.hidden
        for index, block in enumerate(blocks.modules):
            path = f"{prefix}.{index}."
            inside = [name for name in rows if name.startswith(path)]
            with shelf.out(block):
                twin = copy.deepcopy(block)
            with torch.no_grad():
                for name, value in moved.items():
                    if name.startswith(path):
                        twin.get_parameter(name.removeprefix(path)).copy_(value)
            for name in inside:
                _pack(twin, name.removeprefix(path), read(name))
            layers = {name: twin.get_submodule(_owner(name.removeprefix(path))) for name in inside if name in found}
            with _watching(layers, found):
                blocks.advance(index, states, workers, twin)
            progress("observing inputs", index + 1, len(blocks))
        for name in (name for name in outside if name in found):
            layer = model.get_submodule(_owner(name))
            with blocks.skipped(states) as run, shelf.out(layer), catch_inputs(layer), torch.no_grad():
                for window in range(len(windows)):
                    inputs = inputs_of(layer, partial(run, window))
                    if inputs is not None:
                        _add(found[name], name, inputs)
    return {name: static_grid(histogram, settings) for name, histogram in found.items()}


def _owner(name: str) -> str:
    """The module that a weight belongs to."""
    return name.rpartition(".")[0]


def _pack(block: nn.Module, name: str, tensor: QTensor) -> None:
    """Put a packed weight in the place of a block's float one, wherever that is used."""
    first = block.get_submodule(_owner(name))
    float_weight = first._parameters["weight"]
    packed = PackedWeight.from_qtensor(tensor)
    for module in [module for module in block.modules() if module._parameters.get("weight") is float_weight]:
        put_packed(module, packed, owner=module is first, compute_dtype=torch.float32)


@contextmanager
def _watching(layers: Mapping[str, nn.Module], found: Mapping[str, Histogram]) -> Iterator[None]:
    """Within it what these layers are fed, on any thread, is added to their histograms."""
    lock = threading.Lock()

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            with lock:
                _add(found[name], name, inputs[0])

        return hook

    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _add(histogram: Histogram, name: str, inputs: Tensor) -> None:
    try:
        histogram.add(inputs)
    except NumericError as error:
        raise NumericError(f"{name}: {error}") from error
