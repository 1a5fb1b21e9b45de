"""Sparse folders: Hugging Face folders of ours that hold, of each packed weight, only what is not zero.

As nybble's own folders (files/native.py), but in the place of `NAME.codes` (or `NAME.values` of a floating format) stand

    NAME.kept    the codes that are not that of zero, row after row, packed at their bits (floats: as they are)
    NAME.mask    uint8 [N, ceil(K / 8)]: bit j of a row, lowest first, says that column j is kept

so that a weight of b bits takes 1 + b * (share kept) instead of b: half of it zero, 3 for int4, 9 for fp16. A weight that would
not be smaller stands as it does there. config.json has `"quant_method": "nybble-sparse"`. Torch and the engine compute with all
codes again: this saves disk and transfer, not memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nybble.containers.contents import Contents, read_extras, write_extras
from nybble.containers.spilled import Spilled
from nybble.errors import FileFormatError, InputError, shown
from nybble.files import safetensors
from nybble.files.json_strict import parse_object
from nybble.files.native import PROVENANCE, WEIGHTS, check_numbers, config_entry, read_entry, read_schemes
from nybble.files.safetensors import SafetensorsFile
from nybble.formats import Format, QTensor, parse_format
from nybble.formats.activations import Activations
from nybble.formats.nonzero import KEPT, MASK, keep_nonzero, spread_kept
from nybble.models.checkpoint import open_checkpoint

NAME = "nybble-sparse"
FOLDER = True
HOLDS = "every format; zeros of pruned weights take one bit"
OPTIONS: dict[str, tuple[tuple[str, ...], str]] = {}


def recognizes(path: Path) -> bool:
    """Whether a folder's config.json names this container."""
    try:
        entry = open_checkpoint(path).config.get("quantization_config") if path.is_dir() else None
    except InputError:
        return False
    return isinstance(entry, dict) and entry.get("quant_method") == NAME


def candidates(fmt: Format, shape: tuple[int, int], kind: str) -> tuple[str, ...]:
    """Every format as it is."""
    return (str(fmt),)


def read(path: Path) -> Contents:
    """What a sparse folder holds."""
    checkpoint = open_checkpoint(path)
    entry = checkpoint.config.get("quantization_config")
    if not isinstance(entry, dict) or entry.get("quant_method") != NAME:
        raise FileFormatError(f"{path} is no folder of {NAME}: its config.json does not name it")
    ours = {**entry, "quant_method": "nybble"}
    file = SafetensorsFile(path / WEIGHTS)
    try:
        packed, schemes = read_entry(ours), read_schemes(ours)
    except FileFormatError as error:
        raise FileFormatError(f"{path / 'config.json'}: {error}") from error
    reader = _Reader(file, packed, schemes)
    used = {f"{name}.{suffix}" for name in packed for suffix in reader.suffixes(name)}
    return Contents(
        container=NAME,
        path=path,
        config={key: value for key, value in checkpoint.config.items() if key != "quantization_config"},
        packed=packed,
        floats={name: (e.dtype, e.shape) for name, e in file.entries.items() if name not in used},
        read_packed=reader.tensor,
        read_float=file.read,
        schemes={name: reader.scheme(name, scheme) for name, scheme in schemes.items()},
        extras=read_extras(path),
        provenance=parse_object(file.metadata.get(PROVENANCE, "{}").encode("utf-8"), f"{file.path}: its provenance"),
        files=checkpoint.files,
        bytes=checkpoint.bytes,
        sizes={name: sum(file.entries[f"{name}.{suffix}"].bytes for suffix in reader.suffixes(name)) for name in packed},
    )


@dataclass(frozen=True)
class _Reader:
    file: SafetensorsFile
    packed: Mapping[str, tuple[str, tuple[int, int]]]
    schemes: Mapping[str, Activations]

    def suffixes(self, name: str) -> list[str]:
        """What stands in the file for a weight. Raises FileFormatError where something of it is missing."""
        spec, shape = self.packed[name]
        found = list(parse_format(spec).storage(shape))
        if f"{name}.{MASK}" in self.file.entries:
            found[found.index(_dense(found))] = KEPT
            found.append(MASK)
        if name in self.schemes:
            found += list(self.schemes[name].stored())
        for suffix in found:
            if f"{name}.{suffix}" not in self.file.entries:
                raise FileFormatError(f"{self.file.path} lacks tensor {shown(f'{name}.{suffix}')}, which config.json names")
        return found

    def scheme(self, name: str, scheme: Activations) -> Activations:
        """A scheme with the numbers that the file has for it."""
        try:
            return scheme.with_stored({suffix: self.file.read(f"{name}.{suffix}") for suffix in scheme.stored()})
        except ValueError as error:
            raise FileFormatError(f"{self.file.path}: tensor {shown(name)}: {error}") from error

    def tensor(self, name: str) -> QTensor:
        """A packed weight with all its codes. Raises FileFormatError where its arrays do not fit each other."""
        spec, shape = self.packed[name]
        fmt = parse_format(spec)
        inside = [suffix for suffix in fmt.storage(shape) if f"{name}.{suffix}" in self.file.entries]
        stored = {suffix: self.file.read(f"{name}.{suffix}").copy() for suffix in inside}
        check_numbers(self.file, name, stored)
        try:
            if f"{name}.{MASK}" in self.file.entries:
                kept, mask = (self.file.read(f"{name}.{suffix}") for suffix in (KEPT, MASK))
                stored[_dense(list(fmt.storage(shape)))] = spread_kept(fmt, shape, kept, mask)
            scheme = self.schemes.get(name)
            return QTensor.from_stored(fmt, stored, shape, None if scheme is None else self.scheme(name, scheme))
        except (ValueError, InputError) as error:
            raise FileFormatError(f"{self.file.path}: tensor {shown(name)}: {error}") from error


def write(path: Path, contents: Contents, options: Mapping[str, str]) -> None:
    """A sparse folder."""
    arrays = Spilled(path)
    for name in contents.packed:
        tensor = contents.read_packed(name)
        inputs = tensor.activations.stored() if tensor.activations else {}
        stored = dict(tensor.stored())
        dense = _dense(list(stored))
        kept, mask = keep_nonzero(tensor)
        if kept.nbytes + mask.nbytes < stored[dense].nbytes:
            stored = {KEPT if suffix == dense else suffix: kept if suffix == dense else a for suffix, a in stored.items()}
            stored[MASK] = mask
        for suffix, array in (*stored.items(), *inputs.items()):
            bfloat = str(tensor.format) == "bf16" and suffix in (KEPT, dense)
            arrays[f"{name}.{suffix}"] = "BF16" if bfloat else safetensors.NAMES[array.dtype.name], array
    for name, (tag, _) in contents.floats.items():
        arrays[name] = tag, contents.read_float(name)
    provenance = json.dumps(contents.provenance, sort_keys=True)
    arrays.write(path / WEIGHTS, {"format": "pt", PROVENANCE: provenance})
    config = {**contents.config, "quantization_config": {**config_entry(contents.packed, contents.schemes), "quant_method": NAME}}
    write_extras(path, config, contents.extras)


def _dense(suffixes: list[str]) -> str:
    """Which of a format's arrays holds the codes."""
    return "codes" if "codes" in suffixes else "values"
