"""What all quantized Hugging Face folders share: config.json with a `quantization_config`, safetensors files in one piece or in
shards, tensors named after the module whose weight they make up, and everything else under its own name as floats.

Reading asks for every tensor by name, type and shape before its bytes are touched, so that a folder that is not what its
settings say is one line that names the tensor, what it is, and what it should be.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nybble.containers.contents import Contents, read_extras, write_extras
from nybble.containers.float import float_matrix, is_transposed
from nybble.containers.spilled import Spilled
from nybble.errors import FileFormatError, InputError, UsageError, shown
from nybble.files.json_strict import parse_object, read_object
from nybble.files.safetensors import FLOAT_TAGS, SafetensorsFile, forget_pages, widen
from nybble.files.safetensors_header import Entry
from nybble.formats import QTensor, parse_format
from nybble.formats.activations import Activations
from nybble.models.arch import table_for
from nybble.models.checkpoint import open_checkpoint
from nybble.version import __version__

WEIGHTS = "model.safetensors"
QUANTIZER = f"nybble:{__version__}"
FLOATS = ("fp32", "fp16", "bf16")
PROVENANCE = "nybble"
"""Key of the safetensors metadata that holds the provenance as JSON."""

_INDEX = re.compile(r"(?:^|\.)\d+\.")


class Folder:
    """A quantized folder, open: its settings, and where each tensor lies.

    Raises InputError and FileFormatError as `open_checkpoint` does, FileFormatError for settings of another method.
    """

    def __init__(self, path: Path, method: str) -> None:
        checkpoint = open_checkpoint(path)
        self.path = path
        self.bytes = checkpoint.bytes
        self.files = checkpoint.files
        self.config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
        settings = checkpoint.config.get("quantization_config")
        if not isinstance(settings, dict) or settings.get("quant_method") != method:
            found = settings.get("quant_method") if isinstance(settings, dict) else settings
            raise FileFormatError(f"{path / 'config.json'}: quant_method is {shown(found)}, not {method!r}")
        self.settings: dict[str, Any] = settings
        opened = [SafetensorsFile(file) for file in checkpoint.files]
        self._files = {name: file for file in opened for name in file.entries}
        self._metadata = opened[0].metadata if opened else {}

    def broken(self, why: str) -> FileFormatError:
        """The error for a folder that is not what it should be."""
        return FileFormatError(f"{self.path}: {why}")

    def setting(self, key: str, allowed: Sequence[Any], default: Any) -> Any:
        """A setting that must be one of some values, `default` where it is absent."""
        value = self.settings.get(key, default)
        if not any(type(value) is type(one) and value == one for one in allowed):
            raise self.broken(
                f"{key} of quantization_config is {shown(value)}; nybble reads {', '.join(str(one) for one in allowed)}"
            )
        return value

    def modules(self, suffix: str) -> list[str]:
        """The modules that have a tensor of this name, in the order of the file."""
        return [name.removesuffix(f".{suffix}") for name in self._files if name.endswith(f".{suffix}")]

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def entry(self, name: str, tags: Sequence[str], shape: Sequence[int | None]) -> Entry:
        """A tensor's entry, once its type is one of `tags` and its shape is `shape`; None stands for any size above 0."""
        if name not in self._files:
            raise self.broken(f"tensor {shown(name)} is missing")
        entry = self._files[name].entries[name]
        if entry.dtype not in tags:
            raise self.broken(f"tensor {shown(name)} is {entry.dtype}, it must be {' or '.join(tags)}")
        fits = len(entry.shape) == len(shape) and all(
            (size > 0) if wanted is None else size == wanted for size, wanted in zip(entry.shape, shape, strict=True)
        )
        if not fits:
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise self.broken(f"tensor {shown(name)} has shape {list(entry.shape)}, it must be [{wanted}]")
        return entry

    def dimensions(self, name: str) -> int:
        """How many sizes the shape of a tensor has."""
        if name not in self._files:
            raise self.broken(f"tensor {shown(name)} is missing")
        return len(self._files[name].entries[name].shape)

    def read(self, name: str) -> NDArray[Any]:
        """A tensor, as a view of the file; check it with `entry` first."""
        return self._files[name].read(name)

    def scales(self, name: str) -> NDArray[np.float32]:
        """A tensor of scales, widened to float32; all finite."""
        scales = widen(self._files[name].entries[name].dtype, self.read(name), name)
        bad = ~np.isfinite(scales)
        if bad.any():
            at = tuple(int(i) for i in np.argwhere(bad)[0])
            raise self.broken(f"tensor {shown(name)} holds {int(bad.sum())} values that are not finite, the first at {at}")
        return scales

    def wide_scales(self, name: str) -> NDArray[np.float32] | None:
        """A tensor of scales, unless it is stored as float16."""
        return None if self._files[name].entries[name].dtype == "F16" else self.scales(name)

    def contents(
        self,
        container: str,
        packed: Mapping[str, tuple[str, tuple[int, int]]],
        used: set[str],
        read_packed: Callable[[str], QTensor],
        schemes: Mapping[str, Activations] | None = None,
    ) -> Contents:
        """The folder as a value. `used` are the tensors that make up the packed weights; all others are floats."""
        for name in packed:
            if name in self._files and name not in used:
                raise self.broken(f"tensor {shown(name)} stands beside a packed weight of the same name")

        def read(name: str) -> QTensor:
            try:
                return read_packed(name)
            except ValueError as error:  # of words that do not fit their shape, of scales that no format holds
                if isinstance(error, FileFormatError):
                    raise
                raise self.broken(f"tensor {shown(name)}: {error}") from error

        return Contents(
            container=container,
            path=self.path,
            config=self.config,
            packed=packed,
            floats={n: (f.entries[n].dtype, f.entries[n].shape) for n, f in self._files.items() if n not in used},
            read_packed=read,
            read_float=self.read,
            schemes=schemes or {},
            extras=read_extras(self.path),
            provenance=self._provenance(),
            details={key: value for key, value in self.settings.items() if not isinstance(value, dict | list)},
            files=self.files,
            bytes=self.bytes,
        )

    def _provenance(self) -> dict[str, Any]:
        if PROVENANCE not in self._metadata:
            return {}
        return parse_object(self._metadata[PROVENANCE].encode(), f"{self.path}: its provenance")


