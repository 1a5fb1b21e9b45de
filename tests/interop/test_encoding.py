"""Real weights encoded by us and by ggml's own C code, as llama-cpp-python brings it: the same bytes where ggml rounds, and never
a larger error where it searches. Its library is called as llama.cpp calls it (ggml_quantize_chunk)."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from ggml_layout import SIZES, pack
from ggml_library import Ggml, find
from numpy.typing import NDArray
from readers import DATA, reader

from nybble import demo
from nybble.containers import open_contents
from nybble.files.safetensors import SafetensorsFile
from nybble.formats import QTensor, parse_format

reader("llama_cpp")
SEARCHED = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs")
"""Formats whose params ggml searches too; tests/formats has random weights, edges and decoding of all of them."""
Weight = NDArray[np.float32]


@pytest.fixture(scope="module")
def ggml() -> Ggml:
    path = find()
    assert path is not None, "llama-cpp-python is installed without libggml-base"
    return Ggml(path)


@pytest.mark.parametrize("spec", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "mxfp4"])
def test_real_weights_are_rounded_alike(spec: str, ggml: Ggml) -> None:
    """Every byte, with blocks of zeros of all signs among the weights."""
    if ggml.fuses_products():
        pytest.skip("this build of ggml rounds a product and a sum at once; nybble follows the one that rounds twice")
    rng, fmt = np.random.default_rng(1), parse_format(spec)
    zeros = np.where(rng.random((1024, 32)) < rng.random((1024, 1)), np.float32(-0.0), np.float32(0))
    for name, weight in [("zeros", zeros.reshape(8, -1)), *matrices()]:
        if weight.shape[1] % 32 == 0:
            codes, params = fmt.round(weight)
            np.testing.assert_array_equal(pack(spec, codes, params), ggml.block_bytes(spec, weight), err_msg=name)


@cache
def matrices() -> list[tuple[str, Weight]]:
    """Every matrix of the model that ships and of the real models that are there, [out, in]."""
    found = []
    for folder in (demo.model_folder(), DATA / "models" / "stories260k-llama"):
        contents = open_contents(folder) if folder.exists() else None
        for name, (_, shape) in contents.floats.items() if contents else ():
            if len(shape) == 2:
                values = contents.float32(name)
                found.append((f"{folder.name}: {name}", np.ascontiguousarray(values.T if ".h." in name else values)))
    partial = DATA / "models" / "gpt2-small-attention-partial" / "model.safetensors"
    file = SafetensorsFile(partial) if partial.exists() else None
    for name, entry in file.entries.items() if file else ():
        if len(entry.shape) == 2:
            values = np.asarray(file.read(name), np.float32)
            found.append((f"gpt2-small: {name}", np.ascontiguousarray(values if "wpe" in name else values.T)))
    return found


def importance_of(weight: Weight) -> Weight:
    """Mean squares of inputs as a model has them: a few columns count for hundreds of times as much as most."""
    rng = np.random.default_rng(weight.shape[1])
    return np.exp(rng.standard_normal(weight.shape[1]) * 1.5).astype(np.float32)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "importance"])
@pytest.mark.parametrize("spec", SEARCHED)
def test_no_larger_error(spec: str, weighted: bool, ggml: Ggml) -> None:
    """The squared error, weighted by importance, of every real matrix."""
    fmt, worse, tried = parse_format(spec), {}, 0
    for name, weight in matrices():
        if weight.shape[1] % SIZES[spec][1]:
            continue
        importance = importance_of(weight) if weighted else None
        theirs = ggml.decode(spec, ggml.block_bytes(spec, weight, importance))
        ours = QTensor(fmt, *fmt.round(weight, importance)).decode()
        weighing = np.ones(weight.shape[1]) if importance is None else importance.astype(np.float64)
        mine, his = (float((np.square(found.astype(np.float64) - weight) * weighing).sum()) for found in (ours, theirs))
        tried += 1
        if mine > his:
            worse[name] = round(mine / his, 4)
    assert tried >= 26
    assert not worse
