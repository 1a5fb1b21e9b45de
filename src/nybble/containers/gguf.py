"""GGUF files, as llama.cpp writes and reads them: one file with config, tokenizer and tensors.

A weight in a format of ggml's is carried code by code; floats stand as F32, F16 or BF16. Norms, biases and tables of positions
are F32, as llama.cpp wants them. What a file says that nobody here knows of is kept in `details["metadata"]`, and written again.

What GGUF has no key for stands under keys of ours, which other readers pass over: `nybble.config` (config.json; it counts as long
as llama.cpp's keys say the same), `nybble.provenance`, and `nybble.file.NAME` (see gguf_rebuild.py).
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nybble.containers.contents import Contents
from nybble.containers.gguf_config import Keys, check_same, parts_of, rope_factors, table_of, to_config, to_keys
from nybble.containers.gguf_names import LEAVES, Place, order_back, places
from nybble.containers.gguf_rebuild import files_of
from nybble.containers.gguf_tokenizer import PREFIX
from nybble.containers.gguf_write import CONFIG, FACTORS, FILE_TYPE_NAMES, PROVENANCE, Writer, make_metadata
from nybble.containers.streaming import Stream, write_stream
from nybble.errors import FileFormatError, InputError, UsageError, shown
from nybble.files.gguf import MAGIC, GgufFile, layout
from nybble.files.gguf_blocks import LAYOUTS, split
from nybble.files.json_strict import parse_object
from nybble.files.opening import open_file
from nybble.files.safetensors import FLOAT_TAGS, widen
from nybble.formats import Format, QTensor, parse_format
from nybble.formats.base import not_finite
from nybble.formats.integer import Integer
from nybble.models.arch import Architecture, table_for
from nybble.models.config_check import check_config

NAME = "gguf"
FOLDER = False
HOLDS = f"fp32, fp16, bf16 and ggml's {', '.join(LAYOUTS)}; int2 to int8 become the nearest of these"
OPTIONS: dict[str, tuple[tuple[str, ...], str]] = {
    "tokenizer": (
        ("ggml", "none"),
        "ggml: refuse a tokenizer that llama.cpp has no form of; none: a file without one, for token ids in and out",
    )
}

LARGEST_EXPONENT = 252
"""Of mxfp4: beyond it the largest level would not be a float32."""


def recognizes(path: Path) -> bool:
    """Whether a file begins as GGUF files do."""
    try:
        with open_file(path) as (file, _):
            return file.read(4) == MAGIC
    except InputError:
        return False


def read(path: Path) -> Contents:
    """What a GGUF file holds.

    Raises InputError for an architecture or a type of tensors that is not read here, FileFormatError for what is broken.
    """
    file = GgufFile(path)
    keys = Keys(file.metadata, path)
    if keys.whole("split.count", 1) > 1:
        raise InputError(f"{path} is one of {keys.whole('split.count')} parts; join them first (llama-gguf-split --merge)")
    table = table_of(keys.text("general.architecture"), path)
    _, gguf = parts_of(table)
    if "token_embd.weight" not in file.tensors:
        raise InputError(f"{path} has no tensor token_embd.weight: it holds no model")
    if keys.whole(f"{gguf.architecture}.block_count") > len(file.tensors):
        raise FileFormatError(f"{path}: more blocks than its {len(file.tensors)} tensors can be")
    factors = _factors(file, table)
    config = _config(file, keys, table, factors)
    where = _where(file, table, config)
    reader = _Reader(file, where, 0.0 if table.decoding is None else table.decoding.gain_offset)
    packed: dict[str, tuple[str, tuple[int, int]]] = {}
    floats: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, (place, inside) in where.items():
        entry = file.tensors[inside]
        if entry.type.name in FLOAT_TAGS:
            shape = entry.shape[::-1] if place.transposed and len(entry.shape) == 2 else entry.shape
            moved = reader.gain_offset and len(shape) == 1 and name.endswith(".weight")
            floats[name] = ("F32" if moved else entry.type.name, shape)
        else:
            packed[name] = (entry.type.name.lower(), (entry.shape[0], entry.shape[1]))
    return Contents(
        container=NAME,
        path=path,
        config=config,
        packed=packed,
        floats=floats,
        read_packed=reader.packed,
        read_float=reader.float,
        extras=files_of(keys),
        provenance=_stored_object(keys, PROVENANCE),
        details=_details(file, keys),
        files=(path,),
        bytes=path.stat().st_size,
    )


def _details(file: GgufFile, keys: Keys) -> dict[str, Any]:
    number = keys.whole("general.file_type", 1024)
    return {
        "version": file.version,
        "architecture": keys.text("general.architecture"),
        "name": keys.text("general.name", ""),
        "file_type": FILE_TYPE_NAMES.get(number, str(number)),
        "types": dict(Counter(entry.type.name for entry in file.tensors.values())),
        "metadata": file.metadata,
    }


def _stored_object(keys: Keys, key: str) -> dict[str, Any]:
    return parse_object(keys.text(key).encode(), f"{keys.where}: key {key}") if key in keys.metadata else {}


def _factors(file: GgufFile, table: Architecture) -> NDArray[np.float32] | None:
    """Llama 3's divisors of the rotary frequencies."""
    _, gguf = parts_of(table)
    if FACTORS not in file.tensors or not gguf.rotated:
        return None
    entry = file.tensors[FACTORS]
    if entry.type.name != "F32" or len(entry.shape) != 1:
        raise FileFormatError(f"{file.path}: {FACTORS} is {entry.type.name} {list(entry.shape)}, not a vector of F32")
    values = file.elements(FACTORS)
    if not np.isfinite(values).all() or (values < 1).any():
        raise FileFormatError(f"{file.path}: {FACTORS} has values that are no divisors from 1 on")
    return values


