"""The tensors of a model by name, as the engine takes them: packed or float, from any container. No torch.

Weights are handed to the kernels straight from the mapped file where it has them as they are stored, and its pages are given
back once they are read: a model is in memory once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nybble import kernels
from nybble.containers.contents import Contents
from nybble.engine.program import Matrix
from nybble.errors import FileFormatError, InputError
from nybble.files.safetensors import FLOAT_TAGS
from nybble.formats import Format, parse_format

COMPUTED = ("dynamic",)
"""Schemes of activations that the engine takes."""
KINDS = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
CASTS = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}


class Weights:
    """Tensors of an open model. Names as in the checkpoint; one of the model's base class (`h.0...`) is found too."""

    def __init__(self, contents: Contents, prefix: str) -> None:
        """`prefix` is what the base model's names lack, e.g. `transformer.`."""
        _check_schemes(contents)
        self.contents = contents
        self.path: Path = contents.path
        self.prefix = prefix
        self.laid: dict[str, kernels.Laid] = {}

    def name(self, name: str) -> str | None:
        """The name under which the checkpoint has a tensor; None when it has not."""
        for candidate in (name, name.removeprefix(self.prefix)):
            if candidate in self.contents.packed or candidate in self.contents.floats:
                return candidate
        return None

    def shape_of(self, name: str) -> tuple[int, ...] | None:
        """Shape of a tensor as stored (packed ones are [out, in]); None where there is none."""
        found = self.name(name)
        if found is None:
            return None
        return self.contents.packed[found][1] if found in self.contents.packed else self.contents.floats[found][1]

    def vector(self, name: str) -> NDArray[np.float32]:
        """A float tensor [n] as float32. Raises FileFormatError for one of another shape or type."""
        values = self._float(name)
        if values.ndim != 1:
            raise FileFormatError(f"{self.path}: {name} has shape {values.shape}, the engine needs a vector")
        if not np.isfinite(values).all():
            raise InputError(f"{self.path}: {name} has values that are not finite; repair the checkpoint")
        return values

    def _float(self, name: str) -> NDArray[np.float32]:
        found = self.name(name)
        if found is None:
            raise InputError(f"{self.path} has no tensor {name}")
        if found in self.contents.packed:
            return self.contents.read_packed(found).decode()
        tag = self.contents.floats[found][0]
        if tag not in FLOAT_TAGS:
            raise FileFormatError(f"{self.path}: {found} is {tag}; the engine reads {', '.join(FLOAT_TAGS)}")
        return self.contents.float32(found)

    def matrix(self, matrix: Matrix, threads: int) -> kernels.Laid:
        """A weight in the kernel layout; the same object where two operations share it (a tied head)."""
        found = self.name(f"{matrix.name}.weight")
        if found is None:
            raise InputError(f"{self.path} has no tensor {matrix.name}.weight")
        if found not in self.laid:
            self.laid[found] = self._lay(found, matrix, threads)
        return self.laid[found]

    def _lay(self, name: str, matrix: Matrix, threads: int) -> kernels.Laid:
        if name in self.contents.packed:
            spec, shape = self.contents.packed[name]
            return self._lay_packed(name, parse_format(spec), shape, threads)
        tag, size = self.contents.floats[name]
        if tag not in KINDS or len(size) != 2:
            raise FileFormatError(f"{self.path}: {name} is {tag} {list(size)}; the engine reads float matrices")
        return kernels.lay_floats(_aligned(self.contents.read_float(name)), KINDS[tag], matrix.transposed, True, threads)

    def _lay_packed(self, name: str, fmt: Format, shape: tuple[int, int], threads: int) -> kernels.Laid:
        stored: dict[str, NDArray[Any]] = dict(self.contents.stored(name))
        for suffix, (dtype, size) in fmt.storage(shape).items():
            array = stored[suffix]
            if array.dtype != np.dtype(dtype) or array.shape != size:
                raise FileFormatError(f"{self.path}: {name}.{suffix} is {array.dtype} {array.shape}, {fmt} needs {dtype} {size}")
        drop = self.contents.read_stored is not None  # arrays of our own are given back when they go
        if fmt.is_cast:
            return kernels.lay_floats(_aligned(stored["values"]), CASTS[str(fmt)], False, drop, threads)
        codes = _aligned(stored.pop("codes"))
        scale, offset = fmt.kernel_parameters(stored)
        levels = np.ascontiguousarray(fmt.levels)
        block = fmt.block(shape[1])
        return kernels.lay(
            codes, shape[1], fmt.bits, levels, block, scale, offset, drop=drop, threads=threads, shifted=fmt.shifted
        )


def _check_schemes(contents: Contents) -> None:
    """The engine rounds activations in its own way, a scale for each token and 64 columns, or not at all: finer than `dynamic`
    asks for. Another scheme is another model. Raises InputError for one."""
    for name, scheme in contents.schemes.items():
        if scheme.scheme not in COMPUTED:
            raise InputError(
                f"{contents.path}: {name} is made for activations of scheme {scheme.scheme}, which the engine does not compute; "
                "torch does (nybble eval, nybble generate --runtime torch)"
            )


def _aligned(array: NDArray[Any]) -> NDArray[Any]:
    """The array itself, or a copy where the file has it at an odd address."""
    return np.require(array, requirements=("C", "A"))
