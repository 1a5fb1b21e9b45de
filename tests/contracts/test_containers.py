"""The contract of a container: what is written reads back with every code, is the same bytes when it is written again, and
computes the same in the engine and in torch, for every container by name and every architecture that it holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import nybble
from nybble.containers import KINDS, container_names, find_container, open_contents
from nybble.containers.contents import Contents
from nybble.containers.saving import digest_of
from nybble.convert import convert
from nybble.converting import kind_of
from nybble.engine import Decoder
from nybble.errors import InputError, UsageError
from nybble.formats import format_names, parse_format

MODELS = ("gpt2", "gpt2-untied", "llama", "llama-tied", "mistral", "qwen2", "qwen3")
CONTAINERS = container_names()
TO = {
    "nybble": ("nf4:g64,dq", "q5_0", "int3:g32,asym"),
    "nybble-sparse": ("int4:g64", "int2:channel", "nf4:g64,dq"),
    "gguf": ("q4_0", "q5_1", "q8_0", "fp16"),
    "gptq": ("int4:g64", "int8:g32,asym"),
    "awq": ("int4:g32,asym", "int4:g64"),
    "compressed-tensors": ("int4:g32", "int8:channel"),
    "bitsandbytes": ("nf4:g64", "fp4:g64,dq", "int8:channel"),
    "float": ("bf16", "fp32"),
}
"""Formats that each container is tried with."""
ONLY_LINEAR = ("awq", "compressed-tensors")
"""Containers whose readers put packed weights into Linear layers alone: not into GPT-2's Conv1D."""

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., Any]) -> Callable[[str], Path]:
    root, made = tmp_path_factory.mktemp("sources"), {}

    def make(name: str) -> Path:
        if name not in made:
            tiny(name).save_pretrained(root / name)
            made[name] = root / name
        return made[name]

    return make


def path_in(folder: Path, container: str, name: str) -> Path:
    return folder / (name if find_container(container).FOLDER else f"{name}.gguf")


def bytes_of(path: Path) -> dict[str, bytes]:
    return {"": path.read_bytes()} if path.is_file() else {file.name: file.read_bytes() for file in path.iterdir()}


def digests(contents: Contents) -> dict[str, Any]:
    packed = {name: digest_of(contents.read_packed(name)) for name in contents.packed}
    return packed | {name: contents.read_float(name).tobytes() for name in contents.floats}


@pytest.mark.parametrize("container", CONTAINERS)
def test_what_a_module_says_of_itself(container: str) -> None:
    module = find_container(container)
    assert container == module.NAME
    assert module.HOLDS
    assert isinstance(module.FOLDER, bool)
    for values, words in module.OPTIONS.values():
        assert values
        assert words
    for name in format_names():
        fmt = parse_format(name)
        for kind in KINDS:
            for spec in module.candidates(fmt, (256, 256), kind):
                assert str(parse_format(spec)) == spec


@pytest.mark.parametrize("container", CONTAINERS)
def test_every_container_is_tried(container: str) -> None:
    assert TO[container]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("container", "to"), [(container, to) for container in CONTAINERS for to in TO[container]])
def test_written_read_written(
    container: str, to: str, model: str, source: Callable[[str], Path], tmp_path: Path, ids: torch.Tensor
) -> None:
    first, second = path_in(tmp_path, container, "first"), path_in(tmp_path, container, "second")
    if container in ONLY_LINEAR and model.startswith("gpt2"):
        with pytest.raises(UsageError, match="Linear"):
            convert(source(model), first, container, to)
        assert not first.exists()
        return
    convert(source(model), first, container, to)
    again = convert(first, second, container)
    assert not again.changed
    assert bytes_of(first) == bytes_of(second)

    contents = open_contents(first)
    assert contents.container == container
    if container != "float" and to != "fp16":
        assert contents.packed
        linear = {spec for name, (spec, _) in contents.packed.items() if kind_of(contents, name) == "linear"}
        assert to in linear
    # into our own folder and back: nothing is lost on the way
    ours, back = tmp_path / "ours", path_in(tmp_path, container, "back")
    assert not convert(first, ours, "nybble" if contents.packed else "float").changed
    assert not convert(ours, back, container).changed
    assert digests(open_contents(back)) == digests(contents)

    # the engine and torch compute what our own folder computes
    tokens = ids[0].tolist()
    if contents.schemes and next(iter(contents.schemes.values())).scheme == "outliers":  # LLM.int8 is torch's to compute
        with pytest.raises(InputError, match="scheme outliers"):
            Decoder.load(first)
        with torch.inference_mode():
            same = [nybble.load(path).model()(input_ids=ids).logits for path in (first, ours)]
        assert torch.equal(*same)
        return
    expected = Decoder.load(ours, threads=1, exact=True).logits(tokens)
    np.testing.assert_array_equal(Decoder.load(first, threads=1, exact=True).logits(tokens), expected)
    with torch.inference_mode():
        found = nybble.load(first).model()(input_ids=ids).logits[0].float().numpy()
    tolerance = 1e-4 if to != "bf16" else 0.05
    np.testing.assert_allclose(found, expected, atol=tolerance * float(np.abs(expected).max()), rtol=0)


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_missing_tensor_is_said(container: str, source: Callable[[str], Path], tmp_path: Path) -> None:
    """A writer asks for every tensor; what it is not given cannot be left out silently."""
    contents = open_contents(source("llama"))
    lacking = dataclasses.replace(contents, floats={n: e for n, e in contents.floats.items() if "layers.1.mlp" not in n})
    target = path_in(tmp_path, container, "y")

    def write_and_open() -> None:
        convert(lacking, target, container, TO[container][0])
        Decoder.load(target)

    with pytest.raises((UsageError, InputError)):  # the container itself, or who opens it
        write_and_open()
