"""Pruning: as many zeros as asked for and where, SparseGPT against its paper's formulas, and what it is worth on a real model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as checks
from hypothesis import strategies as st
from numpy.typing import NDArray

import nybble
from nybble.calibrate.statistics import Statistics
from nybble.calibrate.windows import calibration_windows, encode
from nybble.containers import open_contents
from nybble.convert import convert
from nybble.demo import model_folder, text
from nybble.engine import Decoder
from nybble.errors import UsageError
from nybble.formats import parse_format
from nybble.methods import parse_method
from nybble.methods.steps.choose import choose
from nybble.methods.steps.factor import factorize
from nybble.methods.steps.grid import Floats, grid_of
from nybble.methods.steps.masks import kept_in_matrix, kept_in_rows, runs_of
from nybble.methods.steps.rounding import Mask, round_with_feedback
from nybble.methods.steps.settings import Settings
from nybble.models.loading import load_tokenizer
from nybble.plan import Recipe, make_plan, prunes

WINDOWS = np.random.default_rng(0).integers(3, 97, (6, 40))
PATTERNS = ("free", "1of2", "2of4", "4of8")
METHODS = (
    "magnitude",
    "wanda",
    "sparsegpt",
    "wanda+gptq",
    "sparsegpt:refine=2",
    "sparsegpt:scales=search",
    "best+sparsegpt:tune=0",
)

pytestmark = pytest.mark.usefixtures("one_thread")


def problem(seed: int, rows: int = 24, columns: int = 96, mixing: float = 0.4) -> tuple[NDArray[np.float32], torch.Tensor]:
    """(weight [N, K], Hessian [K, K]) of inputs that depend on each other."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((6 * columns, columns)) @ (np.eye(columns) + mixing * rng.standard_normal((columns, columns)))
    return rng.standard_normal((rows, columns)).astype(np.float32), torch.from_numpy(x.T @ x / len(x))


def zeros_of(decoded: NDArray[np.float32]) -> float:
    return float((decoded == 0).mean())


@checks(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.integers(1, 41), st.floats(0.05, 0.95), st.sampled_from(PATTERNS), st.integers(0, 3))
def test_as_many_stay_as_asked_for(rows: int, columns: int, sparsity: float, pattern: Any, levels: int) -> None:
    """Ties too: scores of few values."""
    settings = Settings(mask="magnitude", sparsity=sparsity, pattern=pattern)
    scores = torch.from_numpy(np.random.default_rng(columns).standard_normal((rows, columns))).abs()
    scores = scores if levels == 0 else (scores * levels).round()
    for keep, rows_alike in ((kept_in_rows(scores, settings), True), (kept_in_matrix(scores, settings), False)):
        assert keep.shape == scores.shape
        runs = runs_of(settings)
        if runs is None:
            total = round(columns * sparsity) * rows if rows_alike else round(rows * columns * sparsity)
            assert int((~keep).sum()) == total
            if rows_alike:
                assert len(set((~keep).sum(1).tolist())) == 1
            worst_kept = float(scores[keep].min()) if keep.any() and not rows_alike else math.inf
            assert worst_kept >= (float(scores[~keep].max()) if (~keep).any() and not rows_alike else -math.inf)
        else:
            for start in range(0, columns, runs[1]):
                part, value = keep[:, start : start + runs[1]], scores[:, start : start + runs[1]]
                assert (part.sum(1) == min(runs[0], part.shape[1])).all()
                lost = torch.where(part, -math.inf, value).amax(1)
                assert (torch.where(part, value, math.inf).amin(1) >= lost).all()


