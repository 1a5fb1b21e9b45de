"""What the float model predicts on the calibration windows, and how a changed model's loss against it slopes.

The loss is KL(float || changed), in nats per token. The float model's side is kept as the inputs of its head, float32
[windows, T, width], from which its logits come again by one product; a model without a head is held to its last hidden
states instead, by mean squared error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nybble.calibrate.workers import Workers


class Predictions:
    """The float model's predictions on windows. Make it before the model's weights are touched."""

    def __init__(self, model: nn.Module, windows: NDArray[np.integer[Any]], workers: Workers) -> None:
        self.model, self.windows, self.workers = model, windows, workers
        head = model.get_output_embeddings()
        self._head = None if head is None else (head.weight.detach().clone(), None if head.bias is None else head.bias.detach())
        self._cap = getattr(model.config, "final_logit_softcapping", None)
        self._hidden: list[Tensor] = []
        with torch.no_grad():
            for state in workers.map(self._state, range(len(windows))):
                self._hidden.append(state)

    def _ids(self, index: int) -> Tensor:
        return torch.from_numpy(self.windows[index : index + 1].astype(np.int64))

    def _state(self, index: int) -> Tensor:
        with torch.no_grad():
            return _base(self.model)(self._ids(index), use_cache=False).last_hidden_state[0].clone()

    def _logits(self, hidden: Tensor, head: Any) -> Tensor:
        logits = torch.nn.functional.linear(hidden, *head).float()
        return logits if self._cap is None else self._cap * torch.tanh(logits / self._cap)

    def loss(self, index: int) -> Tensor:
        """KL of one window, nats per token; differentiable in the model's present weights."""
        hidden = _base(self.model)(self._ids(index), use_cache=False).last_hidden_state[0]
        with torch.no_grad():
            p = self._logits(self._hidden[index].clone(), self._head).log_softmax(-1)
        present = self.model.get_output_embeddings()
        q = self._logits(hidden, (present.weight, present.bias)).log_softmax(-1)
        return torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True) / len(p)

    def slope(self, weights: Mapping[str, Tensor], indices: Sequence[int]) -> tuple[float, dict[str, Tensor]]:
        """(mean KL, gradient of it by each weight), over some windows. `weights` are the model's own leaf tensors."""
        names = list(weights)

        def one(index: int) -> tuple[float, tuple[Tensor, ...]]:
            with torch.enable_grad():
                loss = self.loss(index)
                return float(loss.detach()), torch.autograd.grad(loss, [weights[name] for name in names])

        total, sums = 0.0, None
        for loss, gradients in self.workers.map(one, indices):
            total += loss
            if sums is None:
                sums = [gradient.clone() for gradient in gradients]
            else:
                for s, gradient in zip(sums, gradients, strict=True):
                    s += gradient
        assert sums is not None
        return total / len(indices), {name: s / len(indices) for name, s in zip(names, sums, strict=True)}

    def mean_loss(self, indices: Sequence[int]) -> float:
        """Mean KL over some windows."""

        def one(index: int) -> float:
            with torch.no_grad():
                return float(self.loss(index))

        return sum(self.workers.map(one, indices)) / len(indices)


def _base(model: nn.Module) -> nn.Module:
    return model.base_model if model.get_output_embeddings() is not None else model


__all__ = ["Predictions"]
_ = Callable
