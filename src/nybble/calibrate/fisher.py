"""How much every token's output of a layer counts for the model's predictions: weights from the true Fisher information.

KL(p || p') of a small change dz of the logits is 1/2 dz^T F dz with F = diag(p) - p p^T. A draw v with E[v v^T] = F is
sqrt(p) e - p (sqrt(p) . e), e ~ N(0, I); back-propagated to a linear layer's output it gives g_t, and the layer's share of
the KL is 1/2 E (g_t . E y_t)^2. Token t of a group of rows then counts as s_t = mean over rows and draws of g_ti^2
(GuidedQuant, arXiv 2505.07004, with labels' gradients; the model's own distribution instead: YAQA, arXiv 2505.22988).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nybble.calibrate.blocks import Blocks
from nybble.calibrate.watching import keep_outputs
from nybble.calibrate.workers import Workers
from nybble.models.shelf import Shelf

FLOOR = 0.1
"""Share of its weight that every token keeps."""
CLIP = 0.999
"""Weights above this quantile of a group's are cut to it."""
HELD_BYTES = 1 << 29
"""Of hidden states between all blocks, for as many windows as are worked on together; but at least one window a thread."""


def windows_at_once(blocks: int, tokens: int, width: int, threads: int) -> int:
    """How many windows are worked on together: all hidden states between their blocks are in memory."""
    return max(threads, HELD_BYTES // (4 * max(1, blocks * tokens * width)))


def token_weights(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    groups: Mapping[str, int],
    windows: NDArray[np.integer[Any]],
    draws: int,
    seed: int,
    workers: Workers,
    shelf: Shelf | None = None,
    scratch: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    find: Callable[[int], dict[str, Tensor] | None] = lambda window: None,
    keep: Callable[[int, dict[str, Tensor]], None] = lambda window, sums: None,
) -> dict[str, list[Tensor]]:
    """Name -> per group of rows float32 [windows * T], mean 1. `groups` says in how many parts a weight's rows fall.

    A layer that no window reaches after the first block has none. The parameters of the model must not require gradients. Some
    windows at a time go through all blocks and back again, one block's weights taken off the shelf at a time. What comes of a
    window is handed to `keep`, unless `find` has it from before. Raises BlocksError for a model that is no row of blocks.
    """
    found = {index: known for index in range(len(windows)) if (known := find(index)) is not None}
    missing = [index for index in range(len(windows)) if index not in found]
    if missing:
        back = _Backward(model, layers, groups, Blocks(model, windows, shelf, scratch), shelf or Shelf(), draws, seed, workers)
        tokens, width = back.blocks.hidden[0].shape[-2:]
        step = windows_at_once(len(back.blocks), tokens, width, workers.threads)
        for start in range(0, len(missing), step):
            for index, sums in back.run(missing[start : start + step]).items():
                found[index] = sums
                keep(index, sums)
            if progress:
                progress(len(found), len(windows))
    reached = [name for name in layers if _key(name, 0) in found[0]]
    return {
        name: [
            _tempered(torch.cat([found[index][_key(name, group)] for index in range(len(windows))]))
            for group in range(groups[name])
        ]
        for name in reached
    }


class _Backward:
    """Draws of the logits' slopes taken back through a model, block by block."""

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        groups: Mapping[str, int],
        blocks: Blocks,
        shelf: Shelf,
        draws: int,
        seed: int,
        workers: Workers,
    ) -> None:
        self.blocks = blocks
        self._model, self._groups, self._shelf, self._workers = model, groups, shelf, workers
        self._draws, self._seed = draws, seed
        self._inside = [
            {name: layer for name, layer in layers.items() if any(layer is part for part in block.modules())}
            for block in blocks.modules
        ]
        within = {name for inside in self._inside for name in inside}
        self._outside = {name: layer for name, layer in layers.items() if name not in within}

    def run(self, windows: Sequence[int]) -> dict[int, dict[str, Tensor]]:
        """Window -> sums of squared slopes of every layer's outputs, by `_key`."""
        sums: dict[int, dict[str, Tensor]] = {window: {} for window in windows}
        entered: list[dict[int, Tensor]] = [{window: self.blocks.hidden[window] for window in windows}]
        for index, block in enumerate(self.blocks.modules):
            with self._shelf.out(block):
                made = self._workers.map(lambda w, i=index: self.blocks.run(i, entered[i][w]), windows)  # type: ignore[misc]
                entered.append(dict(zip(windows, made, strict=True)))
        slopes = self._from_logits(entered.pop(), sums)
        for index in range(len(self.blocks) - 1, -1, -1):
            inputs, below = entered.pop(), slopes
            with self._shelf.out(self.blocks.modules[index]), keep_outputs(self._inside[index]) as take:

                def one(w: int, i: int = index, inputs: dict[int, Tensor] = inputs, below: Any = below, take: Any = take) -> Any:
                    leaf = inputs[w].detach().requires_grad_()
                    return self._take_back(sums[w], leaf, partial(self.blocks.trace, i, leaf), take, lambda _, d: below[w][d])

                slopes = dict(zip(windows, self._workers.map(one, windows), strict=True))
        return sums

    def _from_logits(self, states: dict[int, Tensor], sums: Mapping[int, dict[str, Tensor]]) -> dict[int, list[Tensor]]:
        """Slopes of draws by what the last block gives: window -> for each draw, of the shape of hidden states."""
        leaves = {window: state.detach().requires_grad_() for window, state in states.items()}
        head = getattr(self._model, "get_output_embeddings", lambda: None)()
        out = self._shelf.out(*([head] if head is not None else []))
        with self.blocks.skipped(leaves) as run, out, keep_outputs(self._outside) as take:

            def one(w: int) -> list[Tensor]:
                generator = torch.Generator().manual_seed(self._seed * 1_000_003 + w)
                known: list[tuple[Tensor, Tensor]] = []

                def draw(logits: Tensor, _: int) -> Tensor:
                    if not known:
                        p = logits.detach().softmax(-1)
                        known.append((p, p.sqrt()))
                    return fisher_draw(*known[0], generator)

                return self._take_back(sums[w], leaves[w], lambda: run(w).logits.float(), take, draw)

            return dict(zip(leaves, self._workers.map(one, list(leaves)), strict=True))

    def _take_back(
        self,
        sums: dict[str, Tensor],
        leaf: Tensor,
        compute: Callable[[], Tensor],
        take: Callable[[], dict[str, Tensor]],
        slope: Callable[[Tensor, int], Tensor],
    ) -> list[Tensor]:
        """Add to the sums of the layers that `compute` runs; returns the slope of each draw by `leaf`."""
        with torch.enable_grad():
            take()
            made = compute()
            outputs = {name: output for name, output in take().items() if output.requires_grad}
        below = []
        for draw in range(self._draws):
            more = draw + 1 < self._draws
            first, *rest = torch.autograd.grad(made, [leaf, *outputs.values()], slope(made, draw), retain_graph=more)
            below.append(first)
            for name, gradient in zip(outputs, rest, strict=True):
                square = gradient.reshape(-1, gradient.shape[-1]).float().square()
                for group, part in enumerate(square.chunk(self._groups[name], 1)):
                    key = _key(name, group)
                    sums[key] = sums[key] + part.mean(1) if key in sums else part.mean(1)
        return below


def _key(name: str, group: int) -> str:
    return f"{name}:{group}"


def fisher_draw(p: Tensor, root: Tensor, generator: torch.Generator) -> Tensor:
    """A draw v, of the shape of probabilities p [..., V], with E[v v^T] = diag(p) - p p^T; `root` is sqrt(p)."""
    noise = torch.randn(p.shape, generator=generator).mul_(root)  # in place: the largest arrays there are
    return noise.sub_(p * noise.sum(-1, keepdim=True))


def _tempered(weights: Tensor) -> Tensor:
    """Mean 1, without the few that would drown the others, and none at zero."""
    limit = weights.kthvalue(max(1, int(CLIP * len(weights)))).values
    weights = weights.clamp(max=float(limit))
    return FLOOR + (1 - FLOOR) * weights / weights.mean().clamp(min=1e-30)
