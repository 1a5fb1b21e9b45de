"""Tuning all layers together: codes and scales move down the slope of the KL against the float model's predictions.

Every code has a position, a real number that rounds to it; it begins where the float weight lies between the code's
neighbours, and moves by the sign of the gradient (SignRound, arXiv 2309.05516), which passes through the rounding unchanged
(straight-through). Scales move by Adam on their logarithm, through their storage precision. What counts is the loss on
windows that are held back: the best state seen is kept, the start among them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from nybble.formats import Format, QTensor
from nybble.formats.base import Params
from nybble.methods.steps.grid import columns_of, grid_of, params_of
from nybble.methods.steps.settings import Settings

HELD_BACK = 16
"""Every so many-th window judges and is not trained on."""
CHECKS = 10
"""How often that loss is looked at, in all."""
BESIDE = 0.45
"""A position begins at most so far from its code."""
MOMENTUM = 0.9
ADAM = (0.9, 0.99)

Slope = Callable[[list[int]], dict[str, Tensor]]
"""Gradient of the mean loss over some windows by each weight, float32 [N, K]."""


class Latent:
    """A weight while it is tuned: positions of its codes and gains of its scales, float32."""

    def __init__(self, fmt: Format, positions: Tensor, scale: Tensor, offset: Tensor | None) -> None:
        levels, codes = np.unique(fmt.levels, return_index=True)
        self.fmt = fmt
        self.levels, self.codes_of = torch.from_numpy(levels), torch.from_numpy(codes.astype(np.uint8))
        self.gaps = torch.from_numpy(np.gradient(levels).astype(np.float32))
        self.positions = positions
        """[N, K], in steps of the ascending levels."""
        self.scale, self.offset = scale, offset
        self.gain = torch.zeros_like(scale)
        """Logarithm of what the scale is multiplied by."""
        self._slopes = torch.zeros_like(positions)
        self._mean, self._square = torch.zeros_like(scale), torch.zeros_like(scale)

    @classmethod
    def of(cls, tensor: QTensor, weight: Tensor) -> Latent:
        """From codes already chosen, and the float weight [N, K]."""
        scale, offset = grid_of(tensor.format, tensor.params)
        latent = cls(tensor.format, torch.empty(tensor.shape), scale.float(), None if offset is None else offset.float())
        order = torch.empty(1 << tensor.format.bits)
        order[latent.codes_of.long()] = torch.arange(len(latent.levels)).float()
        rank = order[torch.from_numpy(tensor.codes.astype(np.int64))]
        wide = latent._wide(latent.scale)
        ratio = weight / torch.where(wide == 0, 1.0, wide)
        if latent.offset is not None:
            ratio += latent._wide(latent.offset)
        place = rank.long()
        latent.positions = rank + ((ratio - latent.levels[place]) / latent.gaps[place]).clamp_(-BESIDE, BESIDE)
        return latent

    def state(self) -> tuple[Tensor, Tensor]:
        """A copy of what moves."""
        return self.positions.clone(), self.gain.clone()

    def restore(self, state: tuple[Tensor, Tensor]) -> None:
        """Go back to a state."""
        self.positions, self.gain = state

    def tensor(self) -> QTensor:
        """What it stands for now."""
        return QTensor(self.fmt, self.codes_of[self._ranks()].numpy(), self._params())

    def value(self) -> Tensor:
        """float32 [N, K]: the same, decoded."""
        return self._levels().mul_(self._wide(self._stored_scale()))

    def step(self, slope: Tensor, rate: float, gain: float, count: int) -> None:
        """Move down a slope, float32 [N, K]. `count` is the number of this step, from 1."""
        wide = self._wide(self._stored_scale())
        if gain > 0:
            along = self._by_block(slope * self._levels() * wide)
            first, second = ADAM
            self._mean.mul_(first).add_(along, alpha=1 - first)
            self._square.mul_(second).addcmul_(along, along, value=1 - second)
            mean, square = self._mean / (1 - first**count), self._square / (1 - second**count)
            self.gain -= gain * mean / square.sqrt().clamp_(min=1e-30)
        self._slopes.mul_(MOMENTUM).add_(slope * wide * self.gaps[self._ranks()], alpha=1 - MOMENTUM)
        self.positions -= rate * self._slopes.sign()
        self.positions.clamp_(-0.49, len(self.levels) - 0.51)

    def _ranks(self) -> Tensor:
        return self.positions.round().long()

    def _levels(self) -> Tensor:
        levels = self.levels[self._ranks()]
        return levels if self.offset is None else levels - self._wide(self.offset)

    def _params(self) -> Params:
        offset = None if self.offset is None else self.offset.double()
        return params_of(self.fmt, (self.scale * self.gain.exp()).double(), offset)

    def _stored_scale(self) -> Tensor:
        return grid_of(self.fmt, self._params())[0].float()

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
    windows: int,
    slope: Slope,
    loss: Callable[[Sequence[int]], float],
    show: Callable[[str, Tensor], None],
    each: Callable[[Callable[[int], None], Sequence[int]], None],
    report: Callable[[str, int, int], None],
) -> list[tuple[int, float]]:
    """Move the latents `settings.tune` steps. `show(name, weight)` puts a weight where `slope` and `loss` see it; `loss` is
    the mean over some windows. Returns (step, loss on the windows held back) as it went; the latents hold the best."""
    names = list(latents)
    held = list(range(HELD_BACK - 1, windows, HELD_BACK)) or [windows - 1]
    train = [i for i in range(windows) if i not in held] or held
    generator = torch.Generator().manual_seed(settings.seed)
    steps, order = settings.tune, list[int]()
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
        rate, gain = 2 * settings.travel / steps * fade, settings.gain * fade

        def move(i: int, slopes: dict[str, Tensor] = slopes, rate: float = rate, gain: float = gain, step: int = step) -> None:
            latents[names[i]].step(slopes[names[i]], rate, gain, step + 1)

        each(move, range(len(names)))
    for name, latent in latents.items():
        latent.restore(best[name])
    return history
