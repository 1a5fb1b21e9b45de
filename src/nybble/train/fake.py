"""What quantization-aware training puts in the place of weights and inputs: the values that they will be rounded to.

Rounding has no slope, so gradients go through it as if it were not there (the straight-through estimator, Bengio et al. 2013);
they move the float weight behind. Three ways to the scales of weights:

    fit       the format's own fit to the float weight, anew in every pass
    fixed     those that a method chose before training
    learned   the same, moved by gradients of their own (LSQ, Esser et al. 2020, section 2.1):
              ds = sum over a block of gradient * (level - w / s; beyond the last level: that level).
              A scale is its first value times e^move, so that steps are relative.

Where scales do not follow the weights, a weight may leave the levels: beyond half a step from the last one it moves only inwards.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nybble.calibrate.histogram import Histogram
from nybble.formats import Format, QTensor
from nybble.formats.activations import Activations
from nybble.methods import parse_method
from nybble.methods.steps.fitting import fit_params
from nybble.methods.steps.observe import grid_to
from nybble.models.float_weights import float_weight, turned
from nybble.models.inputs import static_codes, token_codes

SCALES = ("fit", "fixed", "learned")
ROUNDING = parse_method("rtn")
RECENT = 0.05
"""Share of a batch's range in the running one."""


class FakeQuantized(nn.Module):
    """What a weight becomes in a forward pass. Holds what it takes: scales, and their moves where they are learned."""

    def __init__(self, fmt: Format, layer: nn.Module, scales: str, first: QTensor | None = None) -> None:
        """Scales are searched for the weight that the layer has now where no method chose `first`."""
        super().__init__()
        self.format, self.scales = fmt, scales
        self.layer_is_turned = turned(layer, torch.empty(1, 2)).shape[0] == 2
        self.move: nn.Parameter | None = None
        self._suffixes: tuple[str, ...] = ()
        if scales == "fit":
            return
        params = fit_params(fmt, float_weight(layer), "search") if first is None else first.params
        if scales == "learned":
            scale, offset = fmt.grid(params)
            params = {"scale": scale.astype(np.float64)} | ({} if offset is None else {"offset": offset.astype(np.float64)})
            self.move = nn.Parameter(torch.zeros(scale.shape))
        self._suffixes = tuple(params)
        for suffix, values in params.items():
            self.register_buffer(f"first_{suffix}", torch.from_numpy(np.array(values)))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight as it is decoded, in the layer's own orientation."""
        rows = weight.T if self.layer_is_turned else weight
        rounded: Tensor = _Round.apply(rows, self.move, self)
        return rounded.T if self.layer_is_turned else rounded

    def quantize(self, weight: NDArray[np.float32]) -> QTensor:
        """Codes and params of a weight [N, K] as they are now. Raises NumericError for one that is not finite."""
        if self.scales == "fit":
            return ROUNDING.quantize(weight, self.format, None)
        params = {suffix: self.get_buffer(f"first_{suffix}").cpu().numpy() for suffix in self._suffixes}
        if self.move is not None:
            scale = params["scale"] * np.exp(self.move.detach().double().cpu().numpy())
            params = self.format.from_grid(scale, params.get("offset"))
        return QTensor(self.format, self.format.encode(weight, params), params)


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, move: Tensor | None, fake: FakeQuantized) -> Tensor:
        values = np.ascontiguousarray(weight.detach().float().cpu().numpy())
        tensor = fake.quantize(values)
        decoded = torch.from_numpy(tensor.decode()).to(weight.device, weight.dtype)
        ctx.follows = fake.scales == "fit"
        if not ctx.follows:
            grid = fake.format.grid(tensor.params)
            ctx.block, ctx.shifted = fake.format.block(weight.shape[1]), fake.format.shifted
            levels = np.unique(fake.format.levels)
            ctx.ends = float(levels[0]), float(levels[-1])
            ctx.beyond = float(levels[1] - levels[0]) / 2, float(levels[-1] - levels[-2]) / 2
            parts = [None if part is None else torch.from_numpy(np.array(part, np.float32)).to(weight.device) for part in grid]
            ctx.save_for_backward(weight.detach(), decoded, *parts)
        return decoded

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        if ctx.follows:
            return gradient, None, None
        weight, decoded, scale, offset = ctx.saved_tensors
        columns, blocks = weight.shape[1], scale.shape[1]

        def wide(grid: Tensor) -> Tensor:
            return grid.repeat_interleave(ctx.block, 1)[:, :columns] if blocks > 1 else grid

        value = weight if offset is None or not ctx.shifted else weight - wide(offset)
        level = value / torch.where(wide(scale) == 0, 1.0, wide(scale))
        if offset is not None and not ctx.shifted:
            level = level + wide(offset)
        low, high = ctx.ends
        up = gradient * wide(scale) < 0  # where the level would go
        free = (level >= low - ctx.beyond[0]) | up
        free &= (level <= high + ctx.beyond[1]) | ~up
        if not ctx.needs_input_grad[1]:
            return gradient * free, None, None
        inside = (level >= low) & (level <= high)
        slope = gradient * torch.where(inside, decoded - weight, decoded)  # of ln(scale): s * d/ds
        if blocks > 1:
            slope = nn.functional.pad(slope, (0, blocks * ctx.block - columns))
        move = slope.reshape(len(slope), blocks, -1).sum(2)
        if scale.shape[0] == 1:
            move = move.sum(0, keepdim=True)
        return gradient * free, move, None


