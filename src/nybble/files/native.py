"""nybble's own container: a Hugging Face folder whose safetensors file holds packed tensors.

For a weight `NAME` of format F the file holds one tensor `NAME.SUFFIX` per entry of `F.storage(shape)`, e.g.
`transformer.wte.weight.codes` (uint8, rows packed as a little-endian bit stream) and `transformer.wte.weight.scale`;
everything that stays in float stands under its own name. A weight is [out, in], also where the original layer stores
[in, out] (GPT-2's Conv1D). config.json carries

    "quantization_config": {"quant_method": "nybble", "container": 1, "tensors": {NAME: {"format": SPEC, "shape": [N, K]}}}

where a weight whose inputs are rounded at run time also has `"activations": {"scheme": SCHEME, ...}` (see
formats/activations.py), and a static grid the tensors `NAME.inputs.scale` and `NAME.inputs.zero`;
and the safetensors metadata the provenance: which source, plan, method and versions made the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nybble.errors import FileFormatError, InputError, UsageError, shown
from nybble.files.json_strict import parse_object, read_object
from nybble.files.safetensors import NAMES, SafetensorsFile
from nybble.formats import QTensor, parse_format
from nybble.formats.activations import Activations, parse_entry
from nybble.formats.base import not_finite

CONTAINER = 1
WEIGHTS = "model.safetensors"
LARGEST_EXPONENT = 252
"""Of a scale that is a power of two (mxfp4): beyond it the largest level would not be a float32."""
MAX_SPEC = 200
"""Characters of a format's name."""
PROVENANCE = "nybble"
"""Key of the safetensors metadata that holds the provenance as JSON."""


@dataclass(frozen=True)
class NativeFile:
    """An open container: its provenance, which tensors are packed, and how to read them."""

    file: SafetensorsFile
    provenance: dict[str, Any]
    packed: dict[str, tuple[str, tuple[int, int]]]
    """Name -> (format spec, shape)."""
    schemes: dict[str, Activations] = field(default_factory=dict)
    """Name -> what becomes of the inputs it multiplies; absent: they stay floats."""

    def read(self, name: str) -> QTensor:
        """The packed tensor of this name. Raises FileFormatError when its arrays do not fit its format."""
        spec, shape = self.packed[name]
        fmt = parse_format(spec)
        try:
            # Packed codes are unpacked from the file: a copy beside them would be more than four times what it holds.
            stored = {suffix: array if suffix == "codes" else array.copy() for suffix, array in self.stored(name).items()}
            tensor = QTensor.from_stored(fmt, stored, shape, self.schemes.get(name))
            return replace(tensor, codes=tensor.codes.copy()) if not tensor.codes.flags.writeable else tensor
        except (ValueError, InputError) as error:
            raise FileFormatError(f"{self.file.path}: tensor {shown(name)}: {error}") from error

    def stored(self, name: str) -> dict[str, NDArray[Any]]:
        """The arrays of a packed tensor as they lie in the file, views of it; scales that are numbers. Raises FileFormatError for
        scales that are not: they would make every product with the weight one that is none."""
        spec, shape = self.packed[name]
        found = {suffix: self.file.read(f"{name}.{suffix}") for suffix in parse_format(spec).storage(shape)}
        check_numbers(self.file, name, found)
        return found

    def read_all(self) -> dict[str, QTensor]:
        """Every packed tensor, by name."""
        return {name: self.read(name) for name in self.packed}


def check_numbers(file: SafetensorsFile, name: str, stored: Mapping[str, NDArray[Any]]) -> None:
    """Raise FileFormatError for scales of a packed tensor that are no numbers."""
    for suffix, array in stored.items():
        if suffix == "exponent" and array.dtype == np.uint8:
            bad = int((array > LARGEST_EXPONENT).sum())
        elif suffix != "values" and array.dtype.kind == "f":
            bad = not_finite(array)
        else:
            continue
        if bad:
            raise FileFormatError(f"{file.path}: tensor {shown(name)}: {bad} of {array.size} {suffix} are not finite")


