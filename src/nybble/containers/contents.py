"""What a model file or folder holds, whichever container it is: the one value between every reader and every writer.

Names are those of Hugging Face parameters, whatever the file calls them; a packed weight is [out, in], a float tensor lies as a
Hugging Face checkpoint has it (GPT-2's Conv1D [in, out]). Nothing is read before it is asked for.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nybble.errors import InputError
from nybble.files.opening import read_bytes
from nybble.files.safetensors import widen
from nybble.formats import QTensor
from nybble.formats.activations import Activations
from nybble.models.checkpoint import EXTRAS

LARGEST_EXTRA = 1 << 28
"""Bytes of a file that goes along: the largest tokenizers have a tenth of it."""


@dataclass(frozen=True)
class Contents:
    """A model as some container holds it."""

    container: str
    """Name of the container it came from, or is made for."""
    path: Path
    """Where it was read from."""
    config: Mapping[str, Any]
    """config.json, without its quantization_config."""
    packed: Mapping[str, tuple[str, tuple[int, int]]]
    """Name of each packed weight -> (format spec, shape [out, in])."""
    floats: Mapping[str, tuple[str, tuple[int, ...]]]
    """Name of each other tensor -> (safetensors dtype tag, shape)."""
    read_packed: Callable[[str], QTensor]
    """The packed weight of a name. Raises FileFormatError where its bytes are not what they should be."""
    read_float: Callable[[str], NDArray[Any]]
    """The float tensor of a name, as numpy has it (bfloat16: uint16 bit patterns)."""
    read_stored: Callable[[str], dict[str, NDArray[Any]]] | None = None
    """The arrays of `Format.storage` as they lie in the file, where they lie there as such: views, no codes unpacked."""
    by_rows: frozenset[str] = frozenset()
    """Names of tensors whose rows may be read apart, by `read_rows`: what they hold does not depend on the other rows."""
    read_rows: Callable[[str, slice], Any] | None = None
    """Some rows of such a tensor: a QTensor of a packed weight, an array of a float tensor."""
    schemes: Mapping[str, Activations] = field(default_factory=dict)
    """Name of a packed weight -> what becomes of its inputs; absent: they stay floats."""
    extras: Mapping[str, bytes] = field(default_factory=dict)
    """Files that go along: tokenizer.json, generation_config.json, ... by name."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """How it was made, where the file says."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Facts of the container itself that `inspect` shows: version, checkpoint format, metadata."""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Bytes that a packed weight takes in the file, where that is not what its format stores."""
    files: tuple[Path, ...] = ()
    """The file or files with weights that it was read from; none where it was not."""
    bytes: int = 0
    """Of the file, or of all files with weights."""

    @property
    def float_tag(self) -> str:
        """Type that the model's float tensors have by config.json: F32, F16 or BF16."""
        stated = str(self.config.get("dtype") or self.config.get("torch_dtype") or "float32")
        return {"float16": "F16", "bfloat16": "BF16"}.get(stated, "F32")

    def stored(self, name: str) -> dict[str, NDArray[Any]]:
        """The arrays of a packed weight as its format stores them: views of the file where it has them so."""
        return self.read_packed(name).stored() if self.read_stored is None else self.read_stored(name)

    def part(self, name: str, rows: slice | None) -> Any:
        """A tensor, or some rows of one that is in `by_rows`: a QTensor of a packed weight, an array of a float tensor."""
        if rows is not None and self.read_rows is not None:
            return self.read_rows(name, rows)
        return self.read_packed(name) if name in self.packed else self.read_float(name)

    def float32(self, name: str) -> NDArray[np.float32]:
        """A float tensor widened to float32. Raises FileFormatError for one that holds no floats."""
        return widen(self.floats[name][0], self.read_float(name), name)


def check_texts(contents: Contents) -> None:
    """Raise InputError for a model without a tokenizer: known before anything is loaded."""
    if not any(name in contents.extras for name in ("tokenizer.json", "vocab.json", "tokenizer.model", "vocab.txt")):
        raise InputError(f"{contents.path} has no tokenizer (tokenizer.json); copy it there from the model's source")


def read_extras(folder: Path) -> dict[str, bytes]:
    """The files of a model folder that go along with its weights: tokenizer, generation settings."""
    return {name: read_bytes(folder / name, LARGEST_EXTRA) for name in EXTRAS if (folder / name).is_file()}


def write_extras(folder: Path, config: Mapping[str, Any], extras: Mapping[str, bytes]) -> None:
    """config.json and the files that go along."""
    for name, content in extras.items():
        _write_durably(folder / name, content)
    _write_durably(folder / "config.json", (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())


def _write_durably(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