def sparsegpt_by_inverse(weight: NDArray[np.float64], hessian: NDArray[np.float64], damp: float, run: int) -> NDArray[np.float64]:
    """SparseGPT as its paper has it (algorithm 1), half of all weights: the inverse's Cholesky factor, blocks of 128 columns, the
    rest of each row corrected after every column. `run`: 4 for 2 of 4, 0 for anywhere in a block."""
    w, h = weight.copy(), hessian.copy()
    h[np.diag_indices_from(h)] += damp * np.diag(hessian).mean()
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    result = np.zeros_like(w)
    for start in range(0, w.shape[1], 128):
        stop = min(start + 128, w.shape[1])
        cost = w[:, start:stop] ** 2 / np.diag(upper)[start:stop] ** 2
        lose = np.zeros(cost.shape, bool)
        if not run:
            lose = cost <= np.sort(cost, axis=None)[cost.size // 2 - 1]
        for j in range(start, stop):
            if run and j % run == 0:
                cost = w[:, j : j + run] ** 2 / np.diag(upper)[j : j + run] ** 2
                for row in range(len(w)):
                    lose[row, j - start + np.argsort(cost[row])[: run // 2]] = True
            kept = np.where(lose[:, j - start], 0.0, w[:, j])
            result[:, j] = kept
            w[:, j:] -= np.outer((w[:, j] - kept) / upper[j, j], upper[j, j:])
    return result


@pytest.mark.parametrize("run", [0, 4])
@pytest.mark.parametrize("columns", [96, 320])
def test_the_loop_is_sparsegpt(run: int, columns: int) -> None:
    settings = Settings(feedback=True, mask="feedback", pattern="2of4" if run else "free")
    fmt = parse_format("fp32")
    for seed in range(5):
        weight, hessian = problem(seed, columns=columns)
        factor = factorize(hessian, 0.01, "natural", columns)
        target = torch.from_numpy(weight.astype(np.float64))
        got = round_with_feedback(target, factor, fmt, grid_of(fmt, {}), "range", Floats(), Mask(settings, None)).codes.numpy()
        expected = sparsegpt_by_inverse(weight.astype(np.float64), hessian.numpy(), factor.damping, run)
        np.testing.assert_array_equal(got == 0, expected == 0)
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "spec", ["fp16", "fp32", "bf16", "int4:g32", "int8:channel", "int3:tensor", "nf4:g32", "nf4:g32,dq", "mxfp4"]
)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_and_format_has_the_zeros(method: str, spec: str) -> None:
    weight, hessian = problem(0)
    stats = Statistics([hessian], None, 1)
    for pattern in ("free", "2of4"):
        settings = parse_method(f"{method}:pattern={pattern}").settings
        settings = replace(settings, target=0.0)  # there is no other stream here
        tensor, account = choose(weight, parse_format(spec), settings, stats)
        zero = tensor.decode() == 0
        if tensor.format.is_cast:
            assert not np.signbit(tensor.decode()[zero]).any(), "a zero that is stored as another"
        if pattern == "2of4":
            assert (zero.reshape(len(weight), -1, 4).sum(2) >= 2).all()
        assert zero.mean() >= 0.5 - 1e-9
        if spec in ("fp16", "fp32", "bf16", "int8:channel"):
            assert zero.mean() < 0.52
        assert 0 < account.loss < 1


def test_who_makes_up_for_losses_loses_less() -> None:
    """Squared error of the outputs, half the weights zero, on inputs that depend on each other."""
    weight, hessian = problem(1, rows=64, mixing=0.1)
    stats = Statistics([hessian], None, 1)

    def loss(method: str) -> float:
        return choose(weight, parse_format("fp32"), parse_method(method).settings, stats)[1].loss

    for pattern in ("free", "2of4"):
        got = {
            name: loss(f"{name}:pattern={pattern}")
            for name in ("magnitude", "wanda", "wanda+gptq", "sparsegpt", "sparsegpt:refine=4")
        }
        assert got["wanda+gptq"] < 0.95 * got["wanda"]
        assert got["sparsegpt:refine=4"] < 0.75 * min(got["sparsegpt"], got["magnitude"])
    assert got["sparsegpt"] < 0.75 * got["magnitude"]  # of every four, where it chooses as late as it can


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "qwen3", "opt"])
def test_linear_layers_of_blocks_alone(architecture: str, tiny: Callable[..., Any]) -> None:
    for spec, method in (("fp32", "sparsegpt:pattern=2of4"), ("int4:g32", "magnitude"), ("int8:channel", "wanda:sparsity=0.7")):
        model = tiny(architecture)
        plan = make_plan(nybble.models.describe.describe(model), Recipe(spec, method))
        wanted = {row.tensor.name for row in plan.packed if prunes(row)}
        share = parse_method(method).settings.sparsity
        tensors = nybble.quantize(model, spec, method, WINDOWS).tensors
        assert wanted
        assert not any("embed" in name or "wte" in name or "lm_head" in name for name in wanted)
        for name, tensor in tensors.items():
            found = zeros_of(tensor.decode())
            assert (found >= share - 0.01) == (name in wanted), (name, found)
        assert (set(tensors) == wanted) == (spec == "fp32")


