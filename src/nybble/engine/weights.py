"""The tensors of a model folder by name, as the engine takes them: ours (packed) or plain Hugging Face (float). No torch.

Weights are handed to the kernels straight from the mapped file, whose pages are given back once they are read: a model is
in memory once.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nybble import kernels
from nybble.engine.program import Matrix
from nybble.errors import FileFormatError, InputError
from nybble.files.native import NativeFile, open_native
from nybble.files.safetensors import SafetensorsFile
from nybble.formats import Format, parse_format
from nybble.models.checkpoint import Checkpoint

COMPUTED = ("dynamic",)
"""Schemes of activations that the engine takes."""
KINDS = {"F32": "f32", "F16": "f16", "BF16": "bf16"}


class Weights:
    """Tensors of an open folder. Names as in the checkpoint; one of the model's base class (`h.0...`) is found too."""

    def __init__(self, checkpoint: Checkpoint, prefix: str) -> None:
        """`prefix` is what the base model's names lack, e.g. `transformer.`."""
        self.native: NativeFile | None = None
        if "quantization_config" in checkpoint.config:
            self.native = open_native(checkpoint.folder)
            _check_schemes(self.native, checkpoint.folder)
            self.files: Mapping[str, SafetensorsFile] = dict.fromkeys(self.native.file.entries, self.native.file)
        else:
            opened = [SafetensorsFile(file) for file in checkpoint.files]
            self.files = {name: file for file in opened for name in file.entries}
        self.folder: Path = checkpoint.folder
        self.prefix = prefix
        self.packed = self.native.packed if self.native else {}
        self.laid: dict[str, kernels.Laid] = {}

    def name(self, name: str) -> str | None:
        """The name under which the checkpoint has a tensor; None when it has not."""
        for candidate in (name, name.removeprefix(self.prefix)):
            if candidate in self.packed or candidate in self.files:
                return candidate
        return None

    def shape_of(self, name: str) -> tuple[int, ...] | None:
        """Shape of a tensor as stored (packed ones are [out, in]); None where there is none."""
        found = self.name(name)
        if found is None:
            return None
        return self.packed[found][1] if found in self.packed else self.files[found].entries[found].shape

    def vector(self, name: str) -> NDArray[np.float32]:
        """A float tensor [n] as float32. Raises FileFormatError for one of another shape or type."""
        values = self._float(name)
        if values.ndim != 1:
            raise FileFormatError(f"{self.folder}: {name} has shape {values.shape}, the engine needs a vector")
        if not np.isfinite(values).all():
            raise InputError(f"{self.folder}: {name} has values that are not finite; repair the checkpoint")
        return values

    def _float(self, name: str) -> NDArray[np.float32]:
        found = self.name(name)
        if found is None:
            raise InputError(f"{self.folder} has no tensor {name}")
        if found in self.packed:
            assert self.native is not None
            return self.native.read(found).decode()
        entry, stored = self.files[found].entries[found], self.files[found].read(found)
        if entry.dtype not in KINDS:
            raise FileFormatError(f"{self.folder}: {found} is {entry.dtype}; the engine reads {', '.join(KINDS)}")
        if entry.dtype == "BF16":
            return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return stored.astype(np.float32)

    def matrix(self, matrix: Matrix, threads: int) -> kernels.Laid:
        """A weight in the kernel layout; the same object where two operations share it (a tied head)."""
        found = self.name(f"{matrix.name}.weight")
        if found is None:
            raise InputError(f"{self.folder} has no tensor {matrix.name}.weight")
        if found not in self.laid:
            self.laid[found] = self._lay(found, matrix, threads)
        return self.laid[found]

    def _lay(self, name: str, matrix: Matrix, threads: int) -> kernels.Laid:
        if name in self.packed:
            spec, shape = self.packed[name]
            return self._lay_packed(name, parse_format(spec), shape, threads)
        entry = self.files[name].entries[name]
        if entry.dtype not in KINDS or len(entry.shape) != 2:
            raise FileFormatError(f"{self.folder}: {name} is {entry.dtype} {list(entry.shape)}; the engine reads float matrices")
        return kernels.lay_floats(self.files[name].read(name), KINDS[entry.dtype], matrix.transposed, True, threads)

    def _lay_packed(self, name: str, fmt: Format, shape: tuple[int, int], threads: int) -> kernels.Laid:
        assert self.native is not None
        stored: dict[str, NDArray[Any]] = {}
        for suffix, (dtype, size) in fmt.storage(shape).items():
            array = self.native.file.read(f"{name}.{suffix}")
            if array.dtype != np.dtype(dtype) or array.shape != size:
                raise FileFormatError(
                    f"{self.folder}: {name}.{suffix} is {array.dtype} {array.shape}, {fmt} needs {dtype} {size}"
                )
            stored[suffix] = array
        if fmt.is_cast:
            kind = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}[str(fmt)]
            return kernels.lay_floats(stored["values"], kind, False, True, threads)
        codes = _aligned(stored.pop("codes"))
        scale, offset = fmt.kernel_grid(stored)
        levels = np.ascontiguousarray(fmt.levels)
        block = fmt.block(shape[1])
        return kernels.lay(
            codes, shape[1], fmt.bits, levels, block, scale, offset, drop=True, threads=threads, shifted=fmt.shifted
        )


def _check_schemes(native: NativeFile, folder: Path) -> None:
    """The engine rounds activations in its own way, a scale for each token and 64 columns, or not at all: finer than `dynamic`
    asks for. Another scheme is another model. Raises InputError for one."""
    for name, scheme in native.schemes.items():
        if scheme.scheme not in COMPUTED:
            raise InputError(
                f"{folder}: {name} is made for activations of scheme {scheme.scheme}, which the engine does not compute; "
                "torch does (nybble eval, nybble generate --runtime torch)"
            )


def _aligned(array: NDArray[Any]) -> NDArray[Any]:
    """The array itself, or a copy where the file has it at an odd address."""
    return np.require(array, requirements=("C", "A"))
