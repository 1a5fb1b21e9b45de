"""Tuning: it starts from the codes it is given, moves down slopes, keeps the best state; `wanted` is the parabola's vertex."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nybble.calibrate.statistics import Statistics
from nybble.formats import QTensor, parse_format
from nybble.methods.steps.latent import BESIDE, FloatLatent, Latent, Sign
from nybble.methods.steps.settings import Settings
from nybble.methods.steps.tuning import Pace, tune
from nybble.methods.steps.wanted import wanted


def rounded(spec: str, seed: int = 0) -> tuple[np.ndarray, QTensor]:
    weight = np.random.default_rng(seed).normal(size=(6, 128)).astype(np.float32)
    fmt = parse_format(spec)
    params = fmt.fit(weight)
    return weight, QTensor(fmt, fmt.encode(weight, params), params)


def statistics(seed: int = 1) -> Statistics:
    y = torch.from_numpy(np.random.default_rng(seed).normal(size=(400, 128)))
    x = y + 0.1 * torch.from_numpy(np.random.default_rng(seed + 1).normal(size=(400, 128)))
    return Statistics([2 / 400 * y.T @ y], [2 / 400 * x.T @ y], 400)


@pytest.mark.parametrize("spec", ["int2:g64", "int3:g32,asym", "int4:channel", "nf4"])
def test_latent_stands_for_the_tensor_it_is_made_of(spec: str) -> None:
    weight, tensor = rounded(spec)
    latent = Latent(tensor, torch.from_numpy(weight - tensor.decode()) * 100)
    np.testing.assert_array_equal(latent.tensor().decode(), tensor.decode())
    np.testing.assert_allclose(latent.value().numpy(), tensor.decode(), rtol=1e-6, atol=1e-7)


def test_wanted_is_where_the_loss_of_one_weight_is_least() -> None:
    weight, tensor = rounded("int2:g64")
    stats = statistics()
    settings = Settings(feedback=True, target=1.0)
    goal = stats.target(torch.from_numpy(weight).double(), 0, 1.0, settings.ridge)
    scale = np.repeat(tensor.format.grid(tensor.params)[0], 64, axis=1)
    found = wanted(tensor, torch.from_numpy(weight), settings, stats, damping=0.0).numpy() * scale
    hessian, decoded = stats.moments[0], torch.from_numpy(tensor.decode()).double()

    def loss(move: float) -> float:
        row = decoded[2].clone()
        row[7] += move
        return float((row - goal[2]) @ hessian @ (row - goal[2]))

    best = float(found[2, 7])
    assert loss(best) < min(loss(best - 1e-3), loss(best + 1e-3))


def test_wanted_of_plain_rounding_is_the_weight_itself() -> None:
    weight, tensor = rounded("int3:g64")
    scale = np.repeat(tensor.format.grid(tensor.params)[0], 64, axis=1)
    found = wanted(tensor, torch.from_numpy(weight), Settings(), statistics(), 0.0).numpy()
    np.testing.assert_allclose(tensor.decode() + found * scale, weight, atol=1e-6)


def run(travel: float, gain: float, steps: int) -> tuple[np.ndarray, QTensor, QTensor, list[tuple[int, float]]]:
    """Tune one weight towards another, by the squared difference."""
    weight, tensor = rounded("int2:g64")
    aim = torch.from_numpy(weight + 0.6 * np.abs(weight).max())
    shown: dict[str, torch.Tensor] = {}
    best, history = tune(
        {"w": Latent(tensor, torch.zeros(tensor.shape))},
        Pace(steps, travel, gain, batch=8, seed=0),
        32,
        lambda _: {"w": shown["w"] - aim},
        lambda _: float((shown["w"] - aim).square().mean()),
        shown.__setitem__,
        lambda function, indices: [function(i) for i in indices] and None,
        lambda *_: None,
    )
    return aim.numpy(), tensor, best["w"], history


def test_codes_and_scales_move_down_the_slope() -> None:
    aim, before, after, history = run(0.1, 0.01, 30)
    assert np.square(after.decode() - aim).mean() < 0.9 * np.square(before.decode() - aim).mean()
    assert (before.codes != after.codes).any()
    assert history[-1][1] < history[0][1]


def test_codes_stay_without_travel() -> None:
    _, before, after, _ = run(0.0, 0.01, 30)
    np.testing.assert_array_equal(before.codes, after.codes)


def test_best_state_is_kept() -> None:
    aim, before, after, history = run(50.0, 3.0, 10)  # strides far past the aim
    kept = np.square(after.decode() - aim).mean()
    assert kept == pytest.approx(min(loss for _, loss in history), rel=1e-5)
    assert kept <= np.square(before.decode() - aim).mean() * (1 + 1e-6)


def test_positions_begin_beside_their_codes() -> None:
    _, tensor = rounded("int2:g64")
    latent = Latent(tensor, torch.full(tensor.shape, 3.0))
    assert float((latent.positions - latent.positions.round()).abs().max()) <= BESIDE + 1e-6


def test_signs_move_all_positions_alike() -> None:
    weight, tensor = rounded("int3:g32")
    latent = Latent(tensor, torch.zeros(tensor.shape), Sign)
    before, slope = latent.positions.clone(), torch.from_numpy(weight) * 10.0 ** torch.arange(-3, 3)[:, None]
    latent.step(slope, 0.1, 0.0, 1)
    inside = (before > 0) & (before < 7)
    torch.testing.assert_close((before - latent.positions)[inside], (0.1 * slope.sign())[inside])


def test_a_latent_goes_on_where_another_stopped() -> None:
    weight, tensor = rounded("int2:g64")
    latent = Latent(tensor, torch.full(tensor.shape, 0.2), Sign)
    latent.step(torch.from_numpy(weight), 0.3, 0.02, 1)
    moved = latent.tensor()
    assert (moved.codes != tensor.codes).any()
    again = latent.again(moved)
    np.testing.assert_array_equal(again.tensor().decode(), moved.decode())
    torch.testing.assert_close(again.positions, latent.positions, atol=0.05, rtol=0)


def test_float_parameters_move_by_shares_of_their_size() -> None:
    start = torch.tensor([2.0, -2.0, 2.0, 2.0])
    latent = FloatLatent(start)
    latent.step(torch.tensor([1.0, 1.0, -3.0, 0.0]), 0.5, 0.01, 1)
    torch.testing.assert_close(
        latent.value() - start, 0.01 * 0.04 * 2 * torch.tensor([-1.0, -1.0, 1.0, 0.0]), atol=1e-6, rtol=1e-3
    )
    zeros = FloatLatent(torch.zeros(3))
    zeros.step(torch.tensor([1.0, -1.0, 0.0]), 0.5, 0.01, 1)
    torch.testing.assert_close(zeros.value(), 0.01 * 0.04 * 1e-3 * torch.tensor([-1.0, 1.0, 0.0]), atol=0, rtol=1e-3)


@pytest.mark.parametrize(("bits", "tuned"), [(2, True), (3, True), (4, False), (8, False)])
def test_formats_with_many_bits_are_not_tuned(bits: int, tuned: bool) -> None:
    assert Settings(tune=200, tune_bits=3).tunes(bits) == tuned
    assert Settings(block_tune=200).tunes(bits)
    assert not Settings().tunes(bits)
