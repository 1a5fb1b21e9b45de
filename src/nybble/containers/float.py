"""Plain Hugging Face checkpoints: every tensor as floats, in one safetensors file or in shards."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nybble.containers.contents import Contents, read_extras, write_extras
from nybble.containers.streaming import Group, Stream, write_stream
from nybble.errors import FileFormatError, InputError
from nybble.files.safetensors import SafetensorsFile, layout
from nybble.formats import Format, QTensor, parse_format
from nybble.models.arch import table_for
from nybble.models.checkpoint import open_checkpoint

NAME = "float"
FOLDER = True
HOLDS = "fp32, fp16 and bf16; any other format is decoded to floats"
OPTIONS: dict[str, tuple[tuple[str, ...], str]] = {}
WEIGHTS = "model.safetensors"
TAGS = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}


def recognizes(path: Path) -> bool:
    """Whether a path is a model folder that says nothing of being quantized."""
    return path.is_dir() and (path / "config.json").is_file()


def read(path: Path) -> Contents:
    """What a plain folder holds: no tensor is packed."""
    checkpoint = open_checkpoint(path)
    if "quantization_config" in checkpoint.config:
        raise InputError(f"{path} is quantized in a way that nybble does not read; give the float model that it was made from")
    opened = [SafetensorsFile(file) for file in checkpoint.files]
    files = {name: file for file in opened for name in file.entries}

    def nothing(name: str) -> QTensor:
        raise InputError(f"{path}: no packed tensor {name!r}")

    return Contents(
        container=NAME,
        path=path,
        config=checkpoint.config,
        packed={},
        floats={name: (file.entries[name].dtype, file.entries[name].shape) for name, file in files.items()},
        read_packed=nothing,
        read_float=lambda name: files[name].read(name),
        extras=read_extras(path),
        provenance=_provenance(opened[0]) if opened else {},
        files=checkpoint.files,
        bytes=checkpoint.bytes,
    )


def candidates(fmt: Format, shape: tuple[int, int], kind: str) -> tuple[str, ...]:
    """Floats as they are, all else as float32, which every format decodes to."""
    return (str(fmt),) if fmt.is_cast else ("fp32",)


def stream(contents: Contents, options: Mapping[str, str]) -> Stream:
    """A plain folder: `model.safetensors` and config.json. Matrices stand as the architecture stores them."""
    groups = []
    entries: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, (spec, shape) in contents.packed.items():
        if spec not in TAGS:
            raise FileFormatError(f"tensor {name!r} is {spec}, where a float belongs")
        turned = is_transposed(contents.config, name)
        entries[name] = TAGS[spec], shape[::-1] if turned else shape
        groups.append(Group(name, shape, partial(_matrix, contents, name), name in contents.by_rows and not turned))
    for name, (tag, whole) in contents.floats.items():
        entries[name] = tag, whole
        groups.append(Group(name, whole, partial(_float, contents, name), name in contents.by_rows))
    config = {**contents.config, "dtype": _dtype({name: tag for name, (tag, _) in entries.items()})}
    config.pop("torch_dtype", None)

    def head(provenance: Mapping[str, Any]) -> bytes:
        return layout(entries, _metadata(provenance))[0]

    first, places = layout(entries, _metadata(contents.provenance))
    size = len(first) + sum(length for _, length in places.values())
    return Stream(WEIGHTS, groups, places, size, head, lambda folder, provenance: write_extras(folder, config, contents.extras))


def write(path: Path, contents: Contents, options: Mapping[str, str]) -> None:
    """A plain folder, all at once."""
    write_stream(path, stream(contents, options), contents.provenance)


def _metadata(provenance: Mapping[str, Any]) -> dict[str, str]:
    return {"format": "pt", **({"nybble": json.dumps(provenance, sort_keys=True)} if provenance else {})}


def _matrix(contents: Contents, name: str, rows: slice | None) -> dict[str, NDArray[Any]]:
    if rows is None:
        return {name: float_matrix(contents, name)[1]}
    return {name: contents.part(name, rows).stored()["values"]}


def _float(contents: Contents, name: str, rows: slice | None) -> dict[str, NDArray[Any]]:
    return {name: contents.part(name, rows)}


def float_matrix(contents: Contents, name: str) -> tuple[str, NDArray[Any]]:
    """(dtype tag, array) of a packed weight in a floating format, as a Hugging Face checkpoint has it: [in, out] where the
    architecture stores it so. Raises FileFormatError for a format that is no float."""
    tensor = contents.read_packed(name)
    tag = TAGS.get(str(tensor.format))
    if tag is None:
        raise FileFormatError(f"tensor {name!r} is {tensor.format}, where a float belongs")
    values = tensor.stored()["values"]
    return tag, np.ascontiguousarray(values.T) if is_transposed(contents.config, name) else values


def float_tensor(contents: Contents, name: str, spec: str) -> QTensor:
    """A matrix that a container holds as plain floats, [out, in], as a tensor of the floating format `spec`. Raises
    FileFormatError where it has another type."""
    if TAGS[spec] != contents.floats[name][0]:
        raise FileFormatError(f"tensor {name!r} is {contents.floats[name][0]}, not {TAGS[spec]}")
    values = contents.read_float(name)
    values = np.ascontiguousarray(values.T if is_transposed(contents.config, name) else values)
    fmt = parse_format(spec)
    return QTensor(fmt, *fmt.from_storage({"values": values}, (values.shape[0], values.shape[1])))


def is_transposed(config: Mapping[str, Any], name: str) -> bool:
    """Whether a checkpoint of this model stores a weight [in, out]."""
    table = table_for(str(config.get("model_type")))
    block = table.block_of(name)
    if block is None or not table.block:
        return False
    # the base model's checkpoints lack the first part of every name
    prefix = table.block.format(i=block) + "."
    inside = name.removesuffix(".weight")
    for start in (prefix, prefix.partition(".")[2]):
        if inside.startswith(start):
            return inside.removeprefix(start) in table.transposed
    return False


def _dtype(tags: Mapping[str, str]) -> str:
    """config.json's `dtype` for tensors of these types: the widest of them."""
    for tag, name in (("F32", "float32"), ("BF16", "bfloat16"), ("F16", "float16")):
        if tag in tags.values():
            return name
    return "float32"


def _provenance(file: SafetensorsFile) -> dict[str, Any]:
    try:
        value = json.loads(file.metadata.get("nybble", "{}"))
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
