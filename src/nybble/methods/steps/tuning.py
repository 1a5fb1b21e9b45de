"""Tuning: codes, scales and float parameters move down the slope of a loss of the whole model, or of one block.

What counts is the loss on windows that are held back: the best state seen is kept, the start among them. latent.py says how
a step moves what.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

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


@dataclass(frozen=True)
class Standing:
    """How far tuning is: before the step after `step` of them."""

    step: int
    history: list[tuple[int, float]]
    tensors: Mapping[str, Tensor]
    """All that steps change, and the best state seen."""


class Keeper(Protocol):
    """Where the standing of a tuning is kept, so that one that was stopped goes on."""

    def find(self) -> Standing | None:
        """The last one kept."""
        ...

    def due(self) -> bool:
        """Whether it is time to keep one again."""
        ...

    def keep(self, standing: Standing) -> None:
        """Keep one in place of the last. Raises OutputError."""
        ...


def tune(
    latents: Mapping[str, Latent | FloatLatent],
    pace: Pace,
    windows: int,
    slope: Slope,
    loss: Callable[[Sequence[int]], float],
    show: Callable[[str, Tensor], None],
    each: Callable[[Callable[[int], None], Sequence[int]], None],
    report: Callable[[float, int, int], None],
    keeper: Keeper | None = None,
) -> tuple[dict[str, QTensor | Tensor], list[tuple[int, float]]]:
    """Move the latents. `show(name, value)` puts a value where `slope` and `loss` see it; `loss` is the mean over some windows.
    Returns the best weights, and (step, loss on the windows held back) as it went; `report(loss so far, step, steps)`. With a
    keeper it goes on where it was, to the same weights."""
    names, steps = list(latents), pace.steps
    held = list(range(HELD_BACK - 1, windows, HELD_BACK)) or [windows - 1]
    batches = _batches([i for i in range(windows) if i not in held] or held, pace)
    best: dict[str, dict[str, Tensor]] = {name: latent.state() for name, latent in latents.items()}
    first, history = _taken_up(keeper, _tensors(latents, best)) if keeper else (0, [])
    known = bool(history)
    for step in range(steps + 1):
        picked = next(batches)
        if step < first:
            continue
        each(lambda i: show(names[i], latents[names[i]].value()), range(len(names)))
        if not (known and step == first) and (step % max(1, steps // CHECKS) == 0 or step == steps):
            history.append((step, loss(held)))
            if history[-1][1] <= min(value for _, value in history):
                best = {name: latent.state() for name, latent in latents.items()}
        if keeper and step > first and (step == steps or keeper.due()):
            keeper.keep(Standing(step, history, _tensors(latents, best)))
        report(history[-1][1], step, steps)
        if step == steps:
            break
        slopes = slope(picked)
        fade = 1 - step / steps
        travel, gain = pace.travel * fade, pace.gain * fade

        def move(i: int, slopes: dict[str, Tensor] = slopes, travel: float = travel, gain: float = gain, n: int = step) -> None:
            latents[names[i]].step(slopes[names[i]], travel, gain, n + 1)

        each(move, range(len(names)))
    return {name: latent.tensor(best[name]) for name, latent in latents.items()}, history


def _taken_up(keeper: Keeper, tensors: Mapping[str, Tensor]) -> tuple[int, list[tuple[int, float]]]:
    """Fill what changes from what was kept, if anything: (step, history)."""
    kept = keeper.find()
    if kept is None:
        return 0, []
    for name, value in tensors.items():
        value.copy_(kept.tensors[name])
    return kept.step, kept.history


def _batches(train: Sequence[int], pace: Pace) -> Iterator[list[int]]:
    """The windows of each step: all of them in a drawn order, again and again."""
    generator = torch.Generator().manual_seed(pace.seed)
    order = list[int]()
    while True:
        while len(order) < pace.batch:
            order += [train[i] for i in torch.randperm(len(train), generator=generator).tolist()]
        yield order[: pace.batch]
        order = order[pace.batch :]


def _tensors(latents: Mapping[str, Latent | FloatLatent], best: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """What a standing is, no copies."""
    now = {f"{name}:{part}": value for name, latent in latents.items() for part, value in latent.moving().items()}
    return now | {f"{name}:best.{part}": value for name, state in best.items() for part, value in state.items()}
