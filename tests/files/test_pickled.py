"""Pickled checkpoints of torch, read without torch: against torch.load, bit for bit."""

from __future__ import annotations

import collections
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nybble.errors import FileFormatError, InputError, OutputError
from nybble.files.pickled import pickled_to_safetensors
from nybble.files.safetensors import SafetensorsFile
from nybble.models.checkpoint import open_checkpoint

State = dict[str, torch.Tensor]

TYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64,
)  # fmt: skip


def bits(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).numpy()) if flat.numel() else b""


def check_equal(found: Path, expected: State) -> None:
    file = SafetensorsFile(found)
    tags = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
            torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
            torch.complex64: "C64"}  # fmt: skip
    assert list(file.entries) == list(expected)
    for name, tensor in expected.items():
        assert file.entries[name].dtype == tags[tensor.dtype], name
        assert file.entries[name].shape == tuple(tensor.shape), name
        assert file.read(name).tobytes() == bits(tensor), name


def every_type() -> State:
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 100, (3, 5), generator=generator)
    return {str(dtype): values.to(dtype) for dtype in TYPES}


def views() -> State:
    base = torch.arange(60, dtype=torch.float32)
    square = base[:36].view(6, 6)
    return {
        "whole": base,
        "transposed": square.T,
        "every second column": square[:, ::2],
        "a corner": square[2:5, 1:3],
        "permuted": base.view(3, 4, 5).permute(2, 0, 1),
        "the last": base[-1:],
        "one number": base[17],
        "one of many dimensions": base.view(1, 60, 1, 1),
        "nothing": base[:0],
        "nothing in two dimensions": torch.empty(0, 4, dtype=torch.float16),
    }


def tied() -> State:
    weight = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    return {"wte.weight": weight, "lm_head.weight": weight, "same memory": weight.view(-1)[3:9]}


def parameters() -> State:
    weight = torch.nn.Parameter(torch.arange(4.0))
    frozen = torch.nn.Parameter(torch.arange(4.0, dtype=torch.bfloat16), requires_grad=False)
    return {"weight": weight, "frozen": frozen, "needs a gradient": torch.arange(3.0, requires_grad=True)}


def state_dictionary() -> State:
    """With the attribute that modules leave on theirs, and buffers of whole numbers."""
    layers = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Embedding(5, 2))
    state = layers.state_dict()
    assert hasattr(state, "_metadata")
    return state


def many() -> State:
    """So many that the memo takes its long instructions."""
    return {f"layer.{i}.weight": torch.full((2,), float(i)) for i in range(400)}


STATES: dict[str, Callable[[], State]] = {
    make.__name__: make for make in (every_type, views, tied, parameters, state_dictionary, many)
}


@pytest.mark.parametrize("name", STATES)
def test_bit_for_bit_what_torch_loads(name: str, tmp_path: Path) -> None:
    torch.save(STATES[name](), tmp_path / "pytorch_model.bin")
    path = pickled_to_safetensors(tmp_path / "pytorch_model.bin", tmp_path)
    assert path == tmp_path / "model.safetensors"
    check_equal(path, torch.load(tmp_path / "pytorch_model.bin", weights_only=True))


def test_an_ordinary_dictionary_and_an_ordered_one(tmp_path: Path) -> None:
    for state in ({"a": torch.ones(2)}, collections.OrderedDict(a=torch.ones(2))):
        torch.save(state, tmp_path / "x.pt")
        check_equal(pickled_to_safetensors(tmp_path / "x.pt", tmp_path), {"a": torch.ones(2)})


def test_a_real_model(tiny: Callable[..., Any], tmp_path: Path) -> None:
    """A folder as Hugging Face had them before safetensors, made into one that opens."""
    model = tiny("gpt2")
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    new.mkdir()
    torch.save(model.state_dict(), old / "pytorch_model.bin")
    config = json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]})
    for folder in (old, new):
        (folder / "config.json").write_text(config)
    with pytest.raises(InputError, match="only pickled weights"):
        open_checkpoint(old)
    check_equal(pickled_to_safetensors(old, new), model.state_dict())
    assert open_checkpoint(new).files == (new / "model.safetensors",)


def shards(folder: Path) -> tuple[State, dict[str, str]]:
    folder.mkdir(exist_ok=True)
    state = {"a": torch.arange(6.0).view(2, 3), "b": torch.arange(4), "c": torch.ones(2, dtype=torch.bfloat16)}
    places = {
        "a": "pytorch_model-00001-of-00002.bin",
        "b": "pytorch_model-00002-of-00002.bin",
        "c": "pytorch_model-00001-of-00002.bin",
    }
    for shard in set(places.values()):
        torch.save({name: state[name] for name, place in places.items() if place == shard}, folder / shard)
    write_index(folder, places)
    return state, places


def write_index(folder: Path, places: dict[str, Any]) -> None:
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def test_shards_become_shards_with_an_index(tmp_path: Path) -> None:
    state, _ = shards(tmp_path / "old")
    new = tmp_path / "new"
    new.mkdir()
    (new / "config.json").write_text('{"model_type": "gpt2"}')
    index = pickled_to_safetensors(tmp_path / "old", new)
    assert index.name == "model.safetensors.index.json"
    checkpoint = open_checkpoint(new)
    assert [file.name for file in checkpoint.files] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    found = {name: SafetensorsFile(file).read(name) for file in checkpoint.files for name in SafetensorsFile(file).entries}
    assert found.keys() == state.keys()
    assert all(found[name].tobytes() == bits(tensor) for name, tensor in state.items())
    assert json.loads(index.read_text())["metadata"]["total_size"] == sum(map(len, map(bits, state.values())))


