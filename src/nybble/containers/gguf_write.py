"""The keys and tensors of a GGUF file, made from any container's contents (see gguf.py)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nybble.containers.contents import Contents
from nybble.containers.gguf_config import Keys, parts_of, rope_factors, to_keys
from nybble.containers.gguf_names import LEAVES, Place, find, order_of_rows, places
from nybble.containers.gguf_rebuild import stored_files
from nybble.containers.gguf_tokenizer import no_tokenizer, tokenizer_keys
from nybble.containers.streaming import Group
from nybble.errors import InputError, shown
from nybble.files.gguf import ALIGNMENT_KEY, Tensor
from nybble.files.gguf_blocks import LAYOUTS, join
from nybble.files.gguf_values import Value
from nybble.files.safetensors import FLOAT_TAGS, widen
from nybble.formats import QTensor
from nybble.models.arch import Architecture

CONFIG, PROVENANCE = "nybble.config", "nybble.provenance"
FACTORS = "rope_freqs.weight"
CASTS = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
FILE_TYPES = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q2_K": 10,
    "Q3_K": 11,
    "Q4_K": 14,
    "Q5_K": 16,
    "Q6_K": 18,
    "IQ4_NL": 25,
    "IQ4_XS": 30,
    "BF16": 32,
    "MXFP4": 38,
}
"""Type that most weights have -> `general.file_type`; one for a person to read, no reader depends on it."""
MIXED = {"Q3_K": 12, "Q4_K": 15, "Q5_K": 17}
"""The same where the matrices of the blocks have several types (Q4_K_M)."""
FILE_TYPE_NAMES = {
    **{number: name for name, number in FILE_TYPES.items()},
    **{11: "Q3_K_S", 12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 21: "Q2_K_S"},
}
FILE_TYPE_NUMBERS = {name: number for number, name in FILE_TYPE_NAMES.items()}


def make_metadata(
    contents: Contents, table: Architecture, tensors: Sequence[Tensor], options: Mapping[str, str]
) -> dict[str, Value]:
    """All keys of a file, in the order in which they are written. Raises InputError for a model or tokenizer that has no form
    there."""
    kept = contents.details.get("metadata")
    if isinstance(kept, Mapping) and kept and all(isinstance(value, Value) for value in kept.values()):
        metadata = {key: value for key, value in kept.items() if key != ALIGNMENT_KEY}
    else:
        metadata = _new_metadata(contents, table, options)
    metadata["general.file_type"] = Value("uint32", _file_type(contents, tensors))
    metadata["general.quantization_version"] = Value("uint32", 2)
    metadata.pop(PROVENANCE, None)
    if contents.provenance:
        metadata[PROVENANCE] = Value.text(_json(contents.provenance))
    return metadata


def _new_metadata(contents: Contents, table: Architecture, options: Mapping[str, str]) -> dict[str, Value]:
    _, gguf = parts_of(table)
    vocabulary = _vocabulary(contents, table)
    metadata = {
        "general.architecture": Value.text(gguf.architecture),
        "general.type": Value.text("model"),
        "general.name": Value.text(contents.path.resolve().name or gguf.architecture),
        "general.file_type": Value("uint32", 0),
        "general.quantization_version": Value("uint32", 2),
        **to_keys(contents.config, table, vocabulary),
    }
    if options.get("tokenizer") == "none":
        metadata.update(no_tokenizer())
    else:
        metadata.update(tokenizer_keys(contents.extras, contents.config, vocabulary, contents.path))
    metadata.update(stored_files(contents.extras, Keys(metadata, contents.path)))
    metadata[CONFIG] = Value.text(_json(contents.config))
    return metadata


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _vocabulary(contents: Contents, table: Architecture) -> int:
    names = find((*contents.packed, *contents.floats), table)
    module = next(module for module, role in table.others.items() if role == "token table")
    name = names.get(f"{module}.weight")
    if name is None:
        raise InputError(f"{contents.path} has no tensor {module}.weight, which a GGUF file needs")
    return contents.packed[name][1][0] if name in contents.packed else contents.floats[name][1][0]


def _file_type(contents: Contents, tensors: Sequence[Tensor]) -> int:
    """`general.file_type`: what the source says of the same types, else the mix or format that was asked for, else what the
    types of most weights in the blocks are called."""
    stated = contents.details.get("metadata", {}).get("general.file_type")
    same = contents.details.get("types") == Counter(tensor.type for tensor in tensors)
    if same and isinstance(stated, Value) and isinstance(stated.data, int):
        return stated.data
    asked = str(contents.provenance.get("format")).removeprefix("mix:").upper()
    if asked in FILE_TYPE_NUMBERS:
        return FILE_TYPE_NUMBERS[asked]
    weights: Counter[str] = Counter()
    for tensor in tensors:
        if tensor.name.startswith("blk.") and len(tensor.shape) == 2:
            weights[tensor.type] += int(np.prod(tensor.shape))
    main = weights.most_common(1)[0][0] if weights else "F32"
    return MIXED[main] if main in MIXED and len(weights) > 1 else FILE_TYPES[main]


class Writer:
    """The tensors of contents as they stand in a file."""

    def __init__(self, contents: Contents, table: Architecture) -> None:
        self.contents, self.table = contents, table
        how, _ = parts_of(table)
        self.gain_offset = np.float32(how.gain_offset)
        self.sources: dict[str, tuple[Place, str, Callable[..., NDArray[Any]]]] = {}
        """Name in the file -> (place, name of the tensor, what makes it or some rows of it)."""

    def groups(self, tensors: Sequence[Tensor]) -> list[Group]:
        """What makes them, in the same order: rows apart where none changes its place."""
        found = []
        for tensor in tensors:
            source = self.sources.get(tensor.name)
            if source is None:
                found.append(Group(tensor.name, tensor.shape, partial(_whole, tensor)))
                continue
            place, name, make = source
            apart = name in self.contents.by_rows and not place.heads and not (place.transposed and name in self.contents.floats)
            found.append(Group(name, tensor.shape, partial(_made, tensor.name, make), apart))
        return found

    def tensors(self) -> list[Tensor]:
        """In the order of the architecture's table. Raises InputError for a tensor that has no place in a file, or is missing."""
        contents = self.contents
        names = find((*contents.packed, *contents.floats), self.table)
        tied = contents.config.get("tie_word_embeddings", self.table.ties_by_default)
        head = self.table.tied[0] if self.table.tied and tied else None
        found = []
        for place in places(self.table, contents.config):
            if f"{place.module}.weight" not in names and place.name != "output":
                raise InputError(f"{contents.path} has no tensor {place.module}.weight, which a GGUF file needs")
            for leaf in LEAVES:
                name = names.pop(f"{place.module}{leaf}", None)
                if name is not None and not (place.module == head and leaf == ".weight"):
                    found.append(self.tensor(place, leaf, name))
        if names:
            raise InputError(
                f"tensor {shown(next(iter(names.values())))} has no place in a GGUF file of {contents.config['model_type']}"
            )
        factors = rope_factors(contents.config, self.table)
        if factors is not None:
            found.append(Tensor(FACTORS, "F32", factors.shape, lambda: factors))
        return found

    def tensor(self, place: Place, leaf: str, name: str) -> Tensor:
        """One of them. Vectors and tables of positions are F32."""
        packed = name in self.contents.packed
        stored, shape = self.contents.packed[name] if packed else self.contents.floats[name]
        kind = CASTS.get(stored, stored.upper()) if packed else stored
        if place.transposed and len(shape) == 2 and not packed:
            shape = shape[::-1]
        if len(shape) > 2 or (kind not in FLOAT_TAGS and kind.lower() not in LAYOUTS):
            raise InputError(f"tensor {shown(name)} is {kind} {list(shape)}, which a GGUF file cannot hold")
        wide = len(shape) == 1 or place.name == "position_embd"
        make = partial(self.packed if packed else self.float, place, name, wide)
        self.sources[f"{place.name}{leaf}"] = place, name, make
        return Tensor(f"{place.name}{leaf}", "F32" if wide else kind, tuple(shape), make)

    def packed(self, place: Place, name: str, wide: bool, rows: slice | None = None) -> NDArray[Any]:
        """Bytes of a packed weight, or of some rows; as float32 where `wide`."""
        tensor: QTensor = self.contents.part(name, rows)
        order = order_of_rows(tensor.shape[0], place.heads) if place.heads else slice(None)
        if wide:
            return tensor.decode()[order]
        if tensor.format.is_cast:
            return tensor.stored()["values"][order]
        params = {suffix: array[order] for suffix, array in tensor.params.items()}
        return join(str(tensor.format), tensor.codes[order], params)

    def float(self, place: Place, name: str, wide: bool, rows: slice | None = None) -> NDArray[Any]:
        """A float tensor, or some rows, as it lies in the file."""
        values: NDArray[Any] = self.contents.part(name, rows)
        if wide:
            gain = self.gain_offset if values.ndim == 1 and name.endswith(".weight") else np.float32(0)
            values = widen(self.contents.floats[name][0], values, name) + gain
        if place.transposed and values.ndim == 2:
            values = values.T
        return values[order_of_rows(len(values), place.heads)] if place.heads else values


def _whole(tensor: Tensor, rows: slice | None) -> dict[str, NDArray[Any]]:
    return {tensor.name: tensor.data()}


def _made(name: str, make: Callable[..., NDArray[Any]], rows: slice | None) -> dict[str, NDArray[Any]]:
    return {name: make(rows=rows)}
