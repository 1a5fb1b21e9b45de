"""The specification itself: each operation against torch, and the numpy path as a decoder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from nybble.engine import Decoder, reference
from nybble.engine.program import Attend, Linear, Matrix, Norm, Program
from nybble.engine.runner import ReferenceRunner

random = np.random.default_rng(0)


def vectors(**values: Any) -> Callable[[str], Any]:
    return lambda name: values[name.replace(".", "_")]


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("gelu", functional.gelu),
        ("gelu_tanh", lambda x: functional.gelu(x, approximate="tanh")),
        ("gelu_quick", lambda x: x * torch.sigmoid(1.702 * x)),
        ("silu", functional.silu),
        ("relu", functional.relu),
        ("none", lambda x: x),
    ],
)
def test_activations(name: str, same: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = np.linspace(-12, 12, 2001).reshape(3, -1)
    np.testing.assert_allclose(reference.activate(x, name), same(torch.from_numpy(x)).numpy(), rtol=1e-9, atol=1e-12)


def test_norms() -> None:
    x, gain, bias = random.normal(size=(5, 48)) * 3 + 1, random.normal(size=48), random.normal(size=48)
    layer = reference.norm(Norm("", "", True, 1e-5, "n", True), x, vectors(n_weight=gain, n_bias=bias))
    np.testing.assert_allclose(layer, functional.layer_norm(torch.tensor(x), (48,), torch.tensor(gain), torch.tensor(bias), 1e-5))
    rms = reference.norm(Norm("", "", False, 1e-6, "n", False, 1.0), x, vectors(n_weight=gain))
    np.testing.assert_allclose(rms, functional.rms_norm(torch.tensor(x), (48,), torch.tensor(1 + gain), 1e-6))


def test_linear_layers_side_by_side_and_gated() -> None:
    x = random.normal(size=(3, 8))
    weights = {name: random.normal(size=(4, 8)).astype(np.float32) for name in "ab"}
    bias = random.normal(size=4).astype(np.float32)
    matrices = (Matrix("a", bias=True), Matrix("b"))
    first, second = x @ weights["a"].T.astype(float) + bias, x @ weights["b"].T.astype(float)
    beside = reference.linear(Linear("", "", matrices, "relu"), x, lambda m: weights[m.name], vectors(a_bias=bias))
    np.testing.assert_allclose(beside, np.maximum(np.concatenate([first, second], 1), 0))
    gated = reference.linear(Linear("", "", matrices, "silu", gated=True), x, lambda m: weights[m.name], vectors(a_bias=bias))
    np.testing.assert_allclose(gated, first / (1 + np.exp(-first)) * second)


def test_rotation_turns_pairs_and_leaves_the_rest() -> None:
    x = random.normal(size=(4, 2, 10))
    turned = reference.rotate(x, (1.0, 0.25, 0.01))
    np.testing.assert_allclose(turned[0], x[0])
    np.testing.assert_array_equal(turned[..., 6:], x[..., 6:])
    pairs, after = x[..., :3] + 1j * x[..., 3:6], turned[..., :3] + 1j * turned[..., 3:6]
    angle = np.arange(4)[:, None, None] * np.array([1.0, 0.25, 0.01])
    np.testing.assert_allclose(after, pairs * np.exp(1j * angle), rtol=1e-6)
    assert reference.rotate(x, ()) is x


@pytest.mark.parametrize(("window", "cap"), [(0, 0.0), (3, 0.0), (0, 2.0), (4, 1.5)])
def test_attention_by_hand(window: int, cap: float) -> None:
    """Loops over heads and positions, with two query heads to a key head."""
    heads, shared, size, count = 4, 2, 6, 9
    operation = Attend(0, heads, shared, size, (), 0.4, cap, window, "", "", 1e-6, 0.0)
    x = random.normal(size=(count, (heads + 2 * shared) * size))
    got = reference.attend(operation, x, vectors())
    for head in range(heads):
        at = head // 2
        keys = x[:, (heads + at) * size : (heads + at + 1) * size]
        values = x[:, (heads + shared + at) * size : (heads + shared + at + 1) * size]
        for i in range(count):
            first = max(0, i + 1 - window) if window else 0
            score = 0.4 * keys[first : i + 1] @ x[i, head * size : (head + 1) * size]
            if cap:
                score = cap * np.tanh(score / cap)
            weights = np.exp(score) / np.exp(score).sum()
            np.testing.assert_allclose(got[i, head * size : (head + 1) * size], weights @ values[first : i + 1], rtol=1e-9)


SCRIPT = """
import json, sys
import numpy as np
from nybble import kernels
from nybble.engine import Decoder
decoder = Decoder.load(sys.argv[1], threads=1, exact=True)
ids = json.loads(sys.argv[2])
new = decoder.generate(ids, max_new_tokens=5, stop_tokens=())
batch = decoder.generate_batch([ids[:4], ids], max_new_tokens=5, stop_tokens=())
try:
    decoder.generate([97])
except Exception as error:
    refused = type(error).__name__
print(json.dumps([kernels.instruction_set(), decoder.logits(ids).tolist(), new, batch, refused]))
"""


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "gemma"])
def test_without_the_extension_numpy_decodes(
    name: str,
    tiny: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    python_script: Callable[..., str],
    environment: dict[str, str],
) -> None:
    import nybble

    folder = nybble.quantize(tiny(name), "int4:g32").save(tmp_path / "model")
    ids = np.random.default_rng(1).integers(3, 97, 10).tolist()
    monkeypatch.setitem(environment, "NYBBLE_KERNELS", "reference")
    ran, logits, new, batch, refused = json.loads(python_script(SCRIPT, folder, json.dumps(ids)))
    assert (ran, refused) == ("reference", "InputError")
    decoder = Decoder.load(folder, threads=1, exact=True)
    np.testing.assert_allclose(decoder.logits(ids), logits, rtol=0, atol=1e-5 * np.abs(logits).max())
    assert decoder.generate(ids, max_new_tokens=5, stop_tokens=()) == new
    assert batch == [decoder.generate(prompt, max_new_tokens=5, stop_tokens=()) for prompt in (ids[:4], ids)]


def test_the_numpy_runner_forgets_what_is_written_again(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []

    def logits(program: Program, ids: Any, *weights: Any) -> Any:
        seen.append(ids.tolist())
        return np.zeros((len(ids), program.vocabulary), dtype=np.float32)

    monkeypatch.setattr(reference, "logits", logits)
    runner = ReferenceRunner(Program((), 3, 8), SimpleNamespace(vector=None))  # type: ignore[arg-type]
    runner.reserve(2, 8)
    rows = [np.array(values) for values in ([5, 6, 7, 8], [0, 1, 0, 2], [0, 0, 1, 0], [1, 2, 3])]
    assert runner.run(*rows).shape == (3, 3)
    runner.run(np.array([9]), np.array([1]), np.array([0]), np.array([0]))
    assert seen == [[5, 6], [7], [5, 6, 8], [5, 9]]
