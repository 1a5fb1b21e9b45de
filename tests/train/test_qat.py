"""Quantization-aware training: what is trained with is what is saved, scales are learned, rounding's loss is won back."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import nybble
from nybble.engine import Decoder
from nybble.errors import NumericError, UsageError
from nybble.formats import parse_format
from nybble.formats.activations import Activations
from nybble.models.describe import sites
from nybble.plan import Recipe
from nybble.quantized import Quantized
from nybble.train.distill import distillation_loss
from nybble.train.fake import FakeInputs, FakeQuantized, prepared, scale_parameters
from nybble.train.loop import Trainer
from nybble.train.qat import Beginning, convert, prepare, prepare_from

SPECS = ("int4:g64", "int8:channel", "int3:g32,asym", "int2:g64", "nf4:g64,dq", "fp4:g32", "q4_0", "q4_k", "mxfp4", "int4:tensor")
LEARNED = ("int4:g32", "int3:g32,asym", "int2:g64", "int4:channel", "int4:tensor", "nf4:g32")
Make = Callable[..., Trainer]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("spec", SPECS)
def test_a_prepared_model_computes_as_the_quantized_one(
    spec: str, family: str, tiny: Callable[..., Any], ids: Any, logits: Any
) -> None:
    model = tiny(family)
    names = set(sites(model))
    wanted = nybble.quantize(tiny(family), spec)
    plan = prepare(model, spec)
    assert set(prepared(model)) == names == {row.tensor.name for row in plan.packed}
    torch.testing.assert_close(logits(model, ids), logits(wanted.model(), ids), rtol=1e-4, atol=1e-4)
    tensors = convert(model)
    for name, tensor in wanted.tensors.items():
        assert tensors[name].format == tensor.format
        np.testing.assert_array_equal(tensors[name].decode(), tensor.decode())


@pytest.mark.parametrize("spec", LEARNED)
def test_what_was_trained_with_is_what_is_packed(spec: str, tiny: Callable[..., Any], trainer: Make, ids: Any) -> None:
    model = tiny("gpt2")
    prepare(model, spec, scales="learned")
    run = trainer(model=model, steps=8, learning_rate=1e-2)
    run.run()
    model.eval()
    assert all(float(move.detach().abs().max()) > 0 for move in scale_parameters(model)), "a scale was not trained"
    used = {name: module.weight.detach().clone() for name, (module, _) in prepared(model).items()}
    turned = {name: fake.layer_is_turned for name, (_, fake) in prepared(model).items()}
    tensors = convert(model)
    assert tensors.keys() == used.keys()
    for name, tensor in tensors.items():
        weight = used[name].T if turned[name] else used[name]
        np.testing.assert_array_equal(tensor.decode(), weight.numpy())


def test_tied_weights_stay_tied(tiny: Callable[..., Any], trainer: Make) -> None:
    model = tiny("gpt2")
    prepare(model, "int4:g64")
    head, table = model.lm_head, model.transformer.wte
    assert head.parametrizations["weight"].original is table.parametrizations["weight"].original
    trainer(model=model, steps=3).run()
    assert torch.equal(head.weight, table.weight)
    assert "transformer.wte.weight" in convert(model)


@pytest.mark.parametrize("wide", [True, False])
def test_eight_bit_states_of_rounded_weights(wide: bool, tiny: Callable[..., Any], trainer: Make) -> None:
    """The table that is rounded keeps 32-bit states as one that is not; learned scales do not decay."""
    model = tiny("gpt2")
    prepare(model, "int4:g32", scales="learned")
    run = trainer(model=model, steps=2, optimizer="adamw8bit", wide_embeddings=wide)
    run.run()
    state = run.optimizer.state[model.transformer.wte.parametrizations["weight"].original]
    assert ("exp_avg" in state) == wide
    moves = {id(move) for move in scale_parameters(model)}
    for group in run.optimizer.param_groups:
        decays = group["weight_decay"] > 0
        assert not decays or not moves & {id(p) for p in group["params"]}


def test_gradients_pass_rounding() -> None:
    layer = torch.nn.Linear(64, 8, bias=False)
    fake = FakeQuantized(parse_format("int4:g32"), layer, "fit")
    weight = layer.weight.detach().clone().requires_grad_()
    slope = torch.randn(8, 64)
    (fake(weight) * slope).sum().backward()
    assert torch.equal(weight.grad, slope)  # type: ignore[arg-type]


@pytest.mark.parametrize("spec", ["int3:g32", "int3:g32,asym", "nf4:g32", "int3:channel", "int3:tensor"])
def test_slopes_of_scales_are_those_of_the_rounded_values(spec: str) -> None:
    """LSQ, equation 3, of ln(scale): the decoded value, less the weight where that lies within the levels. Weights beyond half a
    step from the last level move only inwards."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 8, bias=False)
    fmt = parse_format(spec)
    fake = FakeQuantized(fmt, layer, "learned")
    assert fake.move is not None
    with torch.no_grad():
        fake.move += 0.3 * torch.randn(fake.move.shape) - 0.4  # some weights lie beyond the last level
    slope = torch.randn(8, 64)
    weight = layer.weight.detach().clone().requires_grad_()
    (fake(weight) * slope).sum().backward()
    tensor = fake.quantize(weight.detach().numpy())
    scale, offset = fmt.grid(tensor.params)
    decoded = torch.from_numpy(tensor.decode())
    block = fmt.block(64)
    wide = torch.from_numpy(np.repeat(scale, block, 1)[:, :64] if scale.shape[1] > 1 else scale.copy())
    zero = (
        0 if offset is None else torch.from_numpy(np.repeat(offset, block, 1)[:, :64] if offset.shape[1] > 1 else offset.copy())
    )
    level = weight.detach() / wide + zero
    inside = (level >= float(fmt.levels.min())) & (level <= float(fmt.levels.max()))
    expected = slope * (decoded - torch.where(inside, weight.detach(), 0.0))
    got = fake.move.grad
    assert got is not None
    summed = expected.sum() if scale.size == 1 else expected.reshape(8, scale.shape[1], -1).sum(2)
    torch.testing.assert_close(got.reshape(-1), summed.reshape(-1), rtol=0.02, atol=0.02 * float(summed.abs().max()))
    assert not inside.all()
    ends = float(fmt.levels.min()), float(fmt.levels.max())
    gaps = np.diff(np.unique(fmt.levels))
    up = slope * wide < 0  # where a step down the slope takes the level
    free = ((level >= ends[0] - gaps[0] / 2) | up) & ((level <= ends[1] + gaps[-1] / 2) | ~up)
    assert not free.all()
    assert torch.equal(weight.grad != 0, free)  # type: ignore[union-attr]


