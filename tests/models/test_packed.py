"""Packed layers: the weight they stand for, on every path that reads it, and what a torch module has to endure."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import nybble
from nybble.errors import FileFormatError
from nybble.evaluate.variants import DEFAULT
from nybble.formats import QTensor, parse_format
from nybble.models.describe import describe
from nybble.models.packed import PackedEmbedding, PackedWeight, put_packed
from nybble.models.replace import replace_weights

SHAPES = ((24, 64), (7, 172), (33, 40))


def make(spec: str, shape: tuple[int, int], seed: int = 0) -> tuple[QTensor, PackedWeight]:
    weight = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    fmt = parse_format(spec)
    params = fmt.fit(weight)
    tensor = QTensor(fmt, fmt.encode(weight, params), params)
    return tensor, PackedWeight.from_qtensor(tensor)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spec", DEFAULT)
def test_linear_equals_the_product_with_the_decoded_weight(spec: str, shape: tuple[int, int]) -> None:
    tensor, packed = make(spec, shape)
    decoded = torch.from_numpy(tensor.decode().astype(np.float64))
    bias = torch.randn(shape[0], generator=torch.Generator().manual_seed(1))
    for tokens in range(1, 21):
        x = torch.randn(tokens, shape[1], generator=torch.Generator().manual_seed(tokens))
        expected = functional.linear(x.double(), decoded, bias.double())
        largest = functional.linear(x.double().abs(), decoded.abs(), bias.double().abs())  # what the sum was made of
        got = packed.linear(x, bias)
        assert got.shape == (tokens, shape[0])
        assert ((got.double() - expected).abs() <= 1e-6 * largest).all()
        torch.testing.assert_close(packed.linear(x, None), got - bias, rtol=1e-5, atol=1e-5)
    assert packed.linear(torch.zeros(2, 0, shape[1]), bias).shape == (2, 0, shape[0])
    assert packed.linear(torch.ones(2, 3, shape[1]), None).shape == (2, 3, shape[0])


@pytest.mark.parametrize("tokens", [2, 30])
def test_gradients_reach_the_activations(tokens: int) -> None:
    tensor, packed = make("int4:g32", (24, 64))
    x = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    packed.linear(x, None).sum().backward()
    expected = torch.from_numpy(tensor.decode()).sum(0).expand(tokens, 64)
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("tokens", [3, 40])
def test_other_types_of_activations(dtype: torch.dtype, tokens: int) -> None:
    tensor, packed = make("int4:g32,asym", (24, 64))
    x = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = packed.linear(x, None)
    assert y.dtype == dtype
    expected = functional.linear(x.double(), torch.from_numpy(tensor.decode()).double())
    assert (y.double() - expected).abs().max() < 24 * torch.finfo(dtype).eps * expected.abs().max() + 1e-6


@pytest.mark.parametrize("shape", [(9, 64), (5, 172)], ids=str)
@pytest.mark.parametrize("spec", DEFAULT)
def test_every_way_to_decode_agrees_to_the_bit(spec: str, shape: tuple[int, int]) -> None:
    tensor, packed = make(spec, shape)
    expected = torch.from_numpy(tensor.decode())
    rows = torch.tensor([[4, 0], [3, 3]])
    torch.testing.assert_close(packed.decode(), expected, rtol=0, atol=0)
    torch.testing.assert_close(packed.embedding(rows), expected[rows], rtol=0, atol=0)
    if not packed.format.is_cast:
        torch.testing.assert_close(packed._decode_on_device(torch.arange(shape[0])), expected, rtol=0, atol=0)
        torch.testing.assert_close(packed._decode_on_device(rows.reshape(-1)), expected[rows.reshape(-1)], rtol=0, atol=0)
    again = packed.to_qtensor()
    np.testing.assert_array_equal(again.codes, tensor.codes)
    assert again.params.keys() == tensor.params.keys()


@pytest.mark.parametrize("spec", ["int4:g64", "nf4:g64,dq", "int8:tensor,asym"])
@pytest.mark.parametrize("ids", [[5], [-1]])
def test_an_id_outside_the_table_is_an_error(spec: str, ids: list[int]) -> None:
    with pytest.raises(IndexError):
        make(spec, (5, 64))[1].embedding(torch.tensor(ids))


def test_no_ids_give_no_rows() -> None:
    assert make("nf4:g64,dq", (5, 64))[1].embedding(torch.zeros(1, 0, dtype=torch.int64)).shape == (1, 0, 64)


def test_holds_its_stored_arrays_and_nothing_else() -> None:
    tensor, packed = make("nf4:g64,dq", (24, 172))
    packed.linear(torch.ones(2, 172), None)
    packed.linear(torch.ones(50, 172), None)
    assert not list(packed.parameters())
    held = {name: value.numel() * value.element_size() for name, value in packed.state_dict().items()}
    assert held == {name: array.nbytes for name, array in tensor.stored().items()}
    assert sum(held.values()) * 8 == tensor.format.stored_bits(tensor.shape)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("used_before", [False, True])
def test_a_copy_is_independent(clone: Callable[[Any], Any], used_before: bool) -> None:
    _, packed = make("int8:channel", (24, 64))
    x = torch.ones(1, 64)
    before = packed.linear(x, None) if used_before else None
    twin = clone(packed)
    expected = twin.linear(x, None)
    packed.codes.zero_()  # type: ignore[operator]
    torch.testing.assert_close(twin.linear(x, None), expected, rtol=0, atol=0)
    assert not torch.equal(packed.linear(x, None), expected)
    if before is not None:
        torch.testing.assert_close(before, expected, rtol=0, atol=0)


def test_a_loaded_state_dict_takes_effect() -> None:
    first, a = make("int8:channel", (24, 64), seed=1)
    _, b = make("int8:channel", (24, 64), seed=2)
    x = torch.ones(1, 64)
    b.linear(x, None)  # whatever is kept between calls must not outlive the arrays
    b.load_state_dict(a.state_dict())
    torch.testing.assert_close(b.linear(x, None), a.linear(x, None), rtol=0, atol=0)
    b.load_state_dict({name: value.clone() for name, value in a.state_dict().items()}, assign=True)
    np.testing.assert_array_equal(b.to_qtensor().codes, first.codes)
    torch.testing.assert_close(b.linear(x, None), a.linear(x, None), rtol=0, atol=0)


def test_layers_of_every_kind() -> None:
    tensor, packed = make("int4:g32", (16, 64))
    weight = torch.from_numpy(tensor.decode())
    linear, conv, table = nn.Linear(64, 16), Conv1D(16, 64), nn.Embedding(16, 64)
    for layer in (linear, conv, table):
        put_packed(layer, packed, owner=True, compute_dtype=torch.float32)
        assert layer.weight is packed
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(linear(x), functional.linear(x, weight, linear.bias), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(conv(x), functional.linear(x, weight, conv.bias), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(table(torch.tensor([3, 1])), weight[[3, 1]], rtol=0, atol=0)
    assert table.num_embeddings == 16


class OwnForward(nn.Linear):
    """A layer that does not call its parent's forward, as Falcon's."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input @ self.weight.T + functional.linear(input, self.weight) + torch.matmul(input, self.weight.T)


