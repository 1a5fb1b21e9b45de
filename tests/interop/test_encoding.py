"""Our codes beside those of ggml's own C code, as llama-cpp-python brings it: the same where ggml rounds, and never a larger
error where it searches. Its library is called as llama.cpp calls it (ggml_quantize_chunk)."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from ggml_layout import SIZES, pack, unpack
from ggml_library import Ggml, find
from numpy.typing import NDArray
from readers import DATA, reader

from nybble import demo
from nybble.containers import open_contents
from nybble.files.safetensors import SafetensorsFile
from nybble.formats import QTensor, parse_format

reader("llama_cpp")
ROUNDED = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "mxfp4")
SEARCHED = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs")
WEIGHTS = 8 << 20
UNDEFINED = 1e-36
"""Blocks of smaller weights have steps whose inverse is no float32; their scale is 0, their codes the compiler's choice."""
Weight = NDArray[np.float32]


@pytest.fixture(scope="module")
def ggml() -> Ggml:
    path = find()
    assert path is not None, "llama-cpp-python is installed without libggml-base"
    return Ggml(path)


def edges() -> Weight:
    """Blocks of 32 where rounding is decided by a hair, or by a rule: zeros of both signs, one weight alone, all the same, ties
    halfway between codes, two largest of opposite sign, numbers so small that a scale is no normal float16, or none at all, and
    the largest for which there is a scale."""
    rng = np.random.default_rng(1)
    found: list[Weight] = [np.zeros(32, np.float32), np.full(32, -0.0, np.float32)]
    for size in (2.0**-149, 1e-38, 1e-20, 2.0**-24, 6e-8, 6e-5, 1e-3, 1.0, 448.0, 60000.0):
        for place in (0, 15, 16, 31):
            alone = np.zeros(32, np.float32)
            alone[place] = -size
            found += [alone, -alone]
        found += [np.full(32, size, np.float32), np.full(32, -size, np.float32)]
        found += [
            np.where(np.arange(32) % 2, size, -size).astype(np.float32),
            np.where(np.arange(32) == 7, -size, size).astype(np.float32),
        ]
        for steps in (7, 8, 15, 16, 31, 127):  # whole and half steps of a scale
            whole = rng.integers(-2 * steps, 2 * steps + 1, (16, 32)).astype(np.float32) / 2
            whole[:, 0] = -steps
            found += list((whole * np.float32(size / steps)).astype(np.float32))
            found += list((-whole * np.float32(size / steps)).astype(np.float32))
    found += list((rng.standard_normal((64, 32)) * 2.0 ** rng.integers(-140, 16, (64, 1))).astype(np.float32))
    return np.stack(found).reshape(1, -1).astype(np.float32)


@pytest.mark.parametrize("spec", ROUNDED)
def test_the_same_codes(spec: str, ggml: Ggml) -> None:
    """8 M random weights of every size, the edges, and a real matrix."""
    if ggml.fuses_products():
        pytest.skip("this build of ggml rounds a product and a sum at once; nybble follows the one that rounds twice")
    rng = np.random.default_rng(0)
    rows = WEIGHTS // 4096
    sizes = np.exp(rng.uniform(-12, 6, (rows, 1))).astype(np.float32)
    samples = [rng.standard_normal((rows, 4096), dtype=np.float32) * sizes, edges(), matrices()[0][1]]
    fmt = parse_format(spec)
    for weight in samples:
        theirs = ggml.block_bytes(spec, weight)
        finite = np.isfinite(ggml.decode(spec, theirs)).all()
        if not finite:  # ggml writes an infinite scale where we refuse: the largest blocks are left out
            usable = np.isfinite(ggml.decode(spec, theirs)).reshape(-1, 32).all(1)
            weight = np.ascontiguousarray(weight.reshape(-1, 32)[usable].reshape(1, -1))
            theirs = ggml.block_bytes(spec, weight)
            assert usable.mean() > 0.9
        codes, params = fmt.round(weight)
        ours = pack(spec, codes, params)
        largest = np.abs(weight).reshape(*ours.shape[:2], 32).max(-1)
        undefined = (largest > 0) & (largest < UNDEFINED)
        wrong = np.argwhere((ours != theirs).any(-1) & ~undefined)
        if wrong.size:
            row, block = wrong[0]
            at = weight[row, 32 * block : 32 * block + 32]
            pytest.fail(f"{len(wrong)} of {theirs.shape[0] * theirs.shape[1]} blocks; the first: {at.tolist()}")
        np.testing.assert_array_equal(QTensor(fmt, codes, params).decode(), ggml.decode(spec, theirs))


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


@pytest.mark.parametrize("spec", SIZES)
def test_the_same_values(spec: str, ggml: Ggml) -> None:
    """Every byte of a block at every place, and blocks of random bytes: decoded alike. Scales that are no finite floats, which we
    refuse to read, are left out."""
    _, columns, size = SIZES[spec]
    rng = np.random.default_rng(2)
    blocks = rng.integers(0, 256, (1 << 15, size), dtype=np.uint8)
    every = np.tile(blocks[:1], (256 * size, 1))
    every[np.arange(len(every)), np.arange(len(every)) // 256] = np.arange(len(every)) % 256
    halves = {"q2_k": (80, 82), "q3_k": (108,), "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,), "q4_1": (0, 2), "q5_1": (0, 2)}
    scales = np.arange(1 << 16, dtype="<u2").view(np.uint8).reshape(-1, 2)  # every float16 for every scale
    parts = [blocks, every]
    for at in halves.get(spec, (0,)):
        swept = np.tile(blocks[: 1 << 6], (1 << 10, 1))
        swept[:, at : at + 2] = scales
        parts.append(swept)
    all_blocks = np.concatenate(parts)[None]
    theirs = ggml.decode(spec, all_blocks)
    finite = np.isfinite(theirs).reshape(-1, columns).all(1)
    all_blocks = np.ascontiguousarray(all_blocks[:, finite])
    codes, params = unpack(spec, all_blocks)
    ours = QTensor(parse_format(spec), codes, params).decode()
    np.testing.assert_array_equal(ours, ggml.decode(spec, all_blocks))
