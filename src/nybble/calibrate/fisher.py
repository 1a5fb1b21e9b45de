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

from nybble.calibrate.workers import Workers

FLOOR = 0.1
"""Share of its weight that every token keeps."""
CLIP = 0.999
"""Weights above this quantile of a group's are cut to it."""


def token_weights(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    groups: Mapping[str, int],
    windows: NDArray[np.integer[Any]],
    draws: int,
    seed: int,
    workers: Workers,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, list[Tensor]]:
    """Name -> per group of rows float32 [windows * T], mean 1. `groups` says in how many parts a weight's rows fall."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    names = list(modules)

    def one(index: int) -> list[list[Tensor]]:
        outputs: dict[str, Tensor] = {}
        generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
        ids = torch.from_numpy(windows[index : index + 1].astype(np.int64))
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        with torch.enable_grad(), _keeping(modules, outputs):
            logits = model(inputs_embeds=embedded, use_cache=False).logits.float()
            p = logits.detach().softmax(-1)
            root = p.sqrt()
            sums: list[list[Tensor]] = []
            for draw in range(draws):
                noise = torch.randn(p.shape, generator=generator)
                v = root * noise - p * (root * noise).sum(-1, keepdim=True)
                gradients = torch.autograd.grad(
                    logits, [outputs[name] for name in names], grad_outputs=v, retain_graph=draw + 1 < draws
                )
                for i, (name, gradient) in enumerate(zip(names, gradients, strict=True)):
                    square = gradient.reshape(-1, gradient.shape[-1]).float().square()
                    parts = [part.mean(1) for part in square.chunk(groups[name], 1)]
                    if draw == 0:
                        sums.append(parts)
                    else:
                        for s, part in zip(sums[i], parts, strict=True):
                            s += part
        return sums

    found: list[list[list[Tensor]]] = []
    for i, result in enumerate(workers.map(one, range(len(windows)))):
        found.append(result)
        if progress:
            progress(i + 1, len(windows))
    return {
        name: [_tempered(torch.cat([window[i][g] for window in found])) for g in range(groups[name])]
        for i, name in enumerate(names)
    }


def _tempered(weights: Tensor) -> Tensor:
    """Mean 1, without the few that would drown the others, and none at zero."""
    limit = torch.quantile(weights[: 1 << 24], CLIP) if len(weights) <= 1 << 24 else weights.max()
    weights = weights.clamp(max=float(limit))
    weights = weights / weights.mean().clamp(min=1e-30)
    return FLOOR + (1 - FLOOR) * weights


class _keeping:
    """Keeps the outputs of layers on this thread: hooks would be shared by all threads, so calls are told apart by a key."""

    def __init__(self, modules: Mapping[str, nn.Module], into: dict[str, Tensor]) -> None:
        import threading

        thread = threading.get_ident()

        def hook(name: str) -> Any:
            def keep(_: nn.Module, args: Any, output: Tensor) -> None:
                if threading.get_ident() == thread:
                    into[name] = output

            return keep

        self._hooks = [module.register_forward_hook(hook(name)) for name, module in modules.items()]

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