def test_what_cannot_be_is_refused(tiny: Callable[..., Any]) -> None:
    for spec in ("int4:g32,asym", "q4_1", "q4_k"):
        with pytest.raises(UsageError, match=r"has offsets"):
            choose(*problem(0, columns=256)[:1], parse_format(spec), parse_method("sparsegpt").settings, Statistics([], None, 0))
    with pytest.raises(UsageError, match=r"sparsity is the share"):
        parse_method("wanda:sparsity=1")
    with pytest.raises(UsageError, match=r"mask=feedback is chosen by the loop"):
        parse_method("wanda:mask=feedback")
    with pytest.raises(UsageError, match="reads calibration text"):
        nybble.quantize(tiny("gpt2"), "fp16", "wanda")


@pytest.mark.parametrize(("spec", "most"), [("fp16", 9.1 / 16), ("int8:channel", 0.66), ("int4:g32", 0.8), ("nf4:g64", 0.78)])
def test_sparse_folders_are_smaller_and_hold_the_same(
    spec: str, most: float, tiny: Callable[..., Any], tmp_path: Path, ids: torch.Tensor
) -> None:
    quantized = nybble.quantize(tiny("llama"), spec, "sparsegpt:pattern=2of4", WINDOWS)
    contents = quantized.contents()
    dense = convert(contents, tmp_path / "dense", "nybble")
    sparse = convert(contents, tmp_path / "sparse", "nybble-sparse")
    assert not dense.changed
    assert not sparse.changed
    held = open_contents(tmp_path / "sparse")
    for name, tensor in quantized.tensors.items():
        np.testing.assert_array_equal(held.read_packed(name).codes, tensor.codes)
        if ".layers." in name:
            stored = sum(array.nbytes for array in tensor.stored().values())
            assert held.sizes[name] <= most * stored
    tokens = ids[0].tolist()
    one, other = Decoder.load(tmp_path / "dense", threads=1), Decoder.load(tmp_path / "sparse", threads=1)
    np.testing.assert_array_equal(one.logits(tokens), other.logits(tokens))
    back = convert(tmp_path / "sparse", tmp_path / "back", "nybble")
    assert not back.changed
    assert (tmp_path / "back" / "model.safetensors").read_bytes()


def test_on_the_model_that_ships() -> None:
    """Two of every four weights zero: the loop loses much less than magnitude, and pays for int4 with little more."""
    tokenizer = load_tokenizer(model_folder())
    windows = calibration_windows(encode(tokenizer, text.calibration_text())[0], 512, count=12, length=256)
    held = torch.from_numpy(calibration_windows(encode(tokenizer, text.evaluation_text())[0], 512, count=8, length=256))

    def loss(model: Any) -> float:
        with torch.inference_mode():
            logits = model(input_ids=held).logits[:, :-1]
        return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), held[:, 1:].flatten()))

    before = loss(nybble.load(model_folder()).model())
    rows = (("fp16", "magnitude"), ("fp16", "sparsegpt"), ("int4:g64", "sparsegpt"))
    lost = {
        row: loss(nybble.quantize(model_folder(), row[0], f"{row[1]}:pattern=2of4", windows).model()) - before for row in rows
    }
    assert lost[rows[0]] > 0.1
    assert 0.01 < lost[rows[1]] < 0.6 * lost[rows[0]]
    assert lost[rows[2]] < 0.7 * lost[rows[0]]