def says(path: Path, method: str) -> bool:
    """Whether a folder's config.json names a quantization method. Raises nothing."""
    try:
        entry = read_object(path / "config.json").get("quantization_config")
    except InputError:
        return False
    return isinstance(entry, dict) and entry.get("quant_method") == method


def layers(contents: Contents, container: str, conv1d: bool) -> list[str]:
    """Names of the weights to be packed, in order. Raises UsageError where there is none, for one that is no layer, and,
    unless `conv1d`, for one that its architecture stores [in, out]: what loads this container knows Linear layers only."""
    table = table_for(str(contents.config.get("model_type")))
    names = sorted(name for name, (spec, _) in contents.packed.items() if not parse_format(spec).is_cast)
    if not names:
        raise UsageError(f"{container} is for quantized layers, and no layer of this model is; name a format, or --file float")
    for name in names:
        role = table.others.get(name.removesuffix(".weight"), "")
        if role in ("head", "token table", "position table"):
            raise UsageError(f"{container} packs the layers of blocks; {name} ({role}) has to stay in float")
        if not conv1d and is_transposed(contents.config, name):
            raise UsageError(
                f"{container} is loaded into Linear layers, and {name} is a Conv1D; "
                f"{contents.config.get('model_type')} fits into gguf, gptq, bitsandbytes and nybble"
            )
    return names


def float_modules(contents: Contents) -> list[str]:
    """Modules with a float matrix that may be a layer, and the head, tied or not: what a loader must not take for packed."""
    table = table_for(str(contents.config.get("model_type")))
    names = {name for name, (spec, _) in contents.packed.items() if parse_format(spec).is_cast}
    names |= {name for name, (tag, shape) in contents.floats.items() if len(shape) == 2 and tag in FLOAT_TAGS}
    found = {name.removesuffix(".weight") for name in names if name.endswith(".weight")}
    found = {name for name in found if table.others.get(name) not in ("token table", "position table")}
    return sorted(found | {table.tied[0] if table.tied else "lm_head"})


def inside_block(contents: Contents, module: str) -> str | None:
    """A module's name inside its block (`self_attn.q_proj`); None outside the blocks."""
    table = table_for(str(contents.config.get("model_type")))
    block = table.block_of(f"{module}.")
    if block is None:
        return None
    if table.block:
        return module.removeprefix(table.block.format(i=block)).removeprefix(".")
    match = _INDEX.search(module)
    return module[match.end() :] if match else None


def skipped(contents: Contents) -> dict[str, dict[str, Any]]:
    """Layers of blocks that stay in float, as GPTQModel and vLLM take them in `dynamic`: patterns of what is not packed."""
    kept = (module for module in float_modules(contents) if inside_block(contents, module))
    return {f"-:{re.escape(module)}$": {} for module in kept}


def one_setting(container: str, what: str, found: Mapping[str, Any]) -> Any:
    """The value that all weights share; `found` is name -> value. Raises UsageError that names two that differ."""
    first, *others = found.items()
    for name, value in others:
        if value != first[1]:
            raise UsageError(
                f"{container} has one {what} for all layers: {first[0]} has {first[1]}, {name} has {value}; "
                "give all of them the same format with --to, or keep one of them in float"
            )
    return first[1]


def write_folder(
    path: Path,
    contents: Contents,
    arrays: Spilled,
    settings: Mapping[str, Any],
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Write config.json with the settings, one safetensors file and the files that go along. `arrays` are those of the packed
    layers; floats are added, wide types first, so that every tensor is aligned to its type."""
    for name, (spec, _) in contents.packed.items():
        if parse_format(spec).is_cast:
            arrays[name] = float_matrix(contents, name)
            forget_pages()
    for name, (tag, _) in contents.floats.items():
        arrays[name] = tag, contents.read_float(name)
        forget_pages()
    metadata = {"format": "pt"}
    if contents.provenance:
        metadata[PROVENANCE] = json.dumps(contents.provenance, sort_keys=True)
    arrays.write(path / WEIGHTS, metadata)
    config = {**contents.config, "quantization_config": dict(settings)}
    write_extras(path, config, {**contents.extras, **(files or {})})


def as_json(value: Mapping[str, Any]) -> bytes:
    """A JSON file, as config.json is written."""
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
