"""What the float model predicts on the calibration windows, and how a changed model's loss against it slopes.

The loss is KL(float || changed), in nats per token. The float model's side is kept as the inputs of its head, float32
[windows, T, width], from which its logits come again by one product; where more follows the head than that (soft caps,
scaled logits) a copy of the float model is asked instead.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nybble.calibrate.watching import catch_inputs, inputs_of, no_cache
from nybble.calibrate.workers import Workers
from nybble.errors import UsageError

SAME = 1e-4
"""Largest difference of logits that may come from computing them in another order."""


class Predictions:
    """The float model's predictions on windows. Make it before the model's weights are touched.

    Raises UsageError for a model that gives no logits.
    """

    def __init__(self, model: nn.Module, windows: NDArray[np.integer[Any]], workers: Workers) -> None:
        self._model, self._windows, self._workers = model, windows, workers
        head = model.get_output_embeddings()  # type: ignore[operator]
        self._float: Callable[[int], Tensor]
        with torch.no_grad():
            first = model(self._ids(0), **no_cache(model))
            if not hasattr(first, "logits"):
                raise UsageError(f"{type(model).__name__} predicts no tokens, so nothing can be tuned against; use tune=0")
            if head is not None:
                weight = head.weight.detach().clone()
                bias = None if head.bias is None else head.bias.detach().clone()
                with catch_inputs(head):
                    start = inputs_of(head, lambda: model(self._ids(0), **no_cache(model)))
                    by_head = None if start is None else torch.nn.functional.linear(start, weight, bias)
                    if by_head is not None and by_head.shape == first.logits[0].shape:
                        off = float((by_head - first.logits[0]).abs().max())
                        if off <= SAME * max(1.0, float(by_head.abs().max())):
                            kept = list(workers.map(self._head_inputs, range(len(windows))))
                            self._float = lambda index: torch.nn.functional.linear(kept[index], weight, bias)
                            return
        twin = copy.deepcopy(model)
        self._float = lambda index: twin(self._ids(index), **no_cache(self._model)).logits[0]

    def _ids(self, index: int) -> Tensor:
        return torch.from_numpy(self._windows[index : index + 1].astype(np.int64))

    def _head_inputs(self, index: int) -> Tensor:
        head = self._model.get_output_embeddings()  # type: ignore[operator]
        with torch.no_grad():
            found = inputs_of(head, lambda: self._model(self._ids(index), **no_cache(self._model)))
        assert found is not None
        return found.clone()

    def loss(self, index: int) -> Tensor:
        """KL of one window, nats per token; differentiable in the model's present weights."""
        with torch.no_grad():
            p = self._float(index).float().log_softmax(-1)
        q = self._model(self._ids(index), **no_cache(self._model)).logits[0].float().log_softmax(-1)
        return torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True) / len(p)

    def slope(self, weights: Mapping[str, Tensor], indices: Sequence[int]) -> dict[str, Tensor]:
        """Gradient of the mean KL over some windows by each weight. `weights` are the model's own leaf tensors; zeros for what
        the model does not use."""

        def one(index: int) -> tuple[Tensor, ...]:
            with torch.enable_grad():
                return torch.autograd.grad(self.loss(index), list(weights.values()), materialize_grads=True)

        return dict(zip(weights, self._workers.mean_tensors(one, indices), strict=True))

    def mean_loss(self, indices: Sequence[int]) -> float:
        """Mean KL over some windows."""

        def one(index: int) -> float:
            with torch.no_grad():
                return float(self.loss(index))

        return self._workers.mean(one, indices)