def test_a_layer_that_reads_its_weight_itself() -> None:
    tensor, packed = make("int4:g32", (16, 64))
    layer = OwnForward(64, 16, bias=False)
    put_packed(layer, packed, owner=True, compute_dtype=torch.bfloat16)
    x = torch.ones(2, 64, dtype=torch.bfloat16)
    expected = 3 * functional.linear(x.float(), torch.from_numpy(tensor.decode()))
    torch.testing.assert_close(layer(x).float(), expected, rtol=0.03, atol=0.2)
    assert isinstance(layer, OwnForward)


def test_an_embedding_answers_in_the_type_of_computation() -> None:
    _, packed = make("int4:g32", (16, 64))
    table = nn.Embedding(16, 64)
    put_packed(table, packed, owner=True, compute_dtype=torch.bfloat16)
    assert isinstance(table, PackedEmbedding)
    assert table(torch.tensor([1])).dtype == torch.bfloat16


def test_replacing_refuses_what_does_not_fit(tiny: Callable[..., Any]) -> None:
    tensor, _ = make("int8:channel", (64, 32))
    with pytest.raises(FileFormatError, match=r"'nowhere.weight' is not a weight of this GPT2LMHeadModel"):
        replace_weights(tiny("gpt2"), {"nowhere.weight": tensor})
    with pytest.raises(FileFormatError, match=r"shape \(64, 32\), the model needs \(64, 64\)"):
        replace_weights(tiny("gpt2"), {"transformer.h.0.attn.c_proj.weight": tensor})


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", ["gpt2", "llama-tied", "gemma"])
def test_loads_with_activations_of_another_type(
    name: str, dtype: str, tiny: Callable[..., Any], ids: torch.Tensor, logits: Callable[..., torch.Tensor], tmp_path: Path
) -> None:
    quantized = nybble.quantize(tiny(name), "int8:channel")
    expected = logits(quantized.model(), ids)
    loaded = nybble.load(quantized.save(tmp_path / "m"), dtype)
    got = logits(loaded.model(), ids)
    assert got.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    error = (got.float() - expected).norm() / expected.norm()
    assert error < {"fp32": 1e-6, "bf16": 0.05, "fp16": 0.01}[dtype]


@pytest.mark.parametrize("name", ["gpt2", "llama-tied", "gemma3"])
def test_transformers_own_save_pretrained_loads_again(
    name: str, tiny: Callable[..., Any], ids: torch.Tensor, logits: Callable[..., torch.Tensor], tmp_path: Path
) -> None:
    quantized = nybble.quantize(tiny(name), "int4:g32,asym")
    first = AutoModelForCausalLM.from_pretrained(quantized.save(tmp_path / "a"))
    first.save_pretrained(tmp_path / "b")
    second, info = AutoModelForCausalLM.from_pretrained(tmp_path / "b", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(logits(second, ids), logits(quantized.model(), ids), rtol=0, atol=0)
    torch.testing.assert_close(logits(nybble.load(tmp_path / "b").model(), ids), logits(second, ids), rtol=0, atol=0)


def test_describe_says_why_a_tensor_stays_in_float(tiny: Callable[..., Any]) -> None:
    rows = {tensor.name: tensor for tensor in describe(tiny("gpt2"))}
    assert rows["transformer.wte.weight"].aliases == ("lm_head.weight",)
    assert rows["transformer.h.0.attn.c_attn.weight"].shape == (192, 64)
    assert rows["transformer.h.0.attn.c_attn.bias"].reason == "bias"
    assert rows["transformer.ln_f.weight"].reason == "norm gain or other vector"
    assert "lm_head.weight" not in rows
