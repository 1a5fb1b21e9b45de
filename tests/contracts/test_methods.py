"""The contract of a method: with every format that it accepts, on every architecture, it gives codes that are no worse than
rounding to nearest, the same with one thread or two, and the folder holds them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import nybble
from nybble.errors import InputError, UsageError
from nybble.formats import parse_format
from nybble.methods import method_names, parse_method
from nybble.quantized import Quantized

FORMATS = (
    "int8:channel", "int4:g32", "nf4:g64,dq", "int3:g64", "int8:tensor,asym", "nf4:g64", "int4:g64,asym", "fp4:g32", "int2:g32",
)  # fmt: skip
ARCHITECTURES = ("gpt2", "llama", "qwen3", "opt", "bert")
WINDOWS = np.random.default_rng(0).integers(3, 97, (6, 40))
SETTINGS_OF_GPTQ = {"gptaq", "qep", "qronos", "guided", "magnitude", "wanda", "sparsegpt"}
"""These differ from gptq by a number or a mask; two architectures do for every run of the tests."""
FEWER_STEPS = {"best": "best:tune=2", "tune": "tune:tune=2:block_tune=2"}


pytestmark = pytest.mark.usefixtures("one_thread")


def same_files(one: Path, other: Path) -> bool:
    return (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def cases() -> list[Any]:
    """(method, architecture, formats): a third of the formats each, in turn, so that a method meets all; the others slow."""
    found = []
    for name in method_names():
        for i, architecture in enumerate(ARCHITECTURES):
            for third in range(3):
                quick = third == i % 3 and (i < 2 or name not in SETTINGS_OF_GPTQ)
                mark = () if quick else pytest.mark.slow
                found.append(pytest.param(name, architecture, FORMATS[third::3], marks=mark, id=f"{name}-{architecture}-{third}"))
    return found


@pytest.mark.parametrize(("name", "architecture", "formats"), cases())
def test_every_format(
    name: str, architecture: str, formats: tuple[str, ...], tiny: Callable[..., Any], ids: torch.Tensor, logits: Any
) -> None:
    model = tiny(architecture)
    expected = logits(model, ids)
    any_levels = parse_method(name).settings.activations == "float"
    prunes = parse_method(name).settings.prunes
    for spec in formats:
        if prunes and "asym" in spec:
            with pytest.raises(UsageError, match=rf"format {spec} has offsets"):
                nybble.quantize(model, spec, name, WINDOWS)
            continue
        if not any_levels and not spec.startswith("int"):
            with pytest.raises(UsageError, match=rf"method {name} multiplies integers: {spec} has none; use int8:channel"):
                nybble.quantize(model, spec, name, WINDOWS)
            continue
        quantized = nybble.quantize(model, spec, FEWER_STEPS.get(name, name), WINDOWS)
        assert {str(tensor.format) for tensor in quantized.tensors.values()} == {spec}
        got = logits(quantized.model(), ids)
        assert torch.isfinite(got).all()
        if spec.startswith("int8") and not prunes:
            assert float((got - expected).abs().max()) < 0.2 * float(expected.abs().max())
        if parse_method(name).settings.hessian:
            assert set(quantized.accounts) == set(quantized.tensors)
            for weight, account in quantized.accounts.items():
                no_worse = account.loss <= account.loss_of_rounding * (1 + 1e-6)
                assert no_worse or prunes or parse_method(name).settings.target, weight
    torch.testing.assert_close(logits(model, ids), expected, rtol=0, atol=0)  # the model given is left as it was


GGML = ("q4_k", "q4_1", "q3_k", "q4_0", "iq4_xs", "q5_k", "mxfp4", "q6_k", "iq4_nl", "q2_k", "q5_0", "q8_0", "q5_1")


def ggml_cases() -> list[Any]:
    """(method, formats): two formats with every method, in turn; the others slow."""
    found = []
    for i, name in enumerate(method_names()):
        turn = GGML[2 * i % len(GGML) :] + GGML[: 2 * i % len(GGML)]
        found += [
            pytest.param(name, turn[:2], id=name),
            pytest.param(name, turn[2:], marks=pytest.mark.slow, id=f"{name}-others"),
        ]
    return found


@pytest.fixture(scope="module")
def wide() -> Any:
    """One block of GPT-2 whose rows are whole runs of ggml's formats: 256 and 1024 columns."""
    settings = {"vocab_size": 97, "n_positions": 64, "n_embd": 256, "n_layer": 1, "n_head": 4}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(**settings, bos_token_id=1, eos_token_id=2)).eval()


