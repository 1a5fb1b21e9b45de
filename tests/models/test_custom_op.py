"""The operators that torch sees: shapes for fake tensors, gradients, compiled and exported graphs."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import nybble
from nybble.errors import UsageError
from nybble.formats import QTensor, parse_format
from nybble.models import custom_op
from nybble.models.packed import PackedWeight, put_packed


def make(spec: str = "int4:g32", shape: tuple[int, int] = (24, 64)) -> PackedWeight:
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    fmt = parse_format(spec)
    params = fmt.fit(weight)
    return PackedWeight.from_qtensor(QTensor(fmt, fmt.encode(weight, params), params))


def layer() -> nn.Linear:
    linear = nn.Linear(64, 24)
    put_packed(linear, make(), owner=True, compute_dtype=torch.float32)
    return linear


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("needs_gradient", [False, True])
def test_the_operators_keep_torchs_rules(dtype: torch.dtype, needs_gradient: bool) -> None:
    weight = make()
    x = random(2, 3, 64).to(dtype).requires_grad_(needs_gradient)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.nybble.linear.default, (x, weight.number, 24, True), test_utils=tests)
    gradient = random(2, 3, 24).to(dtype).requires_grad_(needs_gradient)
    torch.library.opcheck(torch.ops.nybble.linear_input_gradient.default, (gradient, weight.number, 64), test_utils=tests)
    torch.library.opcheck(torch.ops.nybble.embedding.default, (torch.tensor([[1, 5]]), weight.number, 64), test_utils=tests)


def test_a_graph_keeps_no_weight_alive() -> None:
    weight = make()
    number = weight.number
    assert custom_op.linear(random(1, 64), number, 24, True).shape == (1, 24)
    del weight
    gc.collect()
    with pytest.raises(UsageError, match=f"packed weight {number} is gone"):
        custom_op.linear(random(1, 64), number, 24, True)


def test_compiled_graphs_have_no_break() -> None:
    linear = layer()
    x = random(3, 64)
    expected = linear(x)
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected, rtol=0, atol=0)
    torch.testing.assert_close(compiled(random(7, 64)), linear(random(7, 64)), rtol=0, atol=0)
    with_gradient = x.clone().requires_grad_()
    compiled(with_gradient).sum().backward()
    expected_gradient = linear.weight.decode().sum(0).expand(3, 64)  # type: ignore[operator]
    torch.testing.assert_close(with_gradient.grad, expected_gradient)


def test_exported_graphs_hold_the_operator() -> None:
    linear = layer()
    x = random(3, 64)
    expected = linear(x)
    program = torch.export.export(linear, (x,))
    assert any(node.target is torch.ops.nybble.linear.default for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), expected, rtol=0, atol=0)


def test_a_whole_model_compiles(tiny: Callable[..., Any], ids: torch.Tensor, logits: Callable[..., torch.Tensor]) -> None:
    model = nybble.quantize(tiny("llama-tied"), "int4:g32").model()
    expected = logits(model, ids)
    model.config.use_cache = False
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager")
    torch.testing.assert_close(logits(compiled, ids), expected, rtol=1e-5, atol=1e-5)