def test_training_wins_back_what_rounding_loses(tiny: Callable[..., Any], trainer: Make) -> None:
    model = tiny("llama")
    learnt = trainer(model=model, folder="float", steps=80, learning_rate=1e-2, warmup=5, evaluate_every=0, save_every=0)
    learnt.run()
    best = learnt.evaluate()
    teacher = tiny("llama")
    teacher.load_state_dict(model.state_dict())
    prepare(model, "int2:g64", scales="learned")
    run = trainer(model=model, folder="qat", steps=80, learning_rate=3e-3, warmup=5, evaluate_every=0, save_every=0)
    run.loss = distillation_loss(teacher)
    rounded = run.evaluate()
    run.run()
    assert rounded - best > 0.05
    assert run.evaluate() - best < 0.5 * (rounded - best)


def test_the_result_goes_everywhere(tiny: Callable[..., Any], trainer: Make, tmp_path: Path, ids: Any, logits: Any) -> None:
    model = tiny("llama")
    plan = prepare(model, "int4:g64")
    trainer(model=model, steps=4).run()
    wanted = logits(model.eval(), ids)
    convert(model)
    folder = Quantized(model, plan.hash, None, {"method": "qat"}, None).save(tmp_path / "model")
    torch.testing.assert_close(logits(nybble.load(folder).model(), ids), wanted, rtol=1e-4, atol=1e-4)
    exact = Decoder.load(folder, exact=True).logits(ids[0].tolist())
    np.testing.assert_allclose(exact, wanted[0].numpy(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("spec", "scales", "message"),
    [
        ("fp16", "fit", "fp16 is a cast: train with --precision"),
        ("q4_0", "learned", "scales of q4_0 cannot be learned one by one"),
        ("int4:g64", "found", "unknown way to scales 'found'"),
        ("int9", "fit", "int9"),
    ],
)
def test_what_cannot_be_prepared(spec: str, scales: str, message: str, tiny: Callable[..., Any]) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        prepare(tiny("gpt2"), spec, scales=scales)


def test_weights_that_are_not_finite_are_named(tiny: Callable[..., Any]) -> None:
    model = tiny("gpt2")
    prepare(model, "int4:g64")
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.parametrizations["weight"].original[0, 0] = float("nan")
    with pytest.raises(NumericError, match=r"transformer\.h\.0\.attn\.c_attn\.weight: 1 of"):
        convert(model)


WINDOWS = np.random.default_rng(0).integers(3, 97, (8, 40))


@pytest.mark.parametrize("scales", ["learned", "fixed"])
@pytest.mark.parametrize("method", ["gptq", "rtn:mse", "best:tune=3:bias", "awq", "hqq"])
def test_training_begins_with_what_a_method_chose(
    method: str, scales: str, tiny: Callable[..., Any], ids: Any, logits: Any
) -> None:
    """To the bit: codes, scales, and the biases and norms that it moved."""
    model = tiny("gpt2")
    wanted = nybble.quantize(tiny("gpt2"), "int3:g32", method, WINDOWS)
    prepare_from(model, Beginning(Recipe("int3:g32", method), scales, WINDOWS))
    torch.testing.assert_close(logits(model.eval(), ids), logits(wanted.model(), ids), rtol=1e-4, atol=1e-4)
    tensors = convert(model)
    for name, tensor in wanted.tensors.items():
        np.testing.assert_array_equal(tensors[name].codes, tensor.codes)
        np.testing.assert_array_equal(tensors[name].decode(), tensor.decode())


def test_weights_begin_where_the_method_would_have_them(tiny: Callable[..., Any]) -> None:
    """Not on their codes: nearer to the next the more they lean to it, and some already far over."""
    model = tiny("gpt2")
    prepare_from(model, Beginning(Recipe("int3:g32", "gptq"), "learned", WINDOWS))
    for name, (module, fake) in prepared(model).items():
        latent = module.parametrizations["weight"].original.detach()
        rows = (latent.T if fake.layer_is_turned else latent).contiguous().numpy()
        tensor = fake.quantize(rows)
        step = np.repeat(np.abs(tensor.format.grid(tensor.params)[0]), 32, 1)[:, : rows.shape[1]]
        lean = np.abs(rows - tensor.decode()) / np.where(step == 0, 1, step)
        assert lean.max() < 0.4501, name
        assert np.quantile(lean, 0.9) > 0.2, name


def test_fixed_scales_stay(tiny: Callable[..., Any], trainer: Make) -> None:
    for spec in ("int3:g32", "nf4:g32,dq", "q4_0"):
        model = tiny("gpt2")
        prepare_from(model, Beginning(Recipe(spec), "fixed"))
        before = {name: fake.quantize(rows_of(module, fake)).params for name, (module, fake) in prepared(model).items()}
        trainer(model=model, steps=4, learning_rate=1e-2).run()
        assert not scale_parameters(model)
        changed = 0
        for name, tensor in convert(model).items():
            for suffix, values in tensor.params.items():
                np.testing.assert_array_equal(values, before[name][suffix])
            changed += 1
        assert changed


def rows_of(module: Any, fake: FakeQuantized) -> Any:
    latent = module.parametrizations["weight"].original.detach()
    return np.ascontiguousarray((latent.T if fake.layer_is_turned else latent).numpy())


@pytest.mark.parametrize("method", ["dynamic", "static", "llm_int8:threshold=1"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_inputs_are_rounded_as_they_will_be(
    method: str, family: str, tiny: Callable[..., Any], trainer: Make, ids: Any, logits: Any, tmp_path: Path
) -> None:
    model = tiny(family)
    wanted = nybble.quantize(tiny(family), "int8:channel", method, WINDOWS)
    begin = Beginning(Recipe("int8:channel", method), "fit", WINDOWS)
    plan = prepare_from(model, begin)
    near = {"rtol": 1e-3, "atol": 0.02}  # products of other orders: now and then an input rounds to the next code
    torch.testing.assert_close(logits(model.eval(), ids), logits(wanted.model(), ids), **near)
    run = trainer(model=model, steps=4, learning_rate=3e-3)
    run.run()
    expected = logits(model.eval(), ids)
    tensors = convert(model)
    schemes = {str(tensor.activations).partition(":")[0] for tensor in tensors.values() if tensor.activations}
    assert schemes == {{"llm_int8:threshold=1": "outliers"}.get(method, method)}
    assert not any("fake_inputs" in name for name, _ in model.named_modules())
    torch.testing.assert_close(logits(model, ids), expected, **near)
    Quantized(model, plan.hash, None, {}, None).save(tmp_path / "saved")
    torch.testing.assert_close(logits(nybble.load(tmp_path / "saved").model(), ids), expected, **near)


def test_observers_follow_and_freeze(tiny: Callable[..., Any], trainer: Make) -> None:
    model = tiny("gpt2")
    prepare_from(model, Beginning(Recipe("int8:channel", "static"), "fit", WINDOWS, observe=3))
    fakes = [module for module in model.modules() if isinstance(module, FakeInputs)]
    assert fakes
    first = [fake.activations() for fake in fakes]
    model.eval()
    model(input_ids=torch.from_numpy(WINDOWS[:2]))
    assert [fake.activations() for fake in fakes] == first, "a pass that does not train was looked at"
    run = trainer(model=model, steps=6, learning_rate=1e-2, batch=4, micro=4)
    seen = []
    run.run(lambda step: seen.append([fake.activations() for fake in fakes]))
    assert seen[0] != first
    assert seen[1] != seen[0]
    assert seen[2] == seen[3] == seen[5]
    assert all(int(fake.passes) == 3 for fake in fakes)


def test_gradients_of_inputs_stop_at_the_grid() -> None:
    fake = FakeInputs(Activations("static", scale=0.1, zero=100), observe=0)
    x = torch.tensor([[-20.0, -10.0, -3.14159, 0.26, 15.5, 15.6]], requires_grad=True)
    y = fake(x)
    y.sum().backward()
    torch.testing.assert_close(y.detach(), torch.tensor([[-10.0, -10.0, -3.1, 0.3, 15.5, 15.5]]))
    assert x.grad is not None
    assert x.grad.tolist() == [[0.0, 1.0, 1.0, 1.0, 1.0, 0.0]]


def test_what_cannot_begin_is_refused(tiny: Callable[..., Any]) -> None:
    with pytest.raises(UsageError, match="method gptq chooses scales: train them"):
        prepare_from(tiny("gpt2"), Beginning(Recipe("int4:g32", "gptq"), "fit", WINDOWS))
    with pytest.raises(UsageError, match="reads calibration text"):
        prepare_from(tiny("gpt2"), Beginning(Recipe("int4:g32", "gptq"), "learned"))
    with pytest.raises(UsageError, match="nothing to observe"):
        prepare_from(tiny("gpt2"), Beginning(Recipe("int4:g32"), "fit", observe=5))
