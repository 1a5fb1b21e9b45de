"""What the engine's int8 activations cost, against plain loops over logits, on the model that ships."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import nybble
from nybble.calibrate.windows import Windows, token_windows
from nybble.demo import model_folder
from nybble.engine import Decoder
from nybble.errors import InputError, UsageError
from nybble.evaluate.activations import Activations, EngineModel, evaluate_activations
from nybble.evaluate.quality import evaluate
from nybble.kernels import native_available

LENGTH, COUNT = 96, 3
pytestmark = pytest.mark.skipif(not native_available(), reason="without the C++ extension both modes are the exact reference")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return nybble.quantize(model_folder(), "int4:g64").save(tmp_path_factory.mktemp("model") / "int4")


@pytest.fixture(scope="module")
def windows() -> Windows:
    ids = np.random.default_rng(0).zipf(1.3, LENGTH * COUNT).clip(1, 4000).astype(np.int64)
    return token_windows(ids, LENGTH, COUNT, None, "paper", None)


@pytest.fixture(scope="module")
def float_model() -> Any:
    return nybble.load(model_folder()).model()


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return nybble.load(folder).model()


@pytest.fixture(scope="module")
def found(folder: Path, model: Any, windows: Windows, float_model: Any) -> Activations:
    return evaluate_activations(folder, model, windows, reference=float_model, threads=2)


def plain_kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL(p || q) per row of two logits [T, V], in float64."""
    log_p = torch.log_softmax(torch.from_numpy(p).double(), -1)
    log_q = torch.log_softmax(torch.from_numpy(q).double(), -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).numpy()


def test_figures_equal_a_plain_loop(found: Activations, folder: Path, windows: Windows, float_model: Any) -> None:
    exact, rounded = (Decoder.load(folder, 1, exact=exact) for exact in (True, False))
    between, difference = [], []
    for ids in windows.ids:
        with torch.no_grad():
            original = float_model(torch.from_numpy(ids[None])).logits[0, :-1].float().numpy()
        a, b = exact.logits(ids.tolist())[:-1], rounded.logits(ids.tolist())[:-1]
        between.append(plain_kl(a, b))
        difference.append(plain_kl(original, b) - plain_kl(original, a))
    assert found.kl is not None
    assert found.difference is not None
    assert found.kl.mean == pytest.approx(np.mean(between), rel=0.01)
    assert found.kl.p99 == pytest.approx(np.quantile(between, 0.99), rel=0.01)
    assert found.difference.mean == pytest.approx(np.mean(difference), abs=1e-6)
    assert found.difference.p99 == pytest.approx(np.quantile(difference, 0.99), abs=1e-5)


def test_float_activations_agree_with_torch_to_rounding_and_int8_do_not(found: Activations) -> None:
    exact, rounded = found.modes["float"], found.modes["int8"]
    assert exact.from_torch is not None
    assert rounded.from_torch is not None
    assert exact.from_torch.p99 < 1e-6 < rounded.from_torch.mean < 0.0005
    assert exact.quality.perplexity == pytest.approx(found.torch.perplexity, rel=1e-5)
    assert exact.quality.kl_mean == pytest.approx(found.torch.kl_mean, rel=1e-3)
    assert (exact.cache, rounded.cache) == ("f32", "int16")


def test_the_figures_of_torch_are_those_of_evaluate(found: Activations, model: Any, windows: Windows) -> None:
    alone = evaluate(model, windows)
    assert found.torch.perplexity == pytest.approx(alone.perplexity, rel=1e-6)
    assert found.torch.perplexity_se == pytest.approx(alone.perplexity_se, rel=1e-4)
    assert found.torch.scored_tokens == found.torch.kl_tokens == COUNT * (LENGTH - 1)


def test_one_mode_alone_has_nothing_to_compare(folder: Path, model: Any, windows: Windows) -> None:
    found = evaluate_activations(folder, model, windows, modes=("int8",), threads=2)
    assert set(found.modes) == {"int8"}
    assert found.kl is None
    assert found.difference is None
    assert found.torch.kl_mean is None


def test_predictions_that_are_not_finite_have_no_distance(folder: Path, model: Any, windows: Windows) -> None:
    class Broken:
        def __call__(self, input_ids: torch.Tensor) -> Any:
            found = model(input_ids=input_ids)
            found.logits[0, -2] = torch.nan
            return found

        def parameters(self) -> Any:
            return model.parameters()

        def buffers(self) -> Any:
            return model.buffers()

    found = evaluate_activations(folder, Broken(), windows, modes=("float",), threads=2)
    assert found.torch.perplexity == np.inf
    assert "window 0" in (found.torch.note or "")
    assert np.isfinite(found.modes["float"].quality.perplexity)
    assert found.modes["float"].from_torch is None


def test_wrong_arguments(folder: Path, model: Any, windows: Windows) -> None:
    with pytest.raises(UsageError, match="int4"):
        evaluate_activations(folder, model, windows, modes=("int4",))
    with pytest.raises(InputError):
        evaluate_activations(folder.parent / "none", model, windows)


def test_the_engine_takes_the_place_of_a_model(folder: Path) -> None:
    ids = torch.tensor([[5, 6, 7], [9, 8, 7]])
    decoder = Decoder.load(folder, 1)
    logits = EngineModel(decoder)(input_ids=ids).logits
    assert logits.shape == (2, 3, 4096)
    assert np.array_equal(logits[1].numpy(), decoder.logits([9, 8, 7]))
