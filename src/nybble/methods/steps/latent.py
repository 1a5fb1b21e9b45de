"""What tuning moves: codes and scales of a weight, or a float parameter, as real numbers that follow a slope.

Every code has a position, a real number that rounds to it. It begins where the layer's own loss would have it (`wanted`):
a code about to tip tips early, and nothing tips at once. Positions move by the gradient, which passes through the rounding
unchanged (straight-through, as in SignRound, arXiv 2309.05516), and scales on their logarithm, through their storage precision.
How far a step goes is Adam's matter, or the same for all and only its sign is the gradient's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from nybble.formats import QTensor
from nybble.formats.base import Params
from nybble.methods.steps.grid import columns_of, grid_of, params_of

BESIDE = 0.45
"""A position begins at most so far from its code."""
ADAM = (0.9, 0.99)
"""Shares of the past in the mean slope and in the mean squared slope."""
FLOATS = 0.04
"""How far float parameters move, as a share of their root mean square, where the outermost levels move by one."""
SMALLEST = 1e-3
"""What counts as that root mean square at least: a bias of zeros has to begin somewhere."""


class Rule(Protocol):
    """How a step follows from slopes. Made with a tensor of the shape that moves."""

    def move(self, slope: Tensor, count: int) -> Tensor:
        """The direction of step `count`, from 1: about one in size."""
        ...

    def moving(self) -> dict[str, Tensor]:
        """What it remembers of the steps so far, itself and no copies: name -> tensor."""
        ...


class Adam:
    """Mean and mean square of a slope over the steps so far."""

    def __init__(self, like: Tensor) -> None:
        self._mean, self._square = torch.zeros_like(like), torch.zeros_like(like)

    def move(self, slope: Tensor, count: int) -> Tensor:
        """The direction of step `count`, from 1: about one in size where slopes agree, less where they do not."""
        first, second = ADAM
        self._mean.mul_(first).add_(slope, alpha=1 - first)
        self._square.mul_(second).addcmul_(slope, slope, value=1 - second)
        size = (self._square / (1 - second**count)).sqrt_().clamp_(min=1e-30)
        return (self._mean / (1 - first**count)).div_(size)

    def moving(self) -> dict[str, Tensor]:
        """Both means, themselves."""
        return {"mean": self._mean, "square": self._square}


class Sign:
    """The sign of the slope: every step the same size."""

    def __init__(self, like: Tensor) -> None:
        pass

    def move(self, slope: Tensor, count: int) -> Tensor:
        """One, or minus one, or zero."""
        return slope.sign()

    def moving(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}


class Latent:
    """A weight while it is tuned: positions of its codes and gains of its scales, float32."""

    def __init__(self, tensor: QTensor, wanted: Tensor | None, rule: Callable[[Tensor], Rule] = Adam) -> None:
        """From codes already chosen. `wanted`, float32 [N, K], is where each would rather be, in levels from where it is; None:
        there."""
        self.fmt = tensor.format
        levels, codes = np.unique(self.fmt.levels, return_index=True)
        self.levels, self.codes_of = torch.from_numpy(levels).float(), torch.from_numpy(codes.astype(np.uint8))
        self.gaps = torch.from_numpy(np.gradient(levels).astype(np.float32))
        scale, offset = grid_of(self.fmt, tensor.params)
        self.scale, self.offset = scale.float(), None if offset is None else offset.float()
        self.gain = torch.zeros_like(self.scale)
        """Logarithm of what the scale is multiplied by."""
        order = torch.zeros(1 << self.fmt.bits)
        order[self.codes_of.long()] = torch.arange(len(levels)).float()
        self.positions = order[torch.from_numpy(tensor.codes.astype(np.int64))]
        if wanted is not None:
            self.positions += (wanted / self.gaps[self.positions.long()]).clamp_(-BESIDE, BESIDE)
        """[N, K], in steps of the ascending levels."""
        self._of_positions, self._of_scale = rule(self.positions), rule(self.scale)

    def moving(self) -> dict[str, Tensor]:
        """All that steps change, itself and no copies: name -> tensor. With it filled from another's, both go on alike."""
        rules = {"position": self._of_positions, "scale": self._of_scale}
        found = {f"{what}.{name}": value for what, rule in rules.items() for name, value in rule.moving().items()}
        return {"positions": self.positions, "gain": self.gain, **found}

    def state(self) -> dict[str, Tensor]:
        """A copy of what it stands for: codes, uint8 [N, K], and gains of scales."""
        return {"codes": self.codes_of[self._ranks()], "gain": self.gain.clone()}

    def tensor(self, state: Mapping[str, Tensor] | None = None) -> QTensor:
        """What it stands for now, or stood for in a state."""
        state = state or self.state()
        return QTensor(self.fmt, state["codes"].numpy(), self._params(state["gain"]))

    def again(self, tensor: QTensor, rule: Callable[[Tensor], Rule] = Adam) -> Latent:
        """A new one from a tensor that this one stood for, whose positions begin where these are, or as near as may be."""
        fresh = Latent(tensor, None, rule)
        rank = fresh.positions
        fresh.positions = rank + (self.positions - rank).clamp_(-BESIDE, BESIDE)
        return fresh

    @classmethod
    def at(cls, tensor: QTensor, positions: Tensor) -> Latent:
        """One whose positions, float32 [N, K], begin where another's began."""
        fresh = cls(tensor, None)
        fresh.positions = positions
        return fresh

    def value(self) -> Tensor:
        """float32 [N, K]: the same, decoded."""
        values = self._levels().mul_(self._wide(self._stored_scale()))
        return values.add_(self._wide(self.offset)) if self.offset is not None and self.fmt.shifted else values

    def place(self) -> Tensor:
        """float32 [N, K]: where positions stand between the values of their codes, which stay the nearest."""
        rank = self._ranks()
        between = (self.positions - rank).clamp_(-BESIDE, BESIDE) * self.gaps[rank]
        return self.value() + between * self._wide(self._stored_scale())

    def step(self, slope: Tensor, travel: float, gain: float, count: int) -> None:
        """Move down a slope, float32 [N, K]: positions by about `travel`, the outermost levels by their scale by about
        `gain`, both in levels. `count` is the number of this step, from 1."""
        wide = self._wide(self._stored_scale())
        along = self._by_block(slope * self._levels() * wide) if gain > 0 else None
        if travel > 0:
            self.positions -= self._of_positions.move(slope * wide * self.gaps[self._ranks()], count).mul_(travel)
            self.positions.clamp_(-0.49, len(self.levels) - 0.51)
        if along is not None:
            # half the range is (levels - 1) / 2 steps: more bits, smaller shares of a scale, as errors are smaller too
            self.gain -= self._of_scale.move(along, count).mul_(2 * gain / (len(self.levels) - 1))

    def _ranks(self) -> Tensor:
        return self.positions.round().long()

    def _levels(self) -> Tensor:
        levels = self.levels[self._ranks()]
        return levels if self.offset is None or self.fmt.shifted else levels - self._wide(self.offset)

    def _params(self, gain: Tensor) -> Params:
        offset = None if self.offset is None else self.offset.double()
        return params_of(self.fmt, (self.scale * gain.exp()).double(), offset)

    def _stored_scale(self) -> Tensor:
        return grid_of(self.fmt, self._params(self.gain))[0].float()

    def _wide(self, grid: Tensor) -> Tensor:
        columns = self.positions.shape[1]
        return columns_of(grid, columns, self.fmt.block(columns))

    def _by_block(self, values: Tensor) -> Tensor:
        """Sums over what shares a scale."""
        if self.scale.shape[0] == 1 and values.shape[0] != 1:
            return values.sum().reshape(1, 1)
        columns = values.shape[1]
        block = self.fmt.block(columns)
        return torch.nn.functional.pad(values, (0, -columns % block)).reshape(values.shape[0], -1, block).sum(-1)


class FloatLatent:
    """A norm's gain or a bias while it is tuned, float32 [N]."""

    def __init__(self, start: Tensor) -> None:
        self._value = start.detach().float().clone()
        self._size = max(float(self._value.square().mean().sqrt()), SMALLEST)
        self._rule = Adam(self._value)

    def moving(self) -> dict[str, Tensor]:
        """All that steps change, as a weight's."""
        return {"value": self._value, **self._rule.moving()}

    def state(self) -> dict[str, Tensor]:
        """A copy of what it stands for."""
        return {"value": self._value.clone()}

    def tensor(self, state: Mapping[str, Tensor] | None = None) -> Tensor:
        """What it stands for now, or stood for in a state."""
        return (state or self.state())["value"]

    def value(self) -> Tensor:
        """What it stands for now."""
        return self._value

    def step(self, slope: Tensor, travel: float, gain: float, count: int) -> None:
        """Move down a slope, float32 [N], by about FLOATS * gain of its size."""
        self._value -= self._rule.move(slope, count).mul_(FLOATS * gain * self._size)
