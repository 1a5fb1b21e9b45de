"""What each weight costs alone: by hand, and on a model whose weights are all the same but one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import nybble
from nybble.calibrate.windows import token_windows
from nybble.errors import UsageError
from nybble.evaluate.alone import kl_alone

WINDOWS = token_windows(np.random.default_rng(0).integers(3, 97, 3 * 24), 24)


def test_one_weight_at_a_time(tiny: Callable[..., Any]) -> None:
    model = tiny("gpt2")
    tensors = nybble.quantize(model, "int3:g32", keep=["wpe"]).tensors
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = {each.name: each for each in kl_alone(model, tensors, WINDOWS)}
    assert list(found) == list(tensors)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    name = "transformer.h.1.mlp.c_fc.weight"
    ids = torch.from_numpy(WINDOWS.ids)
    with torch.no_grad():
        p = model(ids).logits.log_softmax(-1)
        model.transformer.h[1].mlp.c_fc.weight.copy_(torch.from_numpy(tensors[name].decode()).T)
        q = model(ids).logits.log_softmax(-1)
    expected = float((p.exp() * (p - q)).sum(-1)[:, :-1].double().mean())
    assert found[name].kl == pytest.approx(expected, rel=1e-3)
    assert all(each.kl > 0 for each in found.values())
    assert found[name].kl_se is not None


def test_a_weight_that_the_reference_lacks_is_named(tiny: Callable[..., Any]) -> None:
    tensors = nybble.quantize(tiny("llama"), "int4:g32").tensors
    with pytest.raises(UsageError, match="is not a weight of this GPT2LMHeadModel; is the reference its float model"):
        kl_alone(tiny("gpt2"), tensors, WINDOWS)