@pytest.mark.parametrize(("name", "formats"), ggml_cases())
def test_formats_of_ggml(name: str, formats: tuple[str, ...], wide: Any, ids: torch.Tensor, logits: Any) -> None:
    expected = logits(wide, ids)
    method = parse_method(name)
    for spec in formats:
        if method.settings.activations != "float" and not spec.startswith("q"):
            with pytest.raises(UsageError, match="multiplies integers"):
                nybble.quantize(wide, spec, name, WINDOWS)
            continue
        if method.settings.prunes and (parse_format(spec).shifted or 0.0 not in parse_format(spec).levels):
            with pytest.raises(UsageError, match=rf"format {spec} has offsets, or no level at zero"):
                nybble.quantize(wide, spec, name, WINDOWS)
            continue
        quantized = nybble.quantize(wide, spec, FEWER_STEPS.get(name, name), WINDOWS)
        assert {str(tensor.format) for tensor in quantized.tensors.values()} == {spec}
        error = float((logits(quantized.model(), ids) - expected).abs().max() / expected.abs().max())
        assert error < (0.1 if spec == "q8_0" and not method.settings.prunes else 1.5)
        for weight, account in quantized.accounts.items():
            no_worse = account.loss <= account.loss_of_rounding * (1 + 1e-6)
            assert no_worse or method.settings.prunes or method.settings.target, weight
            assert account.loss > 0
    torch.testing.assert_close(logits(wide, ids), expected, rtol=0, atol=0)


def test_feedback_pays_in_runs_of_256_columns(wide: Any) -> None:
    """The multipliers of a run are fitted before the loop and stay; the codes still make up for each other's errors."""
    for spec in ("q4_k", "q3_k", "iq4_xs"):
        accounts = nybble.quantize(wide, spec, "gptq", WINDOWS).accounts.values()
        assert sum(a.loss for a in accounts) < 0.6 * sum(a.loss_of_rounding for a in accounts)


@pytest.mark.parametrize("method", ["gptq", "gptq:inputs=float", "guided:bias", "best:tune=2:block_tune=2:norms:bias"])
def test_one_thread_or_two_the_same_bytes(method: str, tiny: Callable[..., Any], tmp_path: Path) -> None:
    def made(threads: int, name: str) -> Path:
        torch.set_num_threads(threads)
        try:
            return nybble.quantize(tiny("llama"), "int3:g32", method, WINDOWS).save(tmp_path / name)
        finally:
            torch.set_num_threads(1)

    one, two, again = made(1, "one"), made(2, "two"), made(2, "again")
    assert same_files(one, two)
    assert same_files(two, again)


@pytest.mark.parametrize("method", ["best:tune=2", "gptq:bias", "tune:tune=2:block_tune=2"])
@pytest.mark.parametrize("architecture", ["gpt2", "qwen3"])
def test_a_calibrated_folder_computes_what_was_made(
    architecture: str, method: str, tiny: Callable[..., Any], ids: torch.Tensor, logits: Any, tmp_path: Path
) -> None:
    model = tiny(architecture)
    before = {name: value.clone() for name, value in model.named_parameters()}
    quantized = nybble.quantize(model, "int4:g32", method, WINDOWS)
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]), f"{name} of the model given was changed"
    still = {name for name, value in quantized.model().named_parameters() if torch.equal(value, before[name])}
    moved = quantized.provenance.get("moved", {"biases": 0, "norms": 0})
    assert (moved["biases"] > 0) == (architecture == "gpt2" and "best" not in method)
    assert (moved["norms"] > 0) == ("tune:" in method)
    assert (still == {name for name in before if name in dict(quantized.model().named_parameters())}) == (not any(moved.values()))
    loaded = nybble.load(quantized.save(tmp_path / "m"))
    torch.testing.assert_close(logits(loaded.model(), ids), logits(quantized.model(), ids), rtol=0, atol=0)
    assert loaded.provenance["method"] == str(parse_method(method))


def test_calibration_pays(tiny: Callable[..., Any], logits: Any) -> None:
    """KL to the float model on tokens that calibration saw: searched scales, then feedback, then all of it."""
    model = tiny("llama")
    ids = torch.from_numpy(WINDOWS)
    p = logits(model, ids).log_softmax(-1)

    def kl(quantized: Quantized) -> float:
        q = logits(quantized.model(), ids).log_softmax(-1)
        return float((p.exp() * (p - q)).sum(-1).mean())

    found = [kl(nybble.quantize(model, "int3:g32", method, WINDOWS)) for method in ("rtn", "gptq", "best:tune=20")]
    assert found[1] < 0.8 * found[0]
    assert found[2] < 0.8 * found[1]


def test_a_method_that_reads_text_says_so(tiny: Callable[..., Any]) -> None:
    with pytest.raises(UsageError, match="method gptq reads calibration text; give some"):
        nybble.quantize(tiny("gpt2"), "int4:g32", "gptq")


def test_windows_beyond_the_vocabulary_are_refused(tiny: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match="the model has 97 tokens"):
        nybble.quantize(tiny("gpt2"), "int4:g32", "gptq", WINDOWS + 90)


def test_windows_longer_than_the_context_are_refused(tiny: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match="longer than the model's context of 64"):
        nybble.quantize(tiny("gpt2"), "int4:g32", "gptq", np.full((2, 65), 5))


def test_encoders_are_not_tuned_without_predictions(tiny: Callable[..., Any]) -> None:
    with pytest.raises(UsageError, match="use tune=0"):
        nybble.quantize(tiny("bert").bert, "int3:g32", "best", WINDOWS)
    assert nybble.quantize(tiny("bert").bert, "int3:g32", "best:tune=0", WINDOWS).accounts
