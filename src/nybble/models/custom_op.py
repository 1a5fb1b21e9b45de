"""What packed weights compute, as operators that torch knows: torch.compile, torch.export and fake tensors see one node.

    nybble::linear(Tensor x, int weight, int rows, bool exact)            x [..., K] -> [..., rows], in the type of x
    nybble::linear_input_gradient(Tensor gradient, int weight, int columns)   [..., N] -> [..., columns]
    nybble::embedding(Tensor ids, int weight, int columns)                ids [...] -> float32 [..., columns]

`weight` is a number under which a living weight is registered here, so a graph holds no pointer and keeps no weight alive;
it means nothing in another process. The shape that no fake tensor can ask of the weight stands beside it.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor

from nybble.errors import UsageError


class Computes(Protocol):
    """What the operators ask of a weight [N, K]."""

    def product(self, x: Tensor, exact: bool) -> Tensor:
        """x [..., K] times the transposed weight: [..., N]."""
        ...

    def input_gradient(self, gradient: Tensor) -> Tensor:
        """gradient [..., N] times the weight: [..., K]."""
        ...

    def look_up(self, ids: Tensor) -> Tensor:
        """Rows of the weight, float32 [..., K]."""
        ...


_weights: weakref.WeakValueDictionary[int, Computes] = weakref.WeakValueDictionary()
_numbers = itertools.count(1)


def register(weight: Computes) -> int:
    """The number by which the operators find this weight while it lives."""
    number = next(_numbers)
    _weights[number] = weight
    return number


def _weight(number: int) -> Computes:
    found = _weights.get(number)
    if found is None:
        raise UsageError(f"packed weight {number} is gone; a compiled or exported graph works only while its model is in memory")
    return found


torch.library.define("nybble::linear", "(Tensor x, int weight, int rows, bool exact) -> Tensor")
torch.library.define("nybble::linear_input_gradient", "(Tensor gradient, int weight, int columns) -> Tensor")
torch.library.define("nybble::embedding", "(Tensor ids, int weight, int columns) -> Tensor")


@torch.library.impl("nybble::linear", "default")
def _linear(x: Tensor, weight: int, rows: int, exact: bool) -> Tensor:
    return _weight(weight).product(x, exact)


@torch.library.impl("nybble::linear_input_gradient", "default")
def _linear_input_gradient(gradient: Tensor, weight: int, columns: int) -> Tensor:
    return _weight(weight).input_gradient(gradient)


@torch.library.impl("nybble::embedding", "default")
def _embedding(ids: Tensor, weight: int, columns: int) -> Tensor:
    return _weight(weight).look_up(ids)


@torch.library.register_fake("nybble::linear")
def _linear_shape(x: Tensor, weight: int, rows: int, exact: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


@torch.library.register_fake("nybble::linear_input_gradient")
def _linear_input_gradient_shape(gradient: Tensor, weight: int, columns: int) -> Tensor:
    return gradient.new_empty((*gradient.shape[:-1], columns))


@torch.library.register_fake("nybble::embedding")
def _embedding_shape(ids: Tensor, weight: int, columns: int) -> Tensor:
    return ids.new_empty((*ids.shape, columns), dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[Tensor, int, int, bool], output: Tensor) -> None:
    ctx.weight, ctx.columns = inputs[1], inputs[0].shape[-1]


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
    return torch.ops.nybble.linear_input_gradient(gradient, ctx.weight, ctx.columns), None, None, None


def _keep_again(ctx: Any, inputs: tuple[Tensor, int, int], output: Tensor) -> None:
    ctx.weight, ctx.rows = inputs[1], inputs[0].shape[-1]


def _backward_again(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    return linear(gradient, ctx.weight, ctx.rows, True), None, None


torch.library.register_autograd("nybble::linear", _backward, setup_context=_keep)
torch.library.register_autograd("nybble::linear_input_gradient", _backward_again, setup_context=_keep_again)

# Looked up once: `torch.ops.nybble.linear` costs a microsecond, and is asked for at every layer of every token.
linear = torch.ops.nybble.linear.default
embedding = torch.ops.nybble.embedding.default
