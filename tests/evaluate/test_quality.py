"""Perplexity, KL and agreement against plain loops, on the model that ships and on small ones with known answers."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from nybble.calibrate.windows import Windows, token_windows
from nybble.demo import model_folder
from nybble.errors import FileFormatError, NumericError, OutputError, UsageError
from nybble.evaluate import quality
from nybble.evaluate.quality import LogitCache, evaluate, kl_divergence


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def noised(model: Any) -> Any:
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in other.parameters():
            weight += 0.02 * weight.std() * torch.randn(weight.shape, generator=generator)
    return other


@pytest.fixture(scope="module")
def text() -> np.ndarray:
    """700 token ids that are neither random nor constant."""
    return np.random.default_rng(0).zipf(1.3, 700).clip(1, 4000).astype(np.int64)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def plain_loss(model: Any, text: np.ndarray, length: int, protocol: str, stride: int) -> float:
    """Mean loss by the book, token by token, from the text: knows nothing of Windows."""
    losses: list[float] = []
    start, done = 0, 1
    while start + length <= len(text):
        ids = torch.tensor(text[start : start + length])
        with torch.no_grad():
            logits = model(ids[None]).logits[0].double()
        for t in range(1, length):
            if protocol == "llama.cpp" and t - 1 < length // 2:  # logits first .. n_ctx - 2 are used there
                continue
            if protocol == "stride" and start + t < done:
                continue
            losses.append(float(torch.logsumexp(logits[t - 1], 0) - logits[t - 1, ids[t]]))
        done = start + length
        if protocol != "stride":
            start += length
        elif start + length == len(text):
            break
        else:
            start = min(start + stride, len(text) - length)
    return sum(losses) / len(losses)


@pytest.mark.parametrize("protocol", ["paper", "llama.cpp", "stride"])
def test_perplexity_equals_a_plain_loop(model: Any, text: np.ndarray, protocol: str) -> None:
    windows = token_windows(text, 128, protocol=protocol, stride=48 if protocol == "stride" else None)
    found = evaluate(model, windows)
    expected = math.exp(plain_loss(model, text, 128, protocol, 48))
    assert found.perplexity == pytest.approx(expected, rel=1e-6)
    assert found.scored_tokens == windows.scored_tokens
    assert (found.kl_mean, found.kl_tokens, found.top1_agreement) == (None, 0, None)


def test_bos_windows_predict_the_first_token_from_bos(model: Any, text: np.ndarray) -> None:
    found = evaluate(model, token_windows(text[:31], 32, bos=0))
    ids = torch.tensor([0, *text[:31]])
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(model(ids[None]).logits[0, :-1].double(), ids[1:])
    assert found.nll_mean == pytest.approx(expected.item(), rel=1e-6)
    assert found.perplexity_se is None  # one window has no spread


def test_result_does_not_depend_on_batch_or_threads(
    model: Any, noised: Any, text: np.ndarray, tmp_path: Path, threads: None
) -> None:
    windows = token_windows(text, 100)
    cache = LogitCache.create(tmp_path, model, "m", windows)
    results = []
    for count, batch_tokens in ((1, 1), (2, 300), (1, 4096), (2, 4096)):
        torch.set_num_threads(count)
        results.append(evaluate(noised, windows, cache, batch_tokens))
    for other in results[1:]:
        assert other.perplexity == pytest.approx(results[0].perplexity, rel=1e-6)
        assert other.perplexity_se == pytest.approx(results[0].perplexity_se, rel=1e-6)
        assert other.kl_mean == pytest.approx(results[0].kl_mean, rel=1e-6)


def test_kl_with_itself_is_zero(model: Any, text: np.ndarray, tmp_path: Path) -> None:
    windows = token_windows(text, 100)
    found = evaluate(model, windows, LogitCache.create(tmp_path, model, "m", windows))
    assert found.kl_mean == pytest.approx(0, abs=1e-7)
    assert found.kl_p99 == pytest.approx(0, abs=1e-6)
    assert found.top1_agreement == 1
    assert found.kl_tokens == windows.scored_tokens


def test_kl_and_agreement_equal_a_direct_computation(model: Any, noised: Any, text: np.ndarray, tmp_path: Path) -> None:
    windows = token_windows(text, 100, protocol="stride", stride=70)
    found = evaluate(noised, windows, LogitCache.create(tmp_path, model, "m", windows))
    rows: list[torch.Tensor] = []
    agreed: list[torch.Tensor] = []
    for ids, scored in zip(windows.ids, windows.scored, strict=True):
        with torch.no_grad():
            p = model(torch.tensor(ids[None])).logits[0].double().softmax(-1)
            q = noised(torch.tensor(ids[None])).logits[0].double().softmax(-1)
        before_target = torch.tensor(np.flatnonzero(scored) - 1)
        rows.append((p * (p / q).log()).sum(-1)[before_target])
        agreed.append((p.argmax(-1) == q.argmax(-1))[before_target])
    direct = torch.cat(rows).numpy()
    means = np.array([row.sum().item() for row in rows]) - direct.mean() * np.array([len(row) for row in rows])
    n = len(rows)
    assert found.kl_mean is not None
    assert found.kl_mean > 1e-4
    assert found.kl_mean == pytest.approx(direct.mean(), rel=1e-4)
    assert found.kl_p99 == pytest.approx(np.quantile(direct, 0.99), rel=1e-4)
    assert found.kl_se == pytest.approx(math.sqrt((means**2).sum() * n / (n - 1)) / len(direct), rel=1e-3)
    assert found.top1_agreement == torch.cat(agreed).double().mean().item() < 1


def test_standard_error_of_equal_windows_is_that_of_their_means(model: Any, text: np.ndarray) -> None:
    windows = token_windows(text, 100)
    found = evaluate(model, windows)
    means = [evaluate(model, part).nll_mean for part in single_windows(windows)]
    expected = found.perplexity * np.std(means, ddof=1) / math.sqrt(len(means))
    assert found.perplexity_se == pytest.approx(expected, rel=1e-5)


def single_windows(windows: Windows) -> list[Windows]:
    return [
        Windows(windows.ids[i : i + 1], windows.scored[i : i + 1], windows.protocol, windows.stride, windows.bos)
        for i in range(len(windows))
    ]


def test_budget_decides_how_many_windows_have_a_kl(model: Any, noised: Any, text: np.ndarray, tmp_path: Path) -> None:
    windows = token_windows(text, 100)
    row_bytes = 4096 * 4
    two = LogitCache.create(tmp_path / "two", model, "m", windows, budget_bytes=3 * 99 * row_bytes - 1)
    assert two is not None
    assert (two.windows, two.tokens, two.data.stat().st_size) == (2, 198, 198 * row_bytes)
    assert LogitCache.create(tmp_path / "none", model, "m", windows, budget_bytes=99 * row_bytes - 1) is None
    assert not (tmp_path / "none").exists()
    found = evaluate(noised, windows, two)
    assert (found.kl_tokens, found.scored_tokens) == (198, 7 * 99)
    full = evaluate(noised, windows, LogitCache.create(tmp_path / "all", model, "m", windows))
    assert found.perplexity == full.perplexity
    assert found.kl_mean != full.kl_mean


def test_cache_is_found_again_and_only_for_its_model_and_windows(model: Any, text: np.ndarray, tmp_path: Path) -> None:
    windows = token_windows(text, 100, count=2)
    cache = LogitCache.create(tmp_path, model, "m", windows)
    assert LogitCache.open(tmp_path, "m", windows) == cache
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logits.bin", "logits.json"]
    assert LogitCache.open(tmp_path, "other", windows) is None
    assert LogitCache.open(tmp_path, "m", token_windows(text, 100, count=3)) is None
    assert LogitCache.open(tmp_path / "missing", "m", windows) is None
    with pytest.raises(UsageError, match="other windows"):
        evaluate(model, token_windows(text, 100, count=3), cache)


def test_a_damaged_cache_is_refused(model: Any, text: np.ndarray, tmp_path: Path) -> None:
    windows = token_windows(text, 100, count=2)
    cache = LogitCache.create(tmp_path, model, "m", windows)
    assert cache is not None
    with cache.data.open("r+b") as file:
        file.truncate(cache.size_bytes - 4)
    with pytest.raises(FileFormatError, match="promised"):
        LogitCache.open(tmp_path, "m", windows)
    with pytest.raises(FileFormatError, match="shorter"):
        evaluate(model, windows, cache)
    header = json.loads((tmp_path / "logits.json").read_text())
    (tmp_path / "logits.json").write_text(json.dumps(header)[:-5])
    with pytest.raises(FileFormatError, match="not a header"):
        LogitCache.open(tmp_path, "m", windows)


def test_an_interrupted_cache_leaves_nothing(model: Any, text: np.ndarray, tmp_path: Path) -> None:
    def interrupt(done: int, of: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        LogitCache.create(tmp_path, model, "m", token_windows(text, 100), batch_tokens=100, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_an_output_error(model: Any, text: np.ndarray, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="cannot keep"):
        LogitCache.create(tmp_path / "file", model, "m", token_windows(text, 100, count=1))


class Table(torch.nn.Module):
    """Predicts the same distribution after every token, except the values of `bad` in the windows that hold token 7."""

    def __init__(self, log_probs: list[float], bad: float | None = None) -> None:
        super().__init__()
        self.row = torch.nn.Parameter(torch.tensor(log_probs))
        self.bad = bad

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        logits = self.row.expand(*input_ids.shape, -1).clone()
        if self.bad is not None:
            logits[(input_ids == 7).any(1), 1:2, 2] = self.bad
        return SimpleNamespace(logits=logits)


def test_known_answer(tmp_path: Path) -> None:
    p, q = [0.5, 0.25, 0.125, 0.125], [0.25, 0.25, 0.25, 0.25]
    windows = token_windows(np.array([0, 1, 2, 3, 0, 0, 0, 1]), 4)
    cache = LogitCache.create(tmp_path, Table([math.log(x) for x in p]), "m", windows)
    found = evaluate(Table([math.log(x) for x in q]), windows, cache)
    assert found.perplexity == pytest.approx(4)
    assert found.perplexity_se == pytest.approx(0, abs=1e-6)
    assert found.kl_mean == pytest.approx(0.25 * math.log(2))  # sum p log(p / q) = (0.5 - 0 - 0.125 - 0.125) log 2
    assert found.top1_agreement == 1  # of equals the first counts
    own = evaluate(Table([math.log(x) for x in p]), windows)
    assert own.nll_mean == pytest.approx((2 + 3 + 3 + 1 + 1 + 2) / 6 * math.log(2))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_predictions_that_are_not_finite(bad: float, tmp_path: Path) -> None:
    windows = token_windows(np.array([0, 1, 2, 3, 0, 7, 0, 1]) % 8, 4)
    broken = Table([0.0] * 8, bad)
    found = evaluate(broken, windows)
    assert found.perplexity == math.inf
    assert found.kl_mean is None
    assert found.note is not None
    assert "window 1 of 2" in found.note
    with pytest.raises(NumericError, match="window 1"):
        LogitCache.create(tmp_path, broken, "m", windows)
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_is_ruled_out_makes_the_perplexity_infinite() -> None:
    found = evaluate(Table([0.0, 0.0, -math.inf, 0.0]), token_windows(np.array([0, 1, 2, 3]), 4))
    assert found.perplexity == math.inf


def test_kl_ignores_what_the_float_model_rules_out() -> None:
    p = torch.tensor([[0.0, -math.inf]])
    q = torch.tensor([[math.log(0.5), math.log(0.5)]])
    assert kl_divergence(p, q).item() == pytest.approx(math.log(2))


def test_progress_and_small_chunks(model: Any, text: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    windows = token_windows(text, 100, count=3)
    seen: list[tuple[int, int]] = []
    whole = evaluate(model, windows, batch_tokens=200, progress=lambda done, of: seen.append((done, of)))
    assert seen == [(2, 3), (3, 3)]
    monkeypatch.setattr(quality, "CHUNK_VALUES", 7 * 4096)
    assert evaluate(model, windows).perplexity == pytest.approx(whole.perplexity, rel=1e-6)


def test_half_precision_is_scored_in_float32(model: Any, text: np.ndarray) -> None:
    windows = token_windows(text, 100, count=3)
    found = evaluate(copy.deepcopy(model).to(torch.bfloat16), windows)
    assert found.perplexity == pytest.approx(evaluate(model, windows).perplexity, rel=0.02)


def test_published_perplexity_of_the_model_that_ships(model: Any) -> None:
    path = Path(__file__).parents[2].parent / "shared" / "data" / "text" / "stdlib" / "held.bin"
    if not path.is_file():
        pytest.skip("the held-out token ids are not beside this checkout")
    ids = np.fromfile(path, dtype="<u2").astype(np.int64)
    assert evaluate(model, token_windows(ids, 512, count=100)).perplexity == pytest.approx(18.41, abs=0.005)
