"""A whole walk that tunes, and moves biases and norms: what it moves, and the same codes on one thread and on two."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from nybble.calibrate.statistics import Sums
from nybble.calibrate.workers import Workers
from nybble.formats import parse_format
from nybble.methods import parse_method
from nybble.walk import Walk

WINDOWS = np.random.default_rng(0).integers(0, 97, (24, 32))


def float_model() -> tuple[GPT2LMHeadModel, dict[str, torch.nn.Module]]:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=97, n_positions=32, n_embd=64, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0, attn_implementation="eager"
    )
    model = GPT2LMHeadModel(config).eval()
    layers = {f"{name}.weight": m for name, m in model.named_modules() if name.endswith(("c_attn", "c_proj", "c_fc"))}
    with torch.no_grad():
        for layer in layers.values():
            layer.weight.mul_(8)  # predictions that depend on the blocks
    return model, layers


def walk(threads: int, method: str) -> Walk:
    model, layers = float_model()
    fmt = parse_format("int2:g32")
    with Workers(threads) as workers:
        made = Walk(model, layers, dict.fromkeys(layers, fmt), parse_method(method).settings, WINDOWS, {}, workers)
        made.run()
    return made


def means(model: torch.nn.Module, names: Iterable[str], floats: torch.nn.Module | None = None) -> dict[str, torch.Tensor]:
    """Mean output of layers of a model over the windows; `floats`: of its layers, fed what those of the model are fed."""
    sums: dict[str, torch.Tensor] = {}
    hooks = []
    for name in names:
        layer = model.get_submodule(name)
        other = None if floats is None else floats.get_submodule(name)

        def hook(_: object, args: tuple[torch.Tensor], out: torch.Tensor, name: str = name, other: Any = other) -> None:
            made = out if other is None else other(args[0])
            sums[name] = sums.get(name, 0) + made.double().mean((0, 1))

        hooks.append(layer.register_forward_hook(hook))
    with torch.no_grad():
        model(torch.from_numpy(WINDOWS))
    for handle in hooks:
        handle.remove()
    return sums


def test_blocks_are_tuned_one_by_one() -> None:
    made = walk(2, "gptq:block_tune=20")
    assert len(made.block_histories) == 2
    for history in made.block_histories:
        assert [step for step, _ in history] == list(range(0, 21, 2))
        assert min(loss for _, loss in history) < 0.99 * history[0][1]
    assert not made.history
    before = walk(2, "gptq").tensors
    assert any((before[name].codes != tensor.codes).any() for name, tensor in made.tensors.items())


def test_norms_and_biases_move_where_asked_for() -> None:
    still, made = walk(2, "rtn:tune=10:travel=0"), walk(2, "rtn:tune=10:travel=0:norms")
    assert not still.moved
    assert {"transformer.h.0.ln_1.weight", "transformer.ln_f.bias", "transformer.h.1.mlp.c_fc.bias"} <= set(made.moved)
    assert all(value.dim() == 1 for value in made.moved.values())
    start = {name: value for name, value in walk(2, "rtn").model.named_parameters() if name in made.moved}
    assert sum(not torch.equal(start[name], value) for name, value in made.moved.items()) > len(made.moved) // 2
    for name, value in made.moved.items():
        torch.testing.assert_close(made.model.get_parameter(name).detach(), value)


@pytest.mark.parametrize("method", ["rtn:bias", "gptq:bias", "best:tune=0:bias"])
def test_biases_take_up_the_mean_error(method: str) -> None:
    """The mean of a layer's outputs is that of the float layer: on the same inputs, or on those of the float model where the
    method aims at its outputs."""
    made = walk(2, method)
    names = [name.removesuffix(".weight") for name in made.layers]
    assert set(made.moved) == {f"{name}.bias" for name in names}
    floats = float_model()[0]
    wanted = means(floats, names) if made.settings.target else means(made.model, names, floats)
    got = means(made.model, names)
    for name in names:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-4, atol=1e-4)
    off = max(
        float((each - wanted[name]).abs().max())
        for name, each in means(walk(2, method.replace(":bias", "")).model, names).items()
    )
    assert off > 0.05


def test_a_weight_without_a_bias_has_moments_around_zero() -> None:
    random = np.random.default_rng(3)
    windows = [torch.from_numpy(random.normal(5, 1, (40, 8))).float() for _ in range(6)]
    floats = [y + 0.1 for y in windows]
    counts = [torch.from_numpy(random.uniform(0.5, 1.5, 240)).float()]
    counts[0] /= counts[0].mean()
    centred, plain = Sums(centre=windows[0].mean(0)), Sums()
    for i, (y, x) in enumerate(zip(windows, floats, strict=True)):
        for sums in (centred, plain):
            sums.add_window(y, x, [counts[0][40 * i : 40 * i + 40]])
    around, zero = centred.finish(), plain.finish()
    y, x, s = torch.cat(windows).double(), torch.cat(floats).double(), counts[0].double()
    assert around.means is not None
    assert around.float_means is not None
    assert around.cross is not None
    mean = (s[:, None] * y).mean(0)
    torch.testing.assert_close(around.means[0], mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(around.float_means[0], mean + 0.1, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(around.moments[0], 2 * ((y - mean) * s[:, None]).T @ (y - mean) / 240, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(around.cross[0], 2 * (x - mean - 0.1).T @ ((y - mean) * s[:, None]) / 240, rtol=1e-5, atol=1e-5)
    back = around.around_zero()
    assert back.cross is not None
    assert zero.cross is not None
    torch.testing.assert_close(back.moments[0], zero.moments[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(back.cross[0], zero.cross[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["best:tune=10:travel=0.02", "best:tune=4:block_tune=4:norms:bias"])
def test_threads_do_not_change_what_tuning_gives(method: str) -> None:
    one, two = (walk(threads, method) for threads in (1, 2))
    assert one.history == two.history
    assert one.block_histories == two.block_histories
    assert set(one.moved) == set(two.moved)
    for name, value in one.moved.items():
        torch.testing.assert_close(value, two.moved[name], rtol=0, atol=0)
    assert len({loss for _, loss in one.history}) > 1  # it did move
    for name, tensor in one.tensors.items():
        np.testing.assert_array_equal(tensor.codes, two.tensors[name].codes)
        np.testing.assert_array_equal(tensor.decode(), two.tensors[name].decode())
