"""A packed weight whose codes have moved to the kernel layout: once in memory, and the same weight to whoever asks."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

import nybble
from nybble import kernels
from nybble.errors import UsageError
from nybble.evaluate.variants import ALL, parse_variant
from nybble.formats import QTensor, parse_format
from nybble.mixes import find_mix
from nybble.models.mapped import give_back
from nybble.models.packed import PackedLinear, PackedWeight, put_packed, set_activations

GGML = ("q4_0", "q4_1", "q5_1", "q2_k", "q3_k", "q4_k", "q6_k", "iq4_nl", "iq4_xs", "mxfp4")
SPECS = list(dict.fromkeys((*(parse_variant(spec).format for spec in ALL if find_mix(spec) is None), *GGML)))
CODED = [spec for spec in SPECS if not parse_format(spec).is_cast]
SHAPES = ((24, 64), (7, 172), (33, 40))


def fitting(spec: str, shape: tuple[int, int]) -> tuple[int, int]:
    """The shape, or the next one whose rows the format can hold."""
    whole = parse_format(spec).whole
    return shape[0], -(-shape[1] // whole) * whole


def make(spec: str, shape: tuple[int, int] = (24, 172), seed: int = 0) -> tuple[QTensor, PackedWeight]:
    weight = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    fmt = parse_format(spec)
    params = fmt.fit(weight)
    tensor = QTensor(fmt, fmt.encode(weight, params), params)
    return tensor, PackedWeight.from_qtensor(tensor)


def random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def equal_states(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_products_of_any_number_of_rows(spec: str, shape: tuple[int, int]) -> None:
    shape = fitting(spec, shape)
    tensor, packed = make(spec, shape)
    decoded = torch.from_numpy(tensor.decode()).double()
    for rows in (1, 5, 16, 17, 70):
        x = random(rows, shape[1], seed=rows)
        magnitude = functional.linear(x.double().abs(), decoded.abs())  # what the sum was made of
        error = (packed.linear(x, None).double() - functional.linear(x.double(), decoded)).abs()
        assert (error <= 1e-6 * magnitude).all()
    assert packed.is_laid != packed.format.is_cast
    assert packed.linear(random(shape[1]), None).shape == (shape[0],)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spec", CODED)
def test_everything_that_is_asked_for_stays_the_same_to_the_bit(spec: str, shape: tuple[int, int]) -> None:
    shape = fitting(spec, shape)
    tensor, packed = make(spec, shape)
    ids = torch.tensor([[4, 0], [6, 4]])
    rows, decoded = packed.embedding(ids), packed.decode()
    assert not packed.is_laid  # looking rows up and decoding leave the stored form
    before = copy.deepcopy(packed.state_dict())
    aliased = packed.state_dict()
    packed.linear(random(3, shape[1]), None)
    assert packed.is_laid
    assert equal_states(before, aliased)  # what was handed out earlier is not pulled away
    assert equal_states(before, packed.state_dict())
    torch.testing.assert_close(packed.embedding(ids), rows, rtol=0, atol=0)
    torch.testing.assert_close(packed.decode(), decoded, rtol=0, atol=0)
    again = packed.to_qtensor()
    np.testing.assert_array_equal(again.codes, tensor.codes)
    for name, values in tensor.params.items():
        np.testing.assert_array_equal(again.params[name], values)
    assert packed.is_laid  # none of these ended the kernel layout
    np.testing.assert_array_equal(packed.codes.numpy(), before["codes"].numpy())  # reading the buffer does
    assert not packed.is_laid
    assert equal_states(before, packed.state_dict())


@pytest.mark.parametrize("spec", ["int4:g32", "int8:channel,asym", "nf4:g64,dq", "int3:g64"])
@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m.to("cpu")], ids=["deepcopy", "pickle", "to"]
)
def test_copies_and_moves(spec: str, clone: Callable[[Any], Any]) -> None:
    tensor, packed = make(spec)
    x = random(4, 172)
    expected = packed.linear(x, None)
    twin = clone(packed)
    assert not twin.is_laid
    torch.testing.assert_close(twin.linear(x, None), expected, rtol=0, atol=0)
    torch.testing.assert_close(packed.linear(x, None), expected, rtol=0, atol=0)
    np.testing.assert_array_equal(twin.to_qtensor().codes, tensor.codes)
    assert (twin is packed) == (twin.number == packed.number)


def test_the_bytes_are_there_once() -> None:
    for spec, steps in (("int4:g32", 64), ("int8:channel", 0)):  # bytes of the steps of whole scales, one a row
        tensor, packed = make(spec, (64, 256))
        codes = packed.codes
        assert isinstance(codes, torch.Tensor)
        packed.linear(random(1, 256), None)
        real = [value for value in packed.buffers() if not value.is_meta]
        assert not real  # all of it is in the kernel layout
        assert packed._laid is not None
        stored = sum(array.nbytes for array in tensor.stored().values())
        assert packed._laid.nbytes == stored + steps
        assert sum(b.numel() * b.element_size() for b in packed.buffers()) == stored  # they count as what they stand for
        with pytest.raises((NotImplementedError, RuntimeError, TypeError)):
            next(packed.buffers()).numpy()


@pytest.mark.skipif(not kernels.native_available(), reason="the reference keeps the stored arrays")
def test_the_stored_memory_is_given_up() -> None:
    import weakref

    _, packed = make("int4:g32", (64, 256))
    gone = [weakref.ref(value) for value in packed.buffers()]
    packed.linear(random(1, 256), None)
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def test_what_is_restored_under_inference_mode_can_be_written_to() -> None:
    _, packed = make("int4:g32")
    _, other = make("int4:g32", seed=5)
    with torch.inference_mode():
        packed.linear(random(1, 172), None)
        packed.restore()
    packed.load_state_dict(other.state_dict())
    assert equal_states(packed.state_dict(), other.state_dict())


def test_types_of_activations_do_not_change_what_is_stored() -> None:
    _, packed = make("int4:g32,asym")
    before = copy.deepcopy(packed.state_dict())
    packed.linear(random(1, 172), None)
    packed.to(torch.bfloat16)
    assert equal_states(before, packed.half().state_dict())
    assert packed.to("meta").device.type == "meta"


def test_writing_to_a_buffer_takes_effect() -> None:
    _, packed = make("int8:channel")
    x = random(2, 172)
    packed.linear(x, None)
    packed.scale.zero_()  # type: ignore[operator]  # mypy sees Tensor | Module
    assert not packed.linear(x, None).any()
    _, other = make("int8:channel", seed=5)
    packed.scale = other.scale
    packed.codes = other.codes
    torch.testing.assert_close(packed.linear(x, None), other.linear(x, None), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spec", ["int4:g32", "int8:channel,asym", "nf4:g64,dq"])
def test_gradients_of_the_activations(spec: str, dtype: torch.dtype) -> None:
    tensor, packed = make(spec)
    decoded = torch.from_numpy(tensor.decode()).to(dtype)
    x = random(2, 3, 172).to(dtype).requires_grad_()
    target = random(2, 3, 24, seed=2).to(dtype)
    (packed.linear(x, torch.zeros(24, dtype=dtype)) * target).sum().backward()
    torch.testing.assert_close(x.grad, target @ decoded, rtol=1e-5, atol=1e-4)


def test_gradients_of_gradients() -> None:
    _, packed = make("int4:g32", (6, 40))
    x = random(2, 40).double().requires_grad_()  # in float64 torch multiplies, so that differences can be taken
    assert torch.autograd.gradcheck(lambda v: packed.linear(v, None), x, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda v: packed.linear(v, None).square(), x, fast_mode=True)


def test_activations_in_int8_are_a_setting(tiny: Callable[..., Any], ids: torch.Tensor, logits: Callable[..., Any]) -> None:
    model = nybble.quantize(tiny("gpt2"), "int4:g32").model()
    exact = logits(model, ids)
    set_activations(model, "int8")
    fast = logits(model, ids)
    assert 1e-4 < (fast - exact).norm() / exact.norm() < 0.05
    torch.testing.assert_close(logits(copy.deepcopy(model), ids), fast, rtol=0, atol=0)
    set_activations(model, "float")
    torch.testing.assert_close(logits(model, ids), exact, rtol=0, atol=0)
    with pytest.raises(UsageError, match="'int7'"):
        set_activations(model, "int7")
    with pytest.raises(UsageError, match="Linear has no packed weights"):
        set_activations(nn.Linear(2, 2), "int8")


def test_int8_activations_equal_the_kernels_own() -> None:
    _, packed = make("int4:g32")
    packed.exact = False
    x = random(3, 172)
    got = packed.linear(x, None)
    assert packed._laid is not None
    np.testing.assert_array_equal(got.numpy(), kernels.product(x.numpy(), packed._laid, exact=False))


@pytest.mark.parametrize("name", ["gpt2", "llama-tied"])
@pytest.mark.parametrize("spec", ["int4:g32,asym", "nf4:g64,dq"])
def test_a_model_saves_after_use_what_it_would_have_saved_before(
    name: str, spec: str, tiny: Callable[..., Any], ids: torch.Tensor, logits: Callable[..., torch.Tensor], tmp_path: Path
) -> None:
    quantized = nybble.quantize(tiny(name), spec)
    before = quantized.save(tmp_path / "before")
    size, state = quantized.weight_bytes, copy.deepcopy(quantized.model().state_dict())
    expected = logits(quantized.model(), ids)
    assert any(module.is_laid for module in quantized.model().modules() if isinstance(module, PackedWeight))
    assert quantized.weight_bytes == size
    assert equal_states(state, quantized.model().state_dict())
    after = quantized.save(tmp_path / "after")
    assert (before / "model.safetensors").read_bytes() == (after / "model.safetensors").read_bytes()
    used = AutoModelForCausalLM.from_pretrained(after)
    torch.testing.assert_close(logits(used, ids), expected, rtol=0, atol=0)
    used.save_pretrained(tmp_path / "again")
    again = nybble.load(tmp_path / "again")
    torch.testing.assert_close(logits(again.model(), ids), expected, rtol=0, atol=0)
    for key, tensor in again.tensors.items():
        np.testing.assert_array_equal(tensor.codes, quantized.tensors[key].codes)


def test_a_tied_head_shares_one_kernel_layout(tiny: Callable[..., Any], ids: torch.Tensor, logits: Callable[..., Any]) -> None:
    model = nybble.quantize(tiny("gpt2"), "int4:g32").model()
    first = logits(model, ids)  # rows are looked up as stored, then the head lays the weight out
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.lm_head.weight.is_laid
    torch.testing.assert_close(logits(model, ids), first, rtol=0, atol=0)  # now both use the kernel layout


def test_threads_that_meet_at_the_first_product() -> None:
    x = random(2, 172)
    for seed in range(20):
        tensor, packed = make("int4:g32", seed=seed)
        expected = functional.linear(x, torch.from_numpy(tensor.decode()))
        results: list[torch.Tensor] = []
        ready = threading.Barrier(3)

        def work(
            packed: PackedWeight = packed, results: list[torch.Tensor] = results, ready: threading.Barrier = ready, i: int = seed
        ) -> None:
            ready.wait()
            results.append(packed.linear(x, None))
            if i % 2:
                packed.restore()
            results.append(packed.linear(x, None))

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(results) == 6
        for result in results:
            torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-4)


def test_activations_of_another_width_are_an_error() -> None:
    _, packed = make("int4:g32")
    with pytest.raises(ValueError, match=r"activations have 86 columns, the weight is \(24, 172\)"):
        packed.linear(random(2, 86), None)


def test_a_packed_layer_holds_no_float_copy() -> None:
    _, packed = make("int4:g32", (16, 64))
    layer = nn.Linear(64, 16)
    put_packed(layer, packed, owner=True, compute_dtype=torch.float32)
    assert isinstance(layer, PackedLinear)
    layer(random(2, 64))
    assert [name for name, value in layer.named_parameters()] == ["bias"]
    assert set(layer.state_dict()) == {"bias", "weight.codes", "weight.scale"}


def test_only_unchanged_pages_of_files_are_given_back(tmp_path: Path) -> None:
    values = np.arange(64 * 4096 // 4, dtype=np.int32)
    assert give_back(values) == 0  # memory that nothing else holds
    np.testing.assert_array_equal(values, np.arange(values.size))
    values.tofile(tmp_path / "values")
    mapped = np.memmap(tmp_path / "values", dtype=np.int32, mode="c")  # private, as transformers maps weights
    assert int(mapped.sum()) == int(values.sum())
    given = give_back(mapped)
    assert given in (0, mapped.nbytes)  # systems without /proc/self/pagemap give nothing back
    np.testing.assert_array_equal(mapped, values)
    mapped[5000] = 7
    assert give_back(mapped) == 0
    assert mapped[5000] == 7
