"""From one project's container to another's and back: exact where both hold the same values, and otherwise a loss that we measure
and say. Both ends are decoded by other people's code (decoders.py), and the loss is computed from those floats anew."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from decoders import decoded
from readers import MODELS, reader

from nybble.containers import find_container, open_contents
from nybble.convert import Conversion, convert
from nybble.files.safetensors import SafetensorsFile

GPT2, _, QWEN2, QWEN3 = MODELS
V2 = {"checkpoint_format": "gptq_v2"}
Step = tuple[str, str | None]
"""(container, format to ask for)."""
EXACT: list[tuple[str, list[Step]]] = [
    (GPT2, [("gptq", "int4:g64"), ("gguf", None), ("gptq", "int4:g64")]),
    (QWEN2, [("awq", "int4:g64,asym"), ("nybble", None), ("gptq", None)]),
    (QWEN2, [("awq", "int4:g128,asym"), ("gguf", None)]),
    (QWEN3, [("gptq", "int4:g128"), ("awq", None), ("compressed-tensors", None), ("gptq", None)]),
    (QWEN3, [("compressed-tensors", "int4:g32"), ("gguf", None), ("nybble", None), ("gguf", None)]),
    (QWEN3, [("gptq", "int2:g32"), ("gguf", None), ("gptq", "int2:g32")]),
    (GPT2, [("bitsandbytes", "nf4:g64,dq"), ("nybble", None), ("bitsandbytes", None)]),
    (GPT2, [("gguf", "mxfp4"), ("nybble", None), ("gguf", None)]),
    (QWEN2, [("gguf", "q4_k_m"), ("nybble", None), ("gguf", None)]),
]
LOSSY: list[tuple[str, Step, Step, float]] = [
    # from, to, and the share of the squares that may be lost: twice what was measured
    (GPT2, ("gguf", "q4_k"), ("gptq", "int4:g32,asym"), 0.013),
    (GPT2, ("gguf", "q6_k"), ("gptq", "int8:g32"), 0.00006),
    (QWEN2, ("gguf", "q4_k_m"), ("gptq", "int8:g32,asym"), 0.00005),
    (QWEN2, ("bitsandbytes", "nf4:g64"), ("gguf", "q4_0"), 0.016),
    (QWEN3, ("bitsandbytes", "nf4:g64"), ("gguf", "iq4_nl"), 0.009),
    (QWEN3, ("compressed-tensors", "int8:channel"), ("gguf", None), 0.0000001),
    (GPT2, ("gptq", "int4:g128,asym"), ("bitsandbytes", "nf4:g128"), 0.022),
    (QWEN3, ("gguf", "q8_0"), ("bitsandbytes", "int8:channel"), 0.00009),
]


def step(start: Path, target: Path, container: str, spec: str | None) -> tuple[Path, Conversion]:
    path = target if find_container(container).FOLDER else target.with_suffix(".gguf")
    return path, convert(start, path, container, spec, options=V2 if container == "gptq" else {})


@pytest.mark.parametrize(("model", "steps"), EXACT)
def test_exact(model: str, steps: list[Step], source: Callable[[str], Path], tmp_path: Path) -> None:
    path, first = source(model), None
    for i, (container, spec) in enumerate(steps):
        path, done = step(path, tmp_path / f"step{i}", container, spec)
        assert i == 0 or done.error == 0, container
        values = {name: open_contents(path).read_packed(name).decode() for name in open_contents(path).packed}
        if container == "nybble":
            continue
        found = decoded(path)
        first = first or found
        for name in first.keys() & found.keys():
            np.testing.assert_array_equal(found[name], first[name], err_msg=f"{container}: {name}")
            np.testing.assert_array_equal(values[name], found[name])
        assert len(first.keys() & found.keys()) >= 8
    if steps[-1][0] == steps[0][0]:
        back, start = (stored(folder, first) for folder in (path, (tmp_path / "step0").with_suffix(path.suffix)))
        assert back
        assert back == start


def stored(path: Path, packed: Iterable[str]) -> dict[str, bytes]:
    """The bytes of all parts of the packed weights; biases, which GGUF has in float32, are none."""
    if path.is_file():
        return {tensor.name: tensor.data.tobytes() for tensor in reader("gguf").GGUFReader(path).tensors}
    file = SafetensorsFile(path / "model.safetensors")
    modules = tuple(name.removesuffix("weight") for name in packed)
    return {name: file.read(name).tobytes() for name in file.entries if name.startswith(modules) and not name.endswith(".bias")}


@pytest.mark.parametrize(("model", "first", "second", "most"), LOSSY)
def test_loss_is_what_was_said(
    model: str, first: Step, second: Step, most: float, source: Callable[[str], Path], tmp_path: Path
) -> None:
    start, _ = step(source(model), tmp_path / "first", *first)
    end, done = step(start, tmp_path / "second", *second)
    before, after = decoded(start), decoded(end)
    said = {one.name: one for one in done.steps}
    compared = 0
    for name in before.keys() & after.keys():
        old, new = before[name].astype(np.float64), after[name].astype(np.float64)
        loss = np.square(new - old).sum() / np.square(old).sum()
        assert said[name].error == pytest.approx(loss, rel=1e-4, abs=1e-13), name
        assert said[name].exact == np.array_equal(old, new)
        compared += 1
    assert compared >= 8
    assert 0 < done.error <= most, done.error