def stored_entries(
    name: str, spec: str, shape: tuple[int, int], activations: Activations | None
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What the file holds for a packed weight: name -> (dtype tag, shape)."""
    found = {
        f"{name}.{suffix}": ("BF16" if spec == "bf16" else NAMES[dtype], size)
        for suffix, (dtype, size) in parse_format(spec).storage(shape).items()
    }
    inputs = activations.stored() if activations else {}
    return {**found, **{f"{name}.{suffix}": (NAMES[array.dtype.name], array.shape) for suffix, array in inputs.items()}}


def stored_arrays(name: str, tensor: QTensor) -> dict[str, NDArray[Any]]:
    """The arrays of `stored_entries`."""
    inputs = tensor.activations.stored() if tensor.activations else {}
    return {f"{name}.{suffix}": array for suffix, array in (*tensor.stored().items(), *inputs.items())}


def file_metadata(provenance: Mapping[str, Any]) -> dict[str, str]:
    """Metadata of the safetensors file."""
    return {"format": "pt", PROVENANCE: json.dumps(provenance, sort_keys=True)}


def config_entry(
    tensors: Mapping[str, tuple[str, tuple[int, int]]], schemes: Mapping[str, Activations] | None = None
) -> dict[str, Any]:
    """`quantization_config` for config.json: of packed weights, name -> (format spec, shape), and of what becomes of inputs."""
    packed: dict[str, dict[str, Any]] = {}
    for name, (spec, shape) in tensors.items():
        packed[name] = {"format": spec, "shape": list(shape)}
        if schemes and name in schemes:
            packed[name]["activations"] = schemes[name].entry()
    return {"quant_method": "nybble", "container": CONTAINER, "tensors": packed}


def read_entry(entry: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, int]]]:
    """Name -> (format spec, shape) of a `quantization_config`. Raises FileFormatError for one that is not ours."""
    if entry.get("quant_method") != "nybble":
        raise FileFormatError(f"quant_method is {shown(entry.get('quant_method'))}, not 'nybble'")
    if type(entry.get("container")) is not int or entry["container"] != CONTAINER:
        raise FileFormatError(f"container version {shown(entry.get('container'))}; this nybble reads {CONTAINER}")
    tensors = entry.get("tensors")
    if not isinstance(tensors, dict):
        raise FileFormatError(f"tensors of the quantization_config is {type(tensors).__name__}, not a map of tensor names")
    packed = {}
    for name, item in tensors.items():
        try:
            rows, columns = item["shape"]
            if not (type(rows) is int and type(columns) is int and rows > 0 and columns > 0):
                raise ValueError(f"shape {shown(item['shape'])} is not two positive integers")
            if not isinstance(item["format"], str) or len(item["format"]) > MAX_SPEC:
                raise ValueError(f"format {shown(item['format'])} is not a spec string")
            fmt = parse_format(item["format"])
            fmt.storage((rows, columns))  # raises ValueError for sizes beyond what can be packed
            packed[name] = (str(fmt), (rows, columns))
        except (TypeError, KeyError, ValueError, UsageError) as error:
            raise FileFormatError(f"quantization_config of tensor {shown(name)}: {error}") from error
    return packed


def read_schemes(entry: Mapping[str, Any]) -> dict[str, Activations]:
    """Name -> scheme of the inputs, for the tensors of a `quantization_config` (one that `read_entry` took) that have one;
    a static grid's numbers are not known yet. Raises FileFormatError for a scheme that this nybble does not know: computing
    without it would be another model."""
    schemes = {}
    for name, item in entry["tensors"].items():
        if item.get("activations") is not None:
            try:
                schemes[name] = parse_entry(item["activations"])
                if not parse_format(item["format"]).is_integer:
                    raise ValueError(f"activations {schemes[name].scheme} need an integer format, {item['format']} is none")
            except ValueError as error:
                raise FileFormatError(f"quantization_config of tensor {shown(name)}: {error}") from error
    return schemes


def is_native(folder: Path) -> bool:
    """Whether a folder says of itself that it is this container."""
    try:
        entry = read_object(folder / "config.json").get("quantization_config")
    except InputError:
        return False
    return isinstance(entry, dict) and entry.get("quant_method") == "nybble"


def open_native(folder: str | Path) -> NativeFile:
    """Open a folder written by `write_native`. Raises InputError when it is missing, FileFormatError when it is broken."""
    folder = Path(folder)
    entry = read_object(folder / "config.json").get("quantization_config")
    if not isinstance(entry, dict):
        raise FileFormatError(f"{folder} is not quantized: its config.json has no quantization_config")
    file = SafetensorsFile(folder / WEIGHTS)
    try:
        packed, schemes = read_entry(entry), read_schemes(entry)
    except FileFormatError as error:
        raise FileFormatError(f"{folder / 'config.json'}: {error}") from error
    for name, (spec, shape) in packed.items():
        inputs = schemes[name].stored() if name in schemes else {}
        for suffix in (*parse_format(spec).storage(shape), *inputs):
            if f"{name}.{suffix}" not in file.entries:
                raise FileFormatError(f"{file.path} lacks tensor {shown(f'{name}.{suffix}')}, which config.json names")
    for name, scheme in schemes.items():
        try:
            schemes[name] = scheme.with_stored({suffix: file.read(f"{name}.{suffix}") for suffix in scheme.stored()})
        except ValueError as error:
            raise FileFormatError(f"{file.path}: tensor {shown(name)}: {error}") from error
    provenance = parse_object(file.metadata.get(PROVENANCE, "{}").encode("utf-8"), f"{file.path}: its provenance")
    return NativeFile(file, provenance, packed, schemes)
