"""Tuning all layers together: codes and scales move down the slope of the KL against the float model's predictions.

Every code has a position, a real number that rounds to it. It begins where the layer's own loss would have it (`wanted`):
a code about to tip tips early, and nothing tips at once. Positions then move by Adam, whose gradient passes through the
rounding unchanged (straight-through, as in SignRound, arXiv 2309.05516), and scales by Adam on their logarithm, through their
storage precision. What counts is the loss on windows that are held back: the best state seen is kept, the start among them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from nybble.formats import QTensor
from nybble.formats.base import Params
from nybble.methods.steps.grid import columns_of, grid_of, params_of
from nybble.methods.steps.settings import Settings

HELD_BACK = 16
"""Every so many-th window judges and is not trained on."""
CHECKS = 10
"""How often that loss is looked at, in all."""
BESIDE = 0.45
"""A position begins at most so far from its code."""
ADAM = (0.9, 0.99)
"""Shares of the past in the mean slope and in the mean squared slope."""

Slope = Callable[[list[int]], dict[str, Tensor]]
"""Gradient of the mean loss over some windows by each weight, float32 [N, K]."""


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


class Latent:
    """A weight while it is tuned: positions of its codes and gains of its scales, float32."""

    def __init__(self, tensor: QTensor, wanted: Tensor) -> None:
        """From codes already chosen. `wanted`, float32 [N, K], is where each would rather be, in levels from where it is."""
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
        rank = order[torch.from_numpy(tensor.codes.astype(np.int64))]
        self.positions = rank + (wanted / self.gaps[rank.long()]).clamp_(-BESIDE, BESIDE)
        """[N, K], in steps of the ascending levels."""
        self._of_positions, self._of_scale = Adam(self.positions), Adam(self.scale)

    def state(self) -> tuple[Tensor, Tensor]:
        """A copy of what it stands for: (codes, uint8 [N, K]; gains)."""
        return self.codes_of[self._ranks()], self.gain.clone()

    def tensor(self, state: tuple[Tensor, Tensor] | None = None) -> QTensor:
        """What it stands for now, or stood for in a state."""
        codes, gain = state or self.state()
        return QTensor(self.fmt, codes.numpy(), self._params(gain))

    def value(self) -> Tensor:
        """float32 [N, K]: the same, decoded."""
        return self._levels().mul_(self._wide(self._stored_scale()))

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
        return levels if self.offset is None else levels - self._wide(self.offset)

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


def tune(
    latents: dict[str, Latent],
    settings: Settings,
    steps: int,
    windows: int,
    slope: Slope,
    loss: Callable[[Sequence[int]], float],
    show: Callable[[str, Tensor], None],
    each: Callable[[Callable[[int], None], Sequence[int]], None],
    report: Callable[[str, int, int], None],
) -> tuple[dict[str, QTensor], list[tuple[int, float]]]:
    """Move the latents so many steps. `show(name, weight)` puts a weight where `slope` and `loss` see it; `loss` is the mean
    over some windows. Returns the best weights, and (step, loss on the windows held back) as it went."""
    names = list(latents)
    held = list(range(HELD_BACK - 1, windows, HELD_BACK)) or [windows - 1]
    train = [i for i in range(windows) if i not in held] or held
    generator = torch.Generator().manual_seed(settings.seed)
    order = list[int]()
    history: list[tuple[int, float]] = []
    best: dict[str, tuple[Tensor, Tensor]] = {}
    for step in range(steps + 1):
        each(lambda i: show(names[i], latents[names[i]].value()), range(len(names)))
        if step % max(1, steps // CHECKS) == 0 or step == steps:
            history.append((step, loss(held)))
            if history[-1][1] <= min(value for _, value in history):
                best = {name: latent.state() for name, latent in latents.items()}
        report(f"tuning, KL {history[-1][1]:.3g}", step, steps)
        if step == steps:
            break
        while len(order) < settings.batch:
            order += [train[i] for i in torch.randperm(len(train), generator=generator).tolist()]
        picked, order = order[: settings.batch], order[settings.batch :]
        slopes = slope(picked)
        fade = 1 - step / steps
        travel, gain = settings.travel * fade, settings.gain * fade

        def move(i: int, slopes: dict[str, Tensor] = slopes, travel: float = travel, gain: float = gain, n: int = step) -> None:
            latents[names[i]].step(slopes[names[i]], travel, gain, n + 1)

        each(move, range(len(names)))
    return {name: latent.tensor(best[name]) for name, latent in latents.items()}, history
