"""Models whose weights stay in their file: what is out has its values, what is put back forgets, what is redone comes again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nybble.errors import NumericError
from nybble.models.checkpoint import open_checkpoint
from nybble.models.loading import load_model
from nybble.models.shelf import FileShelf, shelved_model


@pytest.fixture
def shelved(tiny: Callable[..., Any], tmp_path: Path) -> tuple[Any, FileShelf, Any]:
    tiny("llama").to(torch.bfloat16).save_pretrained(tmp_path / "model")
    found = shelved_model(open_checkpoint(tmp_path / "model"))
    assert found is not None
    return *found, load_model(tmp_path / "model")


def test_what_is_out_has_its_values_and_then_no_memory(shelved: Any) -> None:
    model, shelf, float_model = shelved
    block = model.model.layers[0]
    with shelf.out(block):
        for name, value in block.named_parameters():
            assert torch.equal(value, float_model.model.layers[0].get_parameter(name)), name
        assert not torch.any(model.model.layers[1].mlp.up_proj.weight)
    assert block.mlp.up_proj.weight.untyped_storage().nbytes() == 4
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in float_model.named_parameters()]
    for name, tensor in model.named_buffers():
        assert torch.equal(tensor, float_model.get_buffer(name)), name


def test_all_out_computes_what_the_loaded_model_does(shelved: Any, ids: Any) -> None:
    model, shelf, float_model = shelved
    with shelf.out(model), torch.no_grad():
        assert torch.equal(model(ids).logits, float_model(ids).logits)


def test_out_nests_and_what_was_changed_is_forgotten(shelved: Any) -> None:
    model, shelf, _ = shelved
    block, norm = model.model.layers[0], model.model.layers[0].input_layernorm.weight
    before = {name: value.clone() for name, value in block.named_parameters() if value.dim() == 1}
    with shelf.out(block):
        with shelf.out(block.mlp):
            block.mlp.up_proj.weight.fill_(7)
            norm.fill_(7)
        assert bool((block.mlp.up_proj.weight == 7).all()), "it is still out"
    with shelf.out(block):
        assert not bool((block.mlp.up_proj.weight == 7).any())
        assert torch.equal(norm, before["input_layernorm.weight"])


def test_what_is_redone_comes_again_once(shelved: Any) -> None:
    model, shelf, _ = shelved
    block = model.model.layers[0]
    times = []
    shelf.redo(block, lambda: times.append(block.mlp.up_proj.weight.mul_(2).clone()))
    for _ in range(2):
        with shelf.out(block), shelf.out(block, block.mlp):
            pass
    with shelf.out(model.model.layers[1]):
        pass
    assert len(times) == 2
    assert torch.equal(*times)


def test_tied_weights_are_one(tiny: Callable[..., Any], tmp_path: Path) -> None:
    tiny("llama-tied").save_pretrained(tmp_path / "model")
    found = shelved_model(open_checkpoint(tmp_path / "model"))
    assert found is not None
    model, shelf = found
    with shelf.out(model.lm_head):
        assert bool(torch.any(model.model.embed_tokens.weight))
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_values_that_are_not_finite_are_named_when_they_are_taken(tiny: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny("gpt2")
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[1, 2] = float("inf")
    model.save_pretrained(tmp_path / "model")
    found = shelved_model(open_checkpoint(tmp_path / "model"))
    assert found is not None
    with found[1].out(found[0].transformer.h[0]):
        pass
    with (
        pytest.raises(NumericError, match=r"transformer\.h\.1\.mlp\.c_fc\.weight: 1 of .* inf"),
        found[1].out(found[0].transformer.h[1]),
    ):
        pass
