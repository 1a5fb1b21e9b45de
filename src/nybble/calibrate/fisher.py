"""How much every token's output of a layer counts for the model's predictions: weights from the true Fisher information.

KL(p || p') of a small change dz of the logits is 1/2 dz^T F dz with F = diag(p) - p p^T. A draw v with E[v v^T] = F is
sqrt(p) e - p (sqrt(p) . e), e ~ N(0, I); back-propagated to a linear layer's output it gives g_t, and the layer's share of
the KL is 1/2 E (g_t . E y_t)^2. Token t of a group of rows then counts as s_t = mean over rows and draws of g_ti^2
(GuidedQuant, arXiv 2505.07004, with labels' gradients; the model's own distribution instead: YAQA, arXiv 2505.22988).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nybble.calibrate.watching import keep_outputs, no_cache
from nybble.calibrate.workers import Workers

FLOOR = 0.1
"""Share of its weight that every token keeps."""
CLIP = 0.999
"""Weights above this quantile of a group's are cut to it."""


def token_weights(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    groups: Mapping[str, int],
    windows: NDArray[np.integer[Any]],
    draws: int,
    seed: int,
    workers: Workers,
    progress: Callable[[int, int], None] | None = None,
    find: Callable[[int], dict[str, Tensor] | None] = lambda window: None,
    keep: Callable[[int, dict[str, Tensor]], None] = lambda window, sums: None,
) -> dict[str, list[Tensor]]:
    """Name -> per group of rows float32 [windows * T], mean 1. `groups` says in how many parts a weight's rows fall.

    A layer that no window reaches has none. The parameters of the model must not require gradients. What comes of a window is
    handed to `keep`, unless `find` has it from before.
    """
    found = {index: known for index in range(len(windows)) if (known := find(index)) is not None}
    missing = [index for index in range(len(windows)) if index not in found]
    with keep_outputs(layers) as take:

        def one(index: int) -> dict[str, Tensor]:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
            ids = torch.from_numpy(windows[index : index + 1].astype(np.int64))
            sums: dict[str, Tensor] = {}
            with torch.enable_grad():
                embedded = model.get_input_embeddings()(ids).detach().requires_grad_()  # type: ignore[operator]
                take()
                logits = model(inputs_embeds=embedded, **no_cache(model)).logits.float()
                outputs = {name: output for name, output in take().items() if output.requires_grad}
                p = logits.detach().softmax(-1)
                root = p.sqrt()
                for draw in range(draws):
                    v = fisher_draw(p, root, generator)
                    gradients = torch.autograd.grad(logits, list(outputs.values()), v, retain_graph=draw + 1 < draws)
                    for name, gradient in zip(outputs, gradients, strict=True):
                        square = gradient.reshape(-1, gradient.shape[-1]).float().square()
                        for group, part in enumerate(square.chunk(groups[name], 1)):
                            key = _key(name, group)
                            sums[key] = sums[key] + part.mean(1) if key in sums else part.mean(1)
            return sums

        for index, sums in zip(missing, workers.map(one, missing), strict=True):
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


def _key(name: str, group: int) -> str:
    return f"{name}:{group}"


def fisher_draw(p: Tensor, root: Tensor, generator: torch.Generator) -> Tensor:
    """A draw v, of the shape of probabilities p [..., V], with E[v v^T] = diag(p) - p p^T; `root` is sqrt(p)."""
    noise = root * torch.randn(p.shape, generator=generator)
    return noise - p * noise.sum(-1, keepdim=True)


def _tempered(weights: Tensor) -> Tensor:
    """Mean 1, without the few that would drown the others, and none at zero."""
    limit = weights.kthvalue(max(1, int(CLIP * len(weights)))).values
    weights = weights.clamp(max=float(limit))
    return FLOOR + (1 - FLOOR) * weights / weights.mean().clamp(min=1e-30)
