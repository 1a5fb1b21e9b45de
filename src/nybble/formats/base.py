"""The contract of a number format, and the parts that every format shares.

A format answers two questions for a weight [N, K] = [out, in]: which values can a block hold (`levels`, `grid`), and
what is stored for it (`storage`, `bits_per_weight`). The value that a code stands for is always

    value = scale * (levels[code] - offset)          all in float32
    value = scale * levels[code] + offset            for a format that is `shifted`: ggml's, whose files hold minima

with scale and offset shared by the columns of one block. A block is a run of `block` columns of one row; the last block
of a row may be shorter (K = 172, block 64: 64 + 64 + 44). `tensor` granularity is one block for the whole matrix.

Which code a weight gets is a method's business; `encode` is rounding to the nearest value, which all methods need.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from nybble import kernels
from nybble.errors import NumericError, UsageError

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Codes = NDArray[np.unsignedinteger]
Params = dict[str, NDArray[Any]]
"""Suffix -> array as stored; which suffixes and types is the format's business."""
Granularity = Literal["tensor", "channel"] | int
Scalar = TypeVar("Scalar", bound=np.generic)

SLAB_WEIGHTS = 1 << 22
"""Weights worked on at once: temporaries in float64 stay below 100 MB whatever the size of the matrix."""
LARGEST_EXACT_HALF = 2048
"""Whole numbers up to this are exact in float16."""


