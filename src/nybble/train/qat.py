"""Quantization-aware training: prepare, train, convert.

Every weight that a plan packs is replaced, wherever it is used, by what it will be once it is quantized: the same format object
fits, encodes and decodes it in every pass. Rounding has no slope, so gradients go through it as if it were not there (the
straight-through estimator, Bengio et al. 2013); they move the float weight behind. Two ways to scales:

    fit       the format's own fit to the float weight, anew in every pass
    learned   scales move by gradients of their own (LSQ, Esser et al. 2020, section 2.1), from those of least squared error:
              ds = sum over a block of gradient * (level - w / s; beyond the last level: that level), and weights beyond the
              last level have no gradient. A scale is its first value times e^move, so that steps are relative.

`convert` packs the codes and params of the last pass: decoded they equal the weights trained with, to the bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nybble.errors import NumericError, UsageError, unknown_name
from nybble.formats import Format, QTensor, parse_format
from nybble.formats.codebook import Codebook
from nybble.formats.integer import Integer
from nybble.methods import parse_method
from nybble.methods.steps.fitting import fit_params
from nybble.models.describe import describe, sites
from nybble.models.float_weights import float_weight, turned
from nybble.models.replace import replace_weights
from nybble.plan import Plan, Recipe, make_plan

SCALES = ("fit", "learned")
ROUNDING = parse_method("rtn")


class FakeQuantized(nn.Module):
    """What a weight becomes in a forward pass. Holds the moves of learned scales."""

    def __init__(self, fmt: Format, layer: nn.Module, scales: str) -> None:
        super().__init__()
        self.format, self.layer_is_turned = fmt, turned(layer, torch.empty(1, 2)).shape[0] == 2
        self.first: NDArray[np.float64] | None = None
        self.offset: NDArray[np.float64] | None = None
        self.move: nn.Parameter | None = None
        if scales == "learned":
            scale, offset = fmt.grid(fit_params(fmt, float_weight(layer), "search"))
            self.first = scale.astype(np.float64)
            self.offset = None if offset is None else offset.astype(np.float64)
            self.move = nn.Parameter(torch.zeros(scale.shape))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight as it is decoded, in the layer's own orientation."""
        rows = weight.T if self.layer_is_turned else weight
        rounded: Tensor = _Round.apply(rows, self.move, self)
        return rounded.T if self.layer_is_turned else rounded

    def quantize(self, weight: NDArray[np.float32]) -> QTensor:
        """Codes and params of a weight [N, K] as they are now. Raises NumericError for one that is not finite."""
        if self.move is None or self.first is None:
            return ROUNDING.quantize(weight, self.format, None)
        scale = self.first * np.exp(self.move.detach().double().cpu().numpy())
        params = self.format.from_grid(scale, self.offset)
        return QTensor(self.format, self.format.encode(weight, params), params)


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, move: Tensor | None, fake: FakeQuantized) -> Tensor:
        values = np.ascontiguousarray(weight.detach().float().cpu().numpy())
        tensor = fake.quantize(values)
        decoded = torch.from_numpy(tensor.decode()).to(weight.device, weight.dtype)
        ctx.learned = move is not None
        if move is not None:
            scale, offset = (None if part is None else np.asarray(part, np.float32) for part in fake.format.grid(tensor.params))
            ctx.block, levels = fake.format.block(weight.shape[1]), fake.format.levels
            ctx.ends = float(levels.min()), float(levels.max())
            grids = [None if part is None else torch.from_numpy(part).to(weight.device) for part in (scale, offset)]
            ctx.save_for_backward(weight.detach(), decoded, *grids)
        return decoded

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        if not ctx.learned:
            return gradient, None, None
        weight, decoded, scale, offset = ctx.saved_tensors
        columns, blocks = weight.shape[1], scale.shape[1]

        def wide(grid: Tensor) -> Tensor:
            return grid.repeat_interleave(ctx.block, 1)[:, :columns] if blocks > 1 else grid

        level = weight / torch.where(wide(scale) == 0, 1.0, wide(scale)) + (0.0 if offset is None else wide(offset))
        inside = (level >= ctx.ends[0]) & (level <= ctx.ends[1])
        slope = gradient * torch.where(inside, decoded - weight, decoded)  # of ln(scale): s * d/ds
        if blocks > 1:
            slope = torch.nn.functional.pad(slope, (0, blocks * ctx.block - columns))
        move = slope.reshape(len(slope), blocks, -1).sum(2)
        if scale.shape[0] == 1:
            move = move.sum(0, keepdim=True)
        return gradient * inside, move, None


def prepare(
    model: nn.Module,
    format: str,
    keep: tuple[str, ...] = (),
    rules: tuple[tuple[str, str], ...] = (),
    scales: str = "fit",
) -> Plan:
    """Make a float model compute with weights in their formats from now on; returns the plan that says which.

    Raises UsageError for a format that is a cast, for learned scales of a format whose scales are shared (ggml's runs), and as
    `make_plan` does.
    """
    if scales not in SCALES:
        raise unknown_name("way to scales", scales, SCALES)
    plan = make_plan(describe(model), Recipe(format, "rtn", keep, rules))
    if plan.is_cast:
        raise UsageError(f"{format} is a cast: train with --precision and convert the result; QAT takes int4:g64, nf4, q4_k, ...")
    known = sites(model)
    for row in plan.packed:
        fmt = parse_format(row.format or "")
        alone = isinstance(fmt, Integer) or (isinstance(fmt, Codebook) and not fmt.double_quantized)
        if scales == "learned" and not (alone or fmt.is_cast):
            raise UsageError(f"scales of {fmt} cannot be learned one by one; leave --qat-scales at fit")
        owner, *others = known[row.tensor.name].modules
        fake = FakeQuantized(fmt, owner, "fit" if fmt.is_cast else scales)  # where a mix falls back to floats
        parametrize.register_parametrization(owner, "weight", fake)
        for other in others:
            parametrize.register_parametrization(other, "weight", fake)
            _list(other).original = _list(owner).original
    return plan


def prepared(model: nn.Module) -> dict[str, tuple[nn.Module, FakeQuantized]]:
    """Name of each prepared weight -> (the module that owns it, what it becomes); tied ones once."""
    found: dict[str, tuple[nn.Module, FakeQuantized]] = {}
    seen = set()
    for path, module in model.named_modules():
        if parametrize.is_parametrized(module, "weight") and isinstance(_list(module)[0], FakeQuantized):
            fake = _list(module)[0]
            if id(fake) not in seen:
                seen.add(id(fake))
                found[f"{path}.weight"] = (module, fake)
    return found


def convert(model: nn.Module) -> dict[str, QTensor]:
    """Replace every prepared weight by its packed one, in place; returns them by name. Raises NumericError naming a weight that
    is not finite."""
    tensors: dict[str, QTensor] = {}
    for name, (module, fake) in prepared(model).items():
        latent = _list(module).original.detach().float().cpu()
        rows = latent.T if fake.layer_is_turned else latent
        try:
            tensors[name] = fake.quantize(np.ascontiguousarray(rows.numpy()))
        except NumericError as error:
            raise NumericError(f"{name}: {error}") from error
    for module in list(model.modules()):
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
    replace_weights(model, tensors)
    return tensors


def scale_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The moves of learned scales, which no decay should draw anywhere."""
    return [fake.move for _, fake in prepared(model).values() if fake.move is not None]


def _list(module: nn.Module) -> Any:
    return module.parametrizations["weight"]  # type: ignore[index]