def _config(file: GgufFile, keys: Keys, table: Architecture, factors: NDArray[np.float32] | None) -> dict[str, Any]:
    """config.json: the one that the file keeps, where it says what llama.cpp's keys say; else made from those."""
    shape = file.tensors["token_embd.weight"].shape
    tied = "output.weight" not in file.tensors
    kept = _stored_object(keys, CONFIG)
    if kept:
        check_config(kept, f"{file.path}: key {CONFIG}")
    same = bool(kept) and _says_the_same(kept, file, table, shape[0], tied, factors)
    config = to_config(keys, table, shape, tied, None if same else factors)
    tags = Counter(entry.type.name for entry in file.tensors.values() if len(entry.shape) > 1)
    config["dtype"] = {"F16": "float16", "BF16": "bfloat16"}.get(tags.most_common(1)[0][0], "float32")
    if table.model_types[0] == "llama":
        config["attention_bias"] = "blk.0.attn_output.bias" in file.tensors
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in file.tensors
    check_config(config, file.path)
    tokens = keys.texts(f"{PREFIX}tokens")
    if tokens and len(tokens) != shape[0]:
        raise FileFormatError(f"{file.path}: it has {len(tokens)} tokens, token_embd.weight has {shape[0]} rows")
    return kept if same else config


def _says_the_same(
    kept: dict[str, Any],
    file: GgufFile,
    table: Architecture,
    vocabulary: int,
    tied: bool,
    factors: NDArray[np.float32] | None,
) -> bool:
    """Whether a config.json gives the very keys that a file has."""
    _, gguf = parts_of(table)
    if table_for(str(kept.get("model_type"))) is not table:
        return False
    try:
        again = to_keys(kept, table, vocabulary)
        wanted = rope_factors(kept, table)
    except (InputError, TypeError, ValueError, KeyError, ArithmeticError):
        return False
    there = {key: value for key, value in file.metadata.items() if key.startswith(f"{gguf.architecture}.")}
    if again != there or kept.get("tie_word_embeddings", table.ties_by_default) != tied:
        return False
    return wanted is factors if wanted is None or factors is None else np.array_equal(wanted, factors)


def _where(file: GgufFile, table: Architecture, config: Mapping[str, Any]) -> dict[str, tuple[Place, str]]:
    """Name in a checkpoint -> (its module's place, name in the file) of every tensor.

    Raises InputError for a tensor that the architecture has not or whose type is not read here, FileFormatError for one that is
    missing or has another shape than it can have.
    """
    found: dict[str, tuple[Place, str]] = {}
    for place in places(table, config):
        for leaf in LEAVES:
            if f"{place.name}{leaf}" in file.tensors:
                found[f"{place.module}{leaf}"] = (place, f"{place.name}{leaf}")
        if f"{place.module}.weight" not in found and place.name != "output":
            raise FileFormatError(f"{file.path} lacks tensor {place.name}.weight")
    named = {inside for _, inside in found.values()}
    for inside, entry in file.tensors.items():
        if inside not in named and not (inside == FACTORS and _factors(file, table) is not None):
            raise InputError(f"{file.path}: tensor {shown(inside)} has no place in a model of type {config['model_type']}")
        blocks = entry.type.name.lower() in LAYOUTS
        if not blocks and entry.type.name not in FLOAT_TAGS:
            known = ", ".join((*FLOAT_TAGS, *(name.upper() for name in LAYOUTS)))
            raise InputError(f"{file.path}: tensor {shown(inside)} is {entry.type.name}; nybble reads {known}")
        if len(entry.shape) > 2 or (blocks and len(entry.shape) != 2):
            raise FileFormatError(f"{file.path}: tensor {shown(inside)} has shape {list(entry.shape)}, where a matrix belongs")
    for place, inside in found.values():
        if place.heads and file.tensors[inside].shape[0] % (2 * place.heads):
            rows = file.tensors[inside].shape[0]
            raise FileFormatError(f"{file.path}: tensor {shown(inside)} has {rows} rows, which {place.heads} heads cannot share")
    return found