class Format(ABC):
    """A number format. Subclasses are frozen dataclasses: equal specs are equal formats.

    Rounding is to nearest, ties to even unless the subclass says otherwise. Params are rounded to storage precision
    before codes are chosen. A block of zeros has scale 0 and decodes to zeros. NaN or infinite weights, and scales that
    overflow their storage type, raise NumericError.
    """

    name: str
    """First part of the spec string: `int4`, `nf4`, `fp16`."""
    bits: int
    """Bits of one code."""
    granularity: Granularity
    """`tensor`, `channel` (one block a row), or the number of columns of a block."""
    is_cast: bool = False
    """A floating format: no params, codes are the bit patterns of the floats."""
    is_integer: bool = False
    """Codes are whole numbers, which can be multiplied with whole numbers: what rounded activations need."""
    shifted: bool = False
    """The offset is a shift in values: value = scale * level + offset."""
    whole: int = 1
    """Rows are made of whole runs of so many columns: a format of ggml's has no short last block."""

    @property
    @abstractmethod
    def levels(self) -> Float32:
        """float32 [2**bits]: the value of each code before scaling."""

    @property
    def independent(self) -> bool:
        """Whether a block's params can be fitted without its neighbours (false for double quantization)."""
        return True

    @property
    def by_rows(self) -> bool:
        """Whether a row's codes and params do not depend on other rows."""
        return self.independent and self.granularity != "tensor"

    @abstractmethod
    def fit(self, weight: Float32, importance: Float32 | None = None) -> Params:
        """Params for a weight [N, K], in storage precision.

        Without importance, from the plain range of each block. With importance ([K] or [N, K], non-negative), those
        that minimise the importance-weighted squared error, by search; never worse than the plain range.
        Raises NumericError for weights that are not finite and for scales that overflow.
        """

    @abstractmethod
    def grid(self, params: Params) -> tuple[Float32, Float32 | None]:
        """(scale, offset), float32 [N, blocks] each, or [1, 1] per tensor; offset None means zero."""

    @abstractmethod
    def from_grid(self, scale: Float64, offset: Float64 | None) -> Params:
        """Params whose `grid` is nearest to a scale and offset of any precision, float64 [N, blocks] each: what a method
        that moves them by calculus calls. Exact for what `grid` gave, unless scales are stored in terms of each other."""

    def grid_of_rows(self, params: Params, rows: NDArray[np.int64]) -> tuple[Float32, Float32 | None]:
        """`grid` for some rows of the weight, int64 [T]: [T, blocks] each, or [1, 1] per tensor."""
        return self.grid({name: values if values.shape[0] == 1 else values[rows] for name, values in params.items()})

    def kernel_grid(self, params: Params) -> tuple[NDArray[Any], NDArray[Any] | None]:
        """`grid` as `kernels.lay` takes it, in as few bytes as hold it exactly: the scale as stored where it is stored as
        such, offsets in float16 where that is exact (zero points), C-contiguous and aligned."""
        scale: NDArray[Any]
        offset: NDArray[Any] | None
        if set(params) == {"scale"}:
            scale, offset = params["scale"], None
        else:
            scale, offset = self.grid(params)
            scale = params.get("scale", scale)
        if offset is not None and np.array_equal(offset, np.rint(offset)) and np.abs(offset).max(initial=0) <= LARGEST_EXACT_HALF:
            offset = offset.astype(np.float16)
        return np.require(scale, requirements=("C", "A")), offset if offset is None else np.require(
            offset, requirements=["C", "A"]
        )

    def kernel_parameters(self, params: Params) -> tuple[NDArray[Any] | kernels.Nested, NDArray[Any] | kernels.Nested | None]:
        """`kernel_grid` as `kernels.lay` takes it with the least memory: nested where scales are whole numbers of another."""
        return self.kernel_grid(params)

    @abstractmethod
    def encode(self, weight: Float32, params: Params) -> Codes:
        """Codes [N, K] of the representable values nearest to the weight [N, K]."""

    def round(self, weight: Float32, importance: Float32 | None = None) -> tuple[Codes, Params]:
        """(codes, params) of plain rounding: `fit`, then `encode`. A format overrides it whose reference chooses codes by a scale
        that is not rounded yet. Errors and importance as in `fit`."""
        params = self.fit(weight, importance)
        return self.encode(weight, params), params

    def round_stored(self, values: NDArray[Any], kind: str) -> tuple[Codes, Params] | None:
        """`round` of a weight [N, K] as a file has it: `kind` is f32, f16, or bf16 (uint16 bit patterns). None where there is no
        shorter way than to widen it first, or something is wrong with it, which that way then says."""
        return None

    def fallback(self, columns: int) -> str | None:
        """Spec of the format that takes this one's place where rows of `columns` are no multiple of `whole`; None: this one
        fits, or none does."""
        return None

    def check_columns(self, columns: int) -> None:
        """Raise UsageError for rows that this format cannot hold."""
        if columns % self.whole:
            raise UsageError(
                f"format {self} holds rows of a multiple of {self.whole} columns, not {columns}; "
                f"use {self.fallback(columns) or 'fp16'} for this tensor"
            )

    @abstractmethod
    def storage(self, shape: tuple[int, int]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """What is stored for a weight of this shape: suffix -> (numpy dtype name, shape)."""

    @abstractmethod
    def to_storage(self, codes: Codes, params: Params) -> dict[str, NDArray[Any]]:
        """The arrays of `storage`, made from codes and params."""

    @abstractmethod
    def from_storage(self, stored: dict[str, NDArray[Any]], shape: tuple[int, int]) -> tuple[Codes, Params]:
        """Inverse of `to_storage`, to the bit."""

    @abstractmethod
    def max_error(self, params: Params) -> Float64:
        """The stated bound of |w - decode(encode(w))| for plain `fit` params, float64 [N, blocks] or [1, 1]."""

    def block(self, columns: int) -> int:
        """Columns that share scale and offset, for a row of `columns`."""
        return self.granularity if isinstance(self.granularity, int) else columns

    def blocks(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Shape of the scales: (N, blocks a row), or (1, 1) per tensor."""
        rows, columns = shape
        return (1, 1) if self.granularity == "tensor" else (rows, -(-columns // self.block(columns)))

    def decode(self, codes: Codes, params: Params) -> Float32:
        """float32 [N, K]: the weight that codes and params stand for. This is the definition that kernels must match."""
        scale, offset = self.grid(params)
        values = self.levels[codes]
        block = self.block(codes.shape[1])
        if offset is not None and not self.shifted:
            values -= spread(offset, codes.shape[1], block)
        values *= spread(scale, codes.shape[1], block)
        if offset is not None and self.shifted:
            values += spread(offset, codes.shape[1], block)
        return values

    def stored_bits(self, shape: tuple[int, int]) -> int:
        """All bits stored for a weight of this shape: codes, scales, offsets, the padding of rows to whole bytes."""
        return sum(8 * np.dtype(dtype).itemsize * int(np.prod(size)) for dtype, size in self.storage(shape).values())

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        """`stored_bits` over the number of weights; equal to the bytes in the file."""
        return self.stored_bits(shape) / (shape[0] * shape[1])

    @abstractmethod
    def __str__(self) -> str:
        """The spec string: `parse_format(str(f)) == f`."""


class PackedFormat(Format):
    """A format whose codes of 1 to 8 bits are packed row by row (see `kernels.pack`)."""

    def storage(self, shape: tuple[int, int]) -> dict[str, tuple[str, tuple[int, ...]]]:
        rows, columns = shape
        return {"codes": ("uint8", (rows, kernels.row_bytes(columns, self.bits))), **self.param_storage(shape)}

    @abstractmethod
    def param_storage(self, shape: tuple[int, int]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """`storage` without the codes."""

    def to_storage(self, codes: Codes, params: Params) -> dict[str, NDArray[Any]]:
        return {"codes": kernels.pack(np.ascontiguousarray(codes, dtype=np.uint8), self.bits), **params}

    def from_storage(self, stored: dict[str, NDArray[Any]], shape: tuple[int, int]) -> tuple[Codes, Params]:
        packed = np.ascontiguousarray(stored["codes"], dtype=np.uint8)
        codes = kernels.unpack(packed, shape[1], self.bits)
        return codes, {name: array for name, array in stored.items() if name != "codes"}


def granularity_suffix(granularity: Granularity) -> str:
    """`:tensor`, `:channel`, `:g64`."""
    return f":g{granularity}" if isinstance(granularity, int) else f":{granularity}"


def scale_dtype(granularity: Granularity, wide: bool = False) -> str:
    """Storage type of scales: float16 for groups unless `wide`, float32 where there is one for a row or tensor and it costs
    nothing."""
    return "float16" if isinstance(granularity, int) and not wide else "float32"


def blocked(weight: NDArray[Scalar], granularity: Granularity) -> NDArray[Scalar]:
    """[N, K] seen as [rows, blocks, columns of a block]; a short last block is filled up with zeros (a copy)."""
    rows, columns = weight.shape
    if granularity == "tensor":
        return weight.reshape(1, 1, rows * columns)
    if granularity == "channel":
        return weight.reshape(rows, 1, columns)
    missing = -columns % granularity
    if missing:
        weight = np.pad(weight, ((0, 0), (0, missing)))
    return weight.reshape(rows, -1, granularity)


def spread(values: NDArray[Scalar], columns: int, block: int) -> NDArray[Scalar]:
    """Per-block values [N, blocks] repeated to [N, columns]; [N or 1, 1] is left to broadcasting."""
    return values if values.shape[1] == 1 else np.repeat(values, block, axis=1)[:, :columns]


def not_finite(scales: NDArray[np.floating]) -> int:
    """How many stored scales or offsets are not finite."""
    # Halves by their bits: numpy looks at them one by one, which takes ten times as long.
    if scales.dtype == np.float16:
        return int(np.count_nonzero((np.ascontiguousarray(scales).view(np.uint16) & 0x7C00) == 0x7C00))
    return scales.size - int(np.count_nonzero(np.isfinite(scales)))


def check_finite(weight: Float32) -> None:
    """Raise NumericError that says how many weights are not finite and where the first one is."""
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(weight.sum()):  # a sum of finite ones may overflow; one with another among them is never finite
            return
    bad = ~np.isfinite(weight)
    if bad.any():
        row, column = (int(i) for i in np.argwhere(bad)[0])
        raise NumericError(
            f"{int(bad.sum())} of {weight.size} weights are not finite, the first is {weight[row, column]} "
            f"at row {row}, column {column}; repair the checkpoint or keep this tensor in float"
        )


def store_up(values: Float64, dtype: str) -> NDArray[np.floating]:
    """Non-negative values rounded up to a storage type, so that the largest weight of a block is never clipped.

    Raises NumericError when a value exceeds the type's largest (65504 for float16).
    """
    target = np.dtype(dtype)
    largest = float(np.finfo(target).max)
    if values.size and float(values.max()) > largest:
        at = tuple(int(i) for i in np.unravel_index(int(values.argmax()), values.shape))
        raise NumericError(
            f"scale {values.max():.3g} of block {at} exceeds {largest:.5g}, the largest {dtype}; "
            "use per-channel scales (float32) or keep this tensor in float"
        )
    stored = values.astype(target)
    too_small = stored.astype(np.float64) < values
    stored[too_small] = np.nextafter(stored[too_small], target.type(np.inf))
    return stored


def nearest_stored(values: Float64, dtype: str) -> NDArray[np.floating]:
    """Values rounded to the nearest of a storage type; what lies beyond its largest becomes that."""
    largest = float(np.finfo(dtype).max)
    return np.clip(values, -largest, largest).astype(dtype)


def slabs(shape: tuple[int, int]) -> list[slice]:
    """Rows in runs of at most SLAB_WEIGHTS weights (one row at least)."""
    rows, columns = shape
    step = max(1, SLAB_WEIGHTS // max(1, columns))
    return [slice(start, min(rows, start + step)) for start in range(0, rows, step)]
