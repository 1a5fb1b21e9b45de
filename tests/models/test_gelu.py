"""GELUs swapped for torch's own, and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.activations import ACT2FN

from nybble.models.gelu import SAME_AS_TANH, quick_activations


@pytest.mark.parametrize("name", ["gelu_new", "gelu_fast"])
def test_the_same_function(name: str) -> None:
    x = torch.linspace(-8, 8, 4001)
    assert isinstance(ACT2FN[name], SAME_AS_TANH)
    torch.testing.assert_close(ACT2FN[name](x), torch.nn.functional.gelu(x, approximate="tanh"), rtol=1e-5, atol=2e-6)


def test_swapped_and_back(tiny: Callable[..., Any], ids: Any) -> None:
    model = tiny("gpt2")
    own = [block.mlp.act for block in model.transformer.h]
    assert all(isinstance(act, SAME_AS_TANH) for act in own)
    with torch.no_grad():
        before = model(ids).logits
        with quick_activations(model):
            assert not any(isinstance(module, SAME_AS_TANH) for module in model.modules())
            torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-5)
    assert [block.mlp.act for block in model.transformer.h] == own
