"""Quantization-aware training: prepare, train, convert.

Every weight that a plan packs is replaced, wherever it is used, by what it will be once it is quantized: the format object that
quantizes finished models fits, encodes and decodes it in every pass (fake.py). Where the plan's method rounds inputs too, they
are rounded in the same pass. Training may begin from what a method chose: then every weight begins with its code, and as far
towards where the method would rather have it as leaves it there.

`convert` packs the codes and params of the last pass: decoded they equal the weights trained with, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nybble.errors import NumericError, UsageError, unknown_name
from nybble.formats import QTensor, parse_format
from nybble.formats.activations import Activations
from nybble.formats.base import spread
from nybble.formats.codebook import Codebook
from nybble.formats.integer import Integer
from nybble.methods import parse_method
from nybble.methods.steps.latent import BESIDE
from nybble.models.describe import describe, sites
from nybble.models.float_weights import put_weight
from nybble.models.replace import replace_weights
from nybble.plan import Plan, Recipe, make_plan, prunes
from nybble.run import quantize_by_plan
from nybble.train.fake import SCALES, FakeInputs, FakeQuantized, prepared, weight_list

INPUTS = "fake_inputs"


@dataclass(frozen=True)
class Beginning:
    """Where QAT begins: the recipe, and how its method comes to codes and scales."""

    recipe: Recipe
    scales: str = "fit"
    """`fit`, `fixed` or `learned`, see fake.py."""
    windows: NDArray[np.integer[Any]] | None = None
    """Calibration windows [windows, tokens] of a method that reads any."""
    observe: int = 0
    """Training passes in which static grids of inputs follow what they see."""
    restored: bool = False
    """What the method would choose comes from a checkpoint: nothing is chosen."""

    def check(self) -> None:
        """Raise UsageError for what cannot be."""
        if self.scales not in SCALES:
            raise unknown_name("way to scales", self.scales, SCALES)
        method = parse_method(self.recipe.method)
        if self.scales == "fit" and chooses(self.recipe.method):
            raise UsageError(f"method {method} chooses scales: train them (learned) or leave them (fixed), not fit")
        if self.observe and method.settings.activations != "static":
            raise UsageError(f"nothing to observe: method {method} has no static activations; give static, or best+static")


def chooses(method: str) -> bool:
    """Whether a method does more to weights than round them to nearest."""
    settings = parse_method(method).settings
    return settings.blockwise or settings.scales != "range"


def prepare(
    model: nn.Module,
    format: str,
    keep: tuple[str, ...] = (),
    rules: tuple[tuple[str, str], ...] = (),
    scales: str = "fit",
) -> Plan:
    """`prepare_from` plain rounding."""
    return prepare_from(model, Beginning(Recipe(format, "rtn", keep, rules), scales))


def prepare_from(model: nn.Module, begin: Beginning, progress: Callable[[str, int, int], None] | None = None) -> Plan:
    """Make a float model compute with weights (and inputs) in their formats from now on; returns the plan that says which.

    Biases and norms that the method moves are moved. Raises UsageError for a format that is a cast, for learned scales of a
    format whose scales are shared (ggml's runs), and as `make_plan` and the method do.
    """
    begin.check()
    recipe = begin.recipe
    plan = make_plan(describe(model), recipe)
    if plan.is_cast:
        raise UsageError(
            f"{recipe.format} is a cast: train with --precision and convert the result; QAT takes int4:g64, nf4, q4_k, ..."
        )
    formats = {row.tensor.name: parse_format(row.format or "") for row in plan.packed}
    for fmt in formats.values():
        alone = isinstance(fmt, Integer) or (isinstance(fmt, Codebook) and not fmt.double_quantized)
        if begin.scales == "learned" and not (alone or fmt.is_cast):
            raise UsageError(f"scales of {fmt} cannot be learned one by one; leave --qat-scales at fit, or fixed")
    known = sites(model)
    chosen: dict[str, QTensor] = {}
    if recipe.method != "rtn" and not begin.restored:
        chosen = _choose(model, plan, begin, progress)
    for row in plan.packed:
        name, fmt = row.tensor.name, formats[row.tensor.name]
        owner, *others = known[name].modules
        first = chosen.get(name)
        scales = "fit" if fmt.is_cast else begin.scales  # where a mix falls back to floats
        fake = FakeQuantized(fmt, owner, scales, first)
        parametrize.register_parametrization(owner, "weight", fake)
        for other in others:
            parametrize.register_parametrization(other, "weight", fake)
            weight_list(other).original = weight_list(owner).original
        if row.activations:
            scheme = (first and first.activations) or _placeholder(row.activations, recipe.method)
            _round_inputs(owner, FakeInputs(scheme, begin.observe))
    return plan


def convert(model: nn.Module) -> dict[str, QTensor]:
    """Replace every prepared weight by its packed one, in place; returns them by name. Raises NumericError naming a weight that
    is not finite."""
    tensors: dict[str, QTensor] = {}
    for name, (module, fake) in prepared(model).items():
        latent = weight_list(module).original.detach().float().cpu()
        rows = latent.T if fake.layer_is_turned else latent
        inputs = getattr(module, INPUTS, None)
        try:
            tensor = fake.quantize(np.ascontiguousarray(rows.numpy()))
        except NumericError as error:
            raise NumericError(f"{name}: {error}") from error
        tensors[name] = tensor if inputs is None else replace(tensor, activations=inputs.activations())
    for module in list(model.modules()):
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
        if isinstance(getattr(module, INPUTS, None), FakeInputs):
            getattr(module, INPUTS).hook.remove()
            delattr(module, INPUTS)
    replace_weights(model, tensors)
    return tensors


def _choose(model: Any, plan: Plan, begin: Beginning, progress: Callable[[str, int, int], None] | None) -> dict[str, QTensor]:
    """What the method chooses, by name; weights begin beside their codes, and floats that it moved are moved."""
    aims: dict[str, NDArray[np.float32]] = {}
    places: dict[str, NDArray[np.float32]] = {}

    def observe(name: str, weight: NDArray[np.float32], tensor: QTensor) -> None:
        aims[name] = places[name] if name in places else beside(weight, tensor)

    was_training = model.training
    quantized = quantize_by_plan(model.eval(), plan, begin.windows, progress=progress, observe=observe, places=places)
    model.train(was_training)
    known = sites(model)
    with torch.no_grad():
        for name in quantized.changed - quantized.tensors.keys():
            model.get_parameter(name).copy_(quantized.model().get_parameter(name))
    if chooses(begin.recipe.method):
        pruned = {row.tensor.name for row in plan.packed if prunes(row)}
        for name, aim in aims.items():
            if name in pruned:
                aim[quantized.tensors[name].decode() == 0] = 0  # exactly: what `keep_zeros` goes by
            put_weight(known[name].modules[0], aim)
    return dict(quantized.tensors)


def beside(weight: NDArray[np.float32], tensor: QTensor) -> NDArray[np.float32]:
    """float32 [N, K]: the value of each code, moved towards the weight as far as leaves the code the nearest."""
    fmt, columns = tensor.format, tensor.shape[1]
    decoded = tensor.decode()
    if fmt.is_cast:
        return decoded
    levels = np.unique(fmt.levels)
    gaps = np.full(len(levels), np.inf, np.float32)
    gaps[:-1] = np.diff(levels)
    gaps[1:] = np.minimum(gaps[1:], np.diff(levels))
    step = gaps[np.searchsorted(levels, fmt.levels)][tensor.codes] * np.abs(
        spread(fmt.grid(tensor.params)[0], columns, fmt.block(columns))
    )
    room: NDArray[np.float32] = (BESIDE * step).astype(np.float32)
    return decoded + np.clip(weight - decoded, -room, room)


def _placeholder(scheme: str, method: str) -> Activations:
    return Activations(scheme, threshold=parse_method(method).settings.threshold if scheme == "outliers" else 0.0)


def _round_inputs(layer: nn.Module, fake: FakeInputs) -> None:
    layer.add_module(INPUTS, fake)

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (fake(args[0]), *args[1:])

    fake.hook = layer.register_forward_pre_hook(hook)  # type: ignore[assignment]  # a handle, for convert