class _Reader:
    """Reads tensors by their names in a checkpoint."""

    def __init__(self, file: GgufFile, where: dict[str, tuple[Place, str]], gain_offset: float) -> None:
        self.file, self.where, self.gain_offset = file, where, gain_offset

    def packed(self, name: str) -> QTensor:
        place, inside = self._find(name)
        entry = self.file.tensors[inside]
        codes, params = split(entry.type.name.lower(), self.file.raw(inside), entry.shape[1])
        self._check_finite(inside, params)
        if place.heads:
            order = order_back(entry.shape[0], place.heads)
            codes, params = codes[order], {suffix: array[order] for suffix, array in params.items()}
        return QTensor(parse_format(entry.type.name.lower()), codes, params)

    def _check_finite(self, inside: str, params: Mapping[str, NDArray[Any]]) -> None:
        for suffix, array in params.items():
            bad = int(np.count_nonzero(array > LARGEST_EXPONENT)) if suffix == "exponent" else not_finite(array)
            if bad:
                raise FileFormatError(f"{self.file.path}: tensor {shown(inside)} has {bad} blocks whose {suffix} is not finite")

    def float(self, name: str) -> NDArray[Any]:
        place, inside = self._find(name)
        values = self.file.elements(inside)
        if place.heads:
            values = values[order_back(len(values), place.heads)]
        if place.transposed and values.ndim == 2:
            values = np.ascontiguousarray(values.T)
        if self.gain_offset and values.ndim == 1 and name.endswith(".weight"):
            return widen(self.file.tensors[inside].type.name, values, name) - np.float32(self.gain_offset)
        return values

    def _find(self, name: str) -> tuple[Place, str]:
        if name not in self.where:
            raise InputError(f"{self.file.path} has no tensor {shown(name)}; it has {len(self.where)} others")
        return self.where[name]


def candidates(fmt: Format, shape: tuple[int, int], kind: str) -> tuple[str, ...]:
    """A format of ggml's as it is; whole numbers in the formats with the same levels, the smallest first. nf4 and fp4: none."""
    if kind == "positions":
        return ("fp32",)
    if fmt.is_cast or fmt.name in LAYOUTS:
        return (str(fmt),)
    if not isinstance(fmt, Integer):
        return ()
    if shape[1] % 32:
        return ("fp16", "fp32")
    if fmt.asymmetric:  # levels less a zero point need a bit more; with a shift they do not, but it is rounded
        return {2: ("q4_1", "q4_0"), 3: ("q4_1", "q4_0"), 4: ("q4_1", "q5_0"), 5: ("q5_1", "q8_0")}.get(fmt.bits, ("q8_0",))
    return ("q4_0",) if fmt.bits <= 4 else ("q5_0",) if fmt.bits == 5 else ("q8_0",)


def stream(contents: Contents, options: Mapping[str, str]) -> Stream:
    """A GGUF file of any container's contents; what came from a GGUF file keeps its keys.

    Raises InputError for a model or tokenizer that llama.cpp has no form of, UsageError for rounded activations.
    """
    if contents.schemes:
        name, scheme = next(iter(contents.schemes.items()))
        raise UsageError(f"gguf holds weights only, {name} rounds its activations ({scheme.scheme}); use --file nybble")
    model_type = contents.config.get("model_type")
    table = table_for(str(model_type))
    if table.gguf is None or table.decoding is None:
        raise InputError(f"nybble writes no GGUF file of model_type {shown(model_type)}; use another --file")
    check_same(contents.config, table)
    writer = Writer(contents, table)
    tensors = writer.tensors()

    def head(provenance: Mapping[str, Any]) -> bytes:
        known = dataclasses.replace(contents, provenance=provenance)
        return layout(make_metadata(known, table, tensors, options), tensors)[0]

    _, places, size = layout(make_metadata(contents, table, tensors, options), tensors)
    return Stream("", writer.groups(tensors), places, size, head)


def write(path: Path, contents: Contents, options: Mapping[str, str]) -> None:
    """A GGUF file, all at once."""
    write_stream(path, stream(contents, options), contents.provenance)
