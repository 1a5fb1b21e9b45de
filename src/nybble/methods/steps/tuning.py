"""Tuning: codes, scales and float parameters move down the slope of a loss of the whole model, or of one block.

What counts is the loss on windows that are held back: the best state seen is kept, the start among them. latent.py says how
a step moves what.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nybble.formats import QTensor
from nybble.methods.steps.latent import FloatLatent, Latent

HELD_BACK = 16
"""Every so many-th window judges and is not trained on."""
CHECKS = 10
"""How often that loss is looked at, in all."""

Slope = Callable[[list[int]], dict[str, Tensor]]
"""Gradient of the mean loss over some windows by each tensor, float32: [N, K], or [N] of a float parameter."""


@dataclass(frozen=True)
class Pace:
    """How many steps, how large, on how many windows each."""

    steps: int
    travel: float
    """About how far a position moves in the first step, in levels; later ones less and less, to none."""
    gain: float
    """The same for the outermost levels when their scale changes."""
    batch: int
    seed: int
    """Of the order of windows."""


def tune(
    latents: Mapping[str, Latent | FloatLatent],
    pace: Pace,
    windows: int,
    slope: Slope,
    loss: Callable[[Sequence[int]], float],
    show: Callable[[str, Tensor], None],
    each: Callable[[Callable[[int], None], Sequence[int]], None],
    report: Callable[[float, int, int], None],
) -> tuple[dict[str, QTensor | Tensor], list[tuple[int, float]]]:
    """Move the latents. `show(name, value)` puts a value where `slope` and `loss` see it; `loss` is the mean over some windows.
    Returns the best weights, and (step, loss on the windows held back) as it went; `report(loss so far, step, steps)`."""
    names, steps = list(latents), pace.steps
    held = list(range(HELD_BACK - 1, windows, HELD_BACK)) or [windows - 1]
    train = [i for i in range(windows) if i not in held] or held
    generator = torch.Generator().manual_seed(pace.seed)
    order = list[int]()
    history: list[tuple[int, float]] = []
    best: dict[str, Any] = {}
    for step in range(steps + 1):
        each(lambda i: show(names[i], latents[names[i]].value()), range(len(names)))
        if step % max(1, steps // CHECKS) == 0 or step == steps:
            history.append((step, loss(held)))
            if history[-1][1] <= min(value for _, value in history):
                best = {name: latent.state() for name, latent in latents.items()}
        report(history[-1][1], step, steps)
        if step == steps:
            break
        while len(order) < pace.batch:
            order += [train[i] for i in torch.randperm(len(train), generator=generator).tolist()]
        picked, order = order[: pace.batch], order[pace.batch :]
        slopes = slope(picked)
        fade = 1 - step / steps
        travel, gain = pace.travel * fade, pace.gain * fade

        def move(i: int, slopes: dict[str, Tensor] = slopes, travel: float = travel, gain: float = gain, n: int = step) -> None:
            latents[names[i]].step(slopes[names[i]], travel, gain, n + 1)

        each(move, range(len(names)))
    return {name: latent.tensor(best[name]) for name, latent in latents.items()}, history