WRONG_INDEX: dict[str, tuple[Callable[[dict[str, str]], dict[str, Any]], type[Exception], str]] = {
    "a shard outside": (lambda p: {**p, "a": "../pytorch_model-00001-of-00002.bin"}, FileFormatError, "of the same folder"),
    "a tensor in another shard": (lambda p: {**p, "a": p["b"]}, FileFormatError, "does not say"),
    "a tensor that is nowhere": (lambda p: {**p, "d": p["b"]}, FileFormatError, "lacks tensor 'd'"),
    "a tensor that is not named": (lambda p: {"a": p["a"], "b": p["b"]}, FileFormatError, "holds tensor 'c'"),
    "a shard that is not there": (lambda p: {**p, "d": "none.bin"}, InputError, "No such file"),
    "no shards": (lambda p: {}, FileFormatError, "names no shard"),
}


@pytest.mark.parametrize("case", WRONG_INDEX)
def test_an_index_that_is_wrong(case: str, tmp_path: Path) -> None:
    _, places = shards(tmp_path / "old")
    change, kind, message = WRONG_INDEX[case]
    write_index(tmp_path / "old", change(places))
    new = tmp_path / "new"
    new.mkdir()
    with pytest.raises(kind, match=message):
        pickled_to_safetensors(tmp_path / "old", new)
    assert not (new / "model.safetensors.index.json").exists()


def test_files_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no pytorch_model\.bin"):
        pickled_to_safetensors(tmp_path, tmp_path)
    with pytest.raises(InputError, match="No such file"):
        pickled_to_safetensors(tmp_path / "x.bin", tmp_path)
    torch.save({"a": torch.ones(2)}, tmp_path / "x.bin")
    with pytest.raises(OutputError, match="No such file"):
        pickled_to_safetensors(tmp_path / "x.bin", tmp_path / "none")


def test_only_dictionaries_of_tensors(tmp_path: Path) -> None:
    cases: list[tuple[Any, str]] = [
        ([torch.ones(2)], "holds a list, not a dictionary of tensors"),
        (torch.ones(2), "holds a Tensor, not a dictionary"),
        ({"step": 3}, "'step' is a int, not a tensor"),
        ({"state": {"a": torch.ones(2)}}, "'state' is a dict, not a tensor"),
        ({3: torch.ones(2)}, "cannot be carried out"),
        ({"a": torch.ones(2), "b": np.float64(3)}, "it names 'numpy"),
        (torch.nn.Linear(2, 2), "it names 'torch.nn.modules.linear.Linear'"),
        ({"a": torch.zeros(1).expand(1000)}, "reaches element 0 of storage 0, which has 1"),
    ]
    for value, message in cases:
        torch.save(value, tmp_path / "x.bin")
        with pytest.raises(FileFormatError, match=message):
            pickled_to_safetensors(tmp_path / "x.bin", tmp_path)


def test_other_ways_in_which_torch_saves(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(FileFormatError, match="legacy files of before torch"):
        pickled_to_safetensors(tmp_path / "old.bin", tmp_path)
    torch.save({"a": torch.ones(2)}, tmp_path / "four.bin", pickle_protocol=4)
    with pytest.raises(FileFormatError, match="not of pickle protocol 2"):
        pickled_to_safetensors(tmp_path / "four.bin", tmp_path)


def test_a_link_is_followed_only_within_the_folder(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    torch.save({"a": torch.ones(2)}, tmp_path / "secret.bin")
    (tmp_path / "model" / "pytorch_model.bin").symlink_to("../secret.bin")
    with pytest.raises(InputError, match="link that leaves its folder"):
        pickled_to_safetensors(tmp_path / "model", tmp_path)


def test_the_process_that_reads_is_held_to_its_memory(tmp_path: Path) -> None:
    """Each byte of this pickle makes a dictionary; it ends at the limit."""
    with zipfile.ZipFile(tmp_path / "x.bin", "w") as file:
        file.writestr("x/data.pkl", b"\x80\x02" + b"}" * (4_000_000) + b".")
    with pytest.raises(FileFormatError, match="needs more than 79 MiB of memory"):
        pickled_to_safetensors(tmp_path / "x.bin", tmp_path)


@pytest.mark.parametrize("action", ["os.system('true')", "os.fork()", "__import__('pickle').loads(b'cos\\nsystem\\n.')"])
def test_the_process_that_reads_starts_nothing(action: str) -> None:
    program = f"import sys, os, nybble.files.pickled as module; sys.addaudithook(module._refuse); {action}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "FileFormatError: reading it tried" in done.stderr


def test_the_process_needs_no_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A json.py beside the model is not imported, and relative paths are those of the caller."""
    torch.save({"a": torch.ones(2)}, tmp_path / "x.bin")
    (tmp_path / "json.py").write_text("raise SystemExit('ran')")
    (tmp_path / "numpy.py").write_text("raise SystemExit('ran')")
    monkeypatch.chdir(tmp_path)
    check_equal(pickled_to_safetensors("x.bin", "."), {"a": torch.ones(2)})
    assert os.path.exists("model.safetensors")