class FakeInputs(nn.Module):
    """What the inputs of a layer become in a forward pass: the codes that a packed layer makes of them (models/inputs.py).

    `dynamic` and `outliers` need nothing. A static grid begins as calibration found it; in its first `observe` training passes it
    follows a running mean of the ranges that it sees (Jacob et al. 2018, section 3.1), and then stays.
    """

    scale: Tensor
    zero: Tensor
    ends: Tensor
    passes: Tensor

    def __init__(self, activations: Activations, observe: int) -> None:
        super().__init__()
        self.scheme, self.threshold, self.observe = activations.scheme, activations.threshold, observe
        if self.scheme == "static":
            self.register_buffer("scale", torch.empty(1))
            self.register_buffer("zero", torch.empty(1, dtype=torch.uint8))
            self.register_buffer("ends", torch.empty(2))
            self.register_buffer("passes", torch.zeros(1, dtype=torch.int64))
            self._set(activations)
            self.ends.copy_(self._reach())

    def forward(self, inputs: Tensor) -> Tensor:
        """The inputs, rounded; gradients pass where the grid reaches."""
        looks = self.training and torch.is_grad_enabled()
        with torch.no_grad():
            x = inputs.float()
            if self.scheme == "static":
                if looks and int(self.passes) < self.observe:
                    self._look(x)
                codes, scale = static_codes(x, self.scale, self.zero)
                rounded = codes * scale
            elif self.scheme == "dynamic":
                codes, scale = token_codes(x)
                rounded = codes * scale
            else:
                large = x.abs() >= self.threshold
                codes, scale = token_codes(x.masked_fill(large, 0))
                rounded = torch.where(large, x, codes * scale)
            rounded = rounded.to(inputs.dtype)
        if self.scheme == "static":
            low, high = self._reach().tolist()
            inputs = inputs.clamp(low, high)
        return inputs + (rounded - inputs).detach()

    def activations(self) -> Activations:
        """The scheme as it is now."""
        if self.scheme == "static":
            return Activations("static", scale=float(self.scale), zero=int(self.zero))
        return Activations(self.scheme, self.threshold)

    def _look(self, x: Tensor) -> None:
        low, high = torch.aminmax(x)
        self.ends += RECENT * (torch.stack([low.clamp(max=0), high.clamp(min=0)]) - self.ends)
        self.passes += 1
        seen = Histogram()
        seen.low, seen.high = (float(end) for end in self.ends)
        if seen.low < seen.high:
            self._set(grid_to(seen, max(-seen.low, seen.high), lopsided=True))

    def _set(self, grid: Activations) -> None:
        self.scale.fill_(grid.scale)
        self.zero.fill_(grid.zero)

    def _reach(self) -> Tensor:
        """Float32 [2]: the least and the largest value of the grid."""
        zero = self.zero.float()
        return torch.cat([-zero, 255 - zero]) * self.scale


def prepared(model: nn.Module) -> dict[str, tuple[nn.Module, FakeQuantized]]:
    """Name of each prepared weight -> (the module that owns it, what it becomes); tied ones once."""
    found: dict[str, tuple[nn.Module, FakeQuantized]] = {}
    seen = set()
    for path, module in model.named_modules():
        if parametrize.is_parametrized(module, "weight") and isinstance(weight_list(module)[0], FakeQuantized):
            fake = weight_list(module)[0]
            if id(fake) not in seen:
                seen.add(id(fake))
                found[f"{path}.weight"] = (module, fake)
    return found


def scale_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The moves of learned scales, which no decay should draw anywhere."""
    return [fake.move for _, fake in prepared(model).values() if fake.move is not None]


def weight_list(module: nn.Module) -> Any:
    """What a layer's weight goes through before it is used; `original` is the float weight."""
    return module.parametrizations["weight"]  # type: ignore[index]
