"""nybble's own container: written, read and written again is the same bytes; broken ones are one clear line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from nybble.errors import FileFormatError, InputError
from nybble.files.native import (
    WEIGHTS,
    config_entry,
    file_metadata,
    is_native,
    open_native,
    read_entry,
    stored_arrays,
    stored_entries,
)
from nybble.files.safetensors import SafetensorsFile, write
from nybble.formats import QTensor, parse_format

SPECS = (
    "int8:tensor",
    "int8:channel",
    "int8:tensor,asym",
    "int4:g64",
    "int3:g32,asym",
    "nf4:g64,dq",
    "fp4:g64",
    "fp16",
    "bf16",
    "fp32",
)


def tensors() -> dict[str, QTensor]:
    found = {}
    for i, spec in enumerate(SPECS):
        fmt = parse_format(spec)
        weight = np.random.default_rng(i).standard_normal((4, 100)).astype(np.float32)
        params = fmt.fit(weight)
        found[f"layer.{i}.weight"] = QTensor(fmt, fmt.encode(weight, params), params)
    return found


FLOATS: list[tuple[str, tuple[str, NDArray[Any]]]] = [
    ("norm.weight", ("F32", np.ones(5, dtype=np.float32))),
    ("norm.bias", ("BF16", np.array([0x3F80, 0xC000], dtype=np.uint16))),
]


def write_file(
    folder: Path, packed: dict[str, QTensor], floats: list[tuple[str, tuple[str, NDArray[Any]]]], provenance: Any
) -> int:
    arrays: dict[str, NDArray[Any]] = {}
    tags: dict[str, str] = {}
    for name, tensor in packed.items():
        arrays.update(stored_arrays(name, tensor))
        tags.update({key: tag for key, (tag, _) in stored_entries(name, str(tensor.format), tensor.shape, None).items()})
    for name, (tag, array) in floats:
        arrays[name], tags[name] = array, tag
    return write(folder / WEIGHTS, arrays, file_metadata(provenance), tags)


def entry_of(packed: dict[str, QTensor]) -> dict[str, Any]:
    return config_entry({name: (str(tensor.format), tensor.shape) for name, tensor in packed.items()})


def make(folder: Path) -> None:
    folder.mkdir()
    write_file(folder, tensors(), FLOATS, {"plan_hash": "abc"})
    config = {"model_type": "gpt2", "quantization_config": entry_of(tensors())}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make(tmp_path / "model")
    return tmp_path / "model"


def test_write_read_write_is_byte_identical(folder: Path, tmp_path: Path) -> None:
    native = open_native(folder)
    floats = [(name, (native.file.entries[name].dtype, native.file.read(name))) for name, _ in FLOATS]
    (tmp_path / "again").mkdir()
    read = native.read_all()
    size = write_file(tmp_path / "again", read, floats, native.provenance)
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    assert size == (folder / WEIGHTS).stat().st_size
    assert entry_of(read) == entry_of(tensors())


def test_what_is_read_is_what_was_written(folder: Path) -> None:
    native = open_native(folder)
    assert native.provenance == {"plan_hash": "abc"}
    for name, tensor in tensors().items():
        read = native.read(name)
        assert read.format == tensor.format
        assert np.array_equal(read.codes, tensor.codes)
        assert read.decode().tobytes() == tensor.decode().tobytes()
    assert native.file.entries["layer.8.weight.values"].dtype == "BF16"
    assert native.file.entries["norm.bias"].dtype == "BF16"


def test_file_bytes_are_the_stated_bits(folder: Path) -> None:
    native = open_native(folder)
    data = sum(entry.bytes for entry in native.file.entries.values())
    stated = sum(tensor.format.stored_bits(tensor.shape) for tensor in tensors().values())
    assert 8 * data == stated + 8 * sum(array.nbytes for _, (_, array) in FLOATS)


def test_is_native(folder: Path, tmp_path: Path) -> None:
    assert is_native(folder)
    assert not is_native(tmp_path)
    for text in ("{}", "[]", "{", '{"quantization_config": {"quant_method": "gptq"}}', '{"a":' * 50_000):
        (folder / "config.json").write_text(text, encoding="utf-8")
        assert not is_native(folder)


GOOD: dict[str, Any] = {"quant_method": "nybble", "container": 1, "tensors": {"w": {"format": "int4:g64", "shape": [4, 100]}}}
BROKEN: dict[str, tuple[Any, str]] = {
    "another method": ({**GOOD, "quant_method": "gptq"}, "quant_method is 'gptq', not 'nybble'"),
    "a later version": ({**GOOD, "container": 2}, "container version 2; this nybble reads 1"),
    "no version": ({"quant_method": "nybble"}, "container version None"),
    "no tensors": ({"quant_method": "nybble", "container": 1}, "not a map of tensor names"),
    "tensors is a list": ({**GOOD, "tensors": ["w"]}, "tensors of the quantization_config is list"),
    "tensor is null": ({**GOOD, "tensors": {"w": None}}, "quantization_config of tensor 'w'"),
    "unknown format": ({**GOOD, "tensors": {"w": {"format": "int9", "shape": [4, 100]}}}, "unknown format 'int9'"),
    "format is a number": ({**GOOD, "tensors": {"w": {"format": 4, "shape": [4, 100]}}}, "format 4 is not a spec string"),
    "no format": ({**GOOD, "tensors": {"w": {"shape": [4, 100]}}}, "'format'"),
    "no shape": ({**GOOD, "tensors": {"w": {"format": "int4:g64"}}}, "'shape'"),
    "three dimensions": ({**GOOD, "tensors": {"w": {"format": "int4:g64", "shape": [4, 10, 10]}}}, "too many values"),
    "zero rows": ({**GOOD, "tensors": {"w": {"format": "int4:g64", "shape": [0, 100]}}}, "not two positive integers"),
    "a negative shape": ({**GOOD, "tensors": {"w": {"format": "int4:g64", "shape": [-4, -100]}}}, "not two positive integers"),
    "a fractional shape": ({**GOOD, "tensors": {"w": {"format": "int4:g64", "shape": [4.0, 100]}}}, "not two positive integers"),
    "a shape beyond all limits": ({**GOOD, "tensors": {"w": {"format": "int4:g64", "shape": [4, 2**62]}}}, "columns must be"),
    "a tensor that is not in the file": (GOOD, "lacks tensor 'w.codes', which config.json names"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_config_entries(name: str, folder: Path) -> None:
    entry, message = BROKEN[name]
    (folder / "config.json").write_text(json.dumps({"quantization_config": entry}), encoding="utf-8")
    with pytest.raises(FileFormatError) as caught:
        open_native(folder)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "{}", '{"quantization_config": []}', "[" * 100_000, "\ud800"])
def test_broken_config_files(text: str, folder: Path) -> None:
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(FileFormatError) as caught:
        open_native(folder)
    assert "\n" not in str(caught.value)


def test_a_missing_folder_or_file(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*config\.json: No such file"):
        open_native(tmp_path / "none")
    (folder / WEIGHTS).unlink()
    with pytest.raises(InputError, match=r"cannot read .*model\.safetensors: No such file"):
        open_native(folder)


@pytest.mark.parametrize(
    ("field", "value"), [("shape", [4, 102]), ("shape", [8, 50]), ("format", "int5:g64"), ("format", "fp16")]
)
def test_arrays_that_do_not_fit_their_format(field: str, value: Any, folder: Path) -> None:
    entry = entry_of(tensors())
    entry["tensors"]["layer.3.weight"][field] = value
    (folder / "config.json").write_text(json.dumps({"quantization_config": entry}), encoding="utf-8")

    def read() -> None:
        open_native(folder).read("layer.3.weight")

    with pytest.raises(FileFormatError, match=r"layer\.3\.weight"):
        read()


@pytest.mark.parametrize("text", ["{", "[]", "3", "[" * 100_000])
def test_broken_provenance(text: str, folder: Path) -> None:
    file = SafetensorsFile(folder / WEIGHTS)
    tags = {name: entry.dtype for name, entry in file.entries.items()}
    write(folder / WEIGHTS, {name: file.read(name).copy() for name in file.entries}, {"nybble": text}, tags)
    with pytest.raises(FileFormatError, match=r"its provenance (is|holds)"):
        open_native(folder)


def test_read_entry_keeps_canonical_specs() -> None:
    entry = {**GOOD, "tensors": {"w": {"format": "nf4", "shape": [4, 100]}}}
    assert read_entry(entry) == {"w": ("nf4:g64", (4, 100))}
