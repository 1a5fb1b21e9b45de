"""Whole-number weights as GPTQ, AWQ and compressed-tensors share them: scales for groups of columns, with or without zero points.

    value = scale * (code - zero)        zero 2^(bits-1) everywhere where a file has no zero points

is the formula of our own `int` formats, so codes and zero points go over as they are. Two things may differ. A group may be
larger than ours go (512): its scale is then written for each of our groups in it. And a scale may be stored in another type:
where one of a tensor's is no float16, the format is the one with float32 scales (`f32`), so nothing is rounded in silence.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nybble.errors import NumericError
from nybble.formats import Format, QTensor, parse_format
from nybble.formats.base import Params, slabs
from nybble.formats.spec import GROUPS

WHOLE_ROW = -1
"""A group size that stands for all columns."""


def spec_of(bits: int, group: int, columns: int, asymmetric: bool, scale: NDArray[np.float32] | None) -> str:
    """The spec of our format for groups of `group` columns; `scale` are its scales where they are not stored as float16.

    Raises ValueError for a group that is none of ours and holds none of them in whole numbers."""
    inner = next((size for size in sorted(GROUPS, reverse=True) if group % size == 0), None)
    if group == WHOLE_ROW or (group >= columns and group not in GROUPS):
        suffix = "channel"
    elif inner is None:
        raise ValueError(
            f"groups of {group} columns; nybble has groups of {', '.join(map(str, GROUPS))}, their multiples, and whole rows"
        )
    else:
        suffix = f"g{inner}"
    wide = suffix != "channel" and scale is not None and not are_halves(scale)
    return f"int{bits}:{suffix}{',asym' if asymmetric else ''}{',f32' if wide else ''}"


def are_halves(scale: NDArray[np.float32]) -> bool:
    """Whether float16 holds all of these float32."""
    with np.errstate(over="ignore"):
        return bool(np.array_equal(scale.astype(np.float16).astype(np.float32), scale))


def narrowed(tensor: QTensor) -> QTensor:
    """A tensor with float32 scales in groups in the format with float16 ones, where those hold them: what reading gives."""
    fmt = tensor.format
    if not getattr(fmt, "wide", False) or not are_halves(tensor.params["scale"]):
        return tensor
    scale = tensor.params["scale"].astype(np.float16)
    narrow = parse_format(str(fmt).removesuffix(",f32"))
    return QTensor(narrow, tensor.codes, {**tensor.params, "scale": scale}, tensor.activations)


def tensor_of(
    fmt: Format, codes: NDArray[np.uint8], group: int, scale: NDArray[np.float32], zero: NDArray[np.uint8] | None
) -> QTensor:
    """A weight from codes [N, K], scale float32 [N, groups] and zero points [N, groups] of a file's own groups.

    Raises ValueError for a scale that the format does not hold exactly.
    """
    _, blocks = fmt.blocks((codes.shape[0], codes.shape[1]))
    times = 1 if group == WHOLE_ROW else max(1, group // fmt.block(codes.shape[1]))
    check_range(scale, float(np.abs(fmt.levels).max()))

    def params(rows: slice) -> Params:
        wide = np.repeat(scale[rows], times, axis=1)[:, :blocks]
        zeros = None if zero is None else np.repeat(zero[rows], times, axis=1)[:, :blocks].astype(np.float64)
        found = fmt.from_grid(wide.astype(np.float64), zeros)
        kept = found["scale"].astype(np.float32)
        if not np.array_equal(kept, wide):
            row, block = (int(i) for i in np.argwhere(kept != wide)[0])
            raise ValueError(
                f"scale {wide[row, block]:.9g} of row {rows.start + row}, group {block} is no {found['scale'].dtype}, "
                f"in which {fmt} keeps its scales"
            )
        return found

    # By rows: between files and formats scales and zero points pass through float64.
    parts = [params(rows) for rows in slabs((len(scale), codes.shape[1]))]
    return QTensor(fmt, codes, {name: np.concatenate([part[name] for part in parts]) for name in parts[0]})


def check_range(scale: NDArray[np.float32], levels: float) -> None:
    """Raise ValueError for scales [N, groups] that give infinite values with levels up to this magnitude."""
    largest = float(np.abs(scale).max(initial=0))
    if not largest * levels <= float(np.finfo(np.float32).max):
        raise ValueError(f"scale {largest:.5g} gives values beyond the largest float32")


def grid_of(tensor: QTensor) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """(scale float32, zero uint8) [N, groups] each; the zero point of a symmetric format is the middle of its codes."""
    scale, offset = tensor.format.grid(tensor.params)
    zero = np.full_like(scale, 2 ** (tensor.format.bits - 1)) if offset is None else offset
    return scale, zero.astype(np.uint8)


def halves(scale: NDArray[np.float32], name: str, container: str) -> NDArray[np.float16]:
    """Scales as float16. Raises NumericError for one that is none, which no group's is and a row's may be."""
    with np.errstate(over="ignore"):
        stored = scale.astype(np.float16)
    bad = stored.astype(np.float32) != scale
    if bad.any():
        row = int(np.argwhere(bad)[0][0])
        raise NumericError(
            f"{name}: scale {scale[bad][0]:.9g} of row {row} is no float16, as {container} stores it; use groups (:g128)"
        )
    return stored


def settled(tensor: QTensor) -> QTensor:
    """A tensor as a container keeps it that stores every scale as float16 and says nothing of inputs: the same codes, scales
    rounded to float16 where they are wider. Raises NumericError for a scale that overflows."""
    tensor = narrowed(tensor)
    scale = tensor.params["scale"]
    with np.errstate(over="ignore"):
        rounded = scale.astype(np.float16).astype(scale.dtype)
    if not np.isfinite(rounded).all():
        raise NumericError(f"scale {np.abs(scale).max():.5g} exceeds 65504, the largest float16; keep this tensor in float")
    return QTensor(tensor.format, tensor.codes, {**tensor.params, "scale": rounded})


def nearest(fmt: Format, shape: tuple[int, int], bits: Sequence[int], groups: Sequence[int], channel: bool) -> str | None:
    """The spec of the whole-number format with these bits and groups that is closest to `fmt` from above, for a weight [N, K]:
    the same values where `fmt` is of whole numbers. None where no group divides the columns, or no format has as many bits.

    Blocks of 16 become groups of 32, which one more bit makes up for.
    """
    columns = shape[1]
    block = fmt.block(columns)
    one_block = fmt.granularity in ("tensor", "channel")
    needed = fmt.bits + (block < min(GROUPS) and not one_block)
    wide = min((b for b in bits if b >= needed), default=None)
    if wide is None:
        return None
    asymmetric = fmt.shifted or bool(getattr(fmt, "asymmetric", False))
    option = ",asym" if asymmetric else ""
    if one_block and channel:
        return f"int{wide}:channel{option}"
    fitting = [size for size in groups if columns % size == 0 and size <= max(block, min(groups))]
    return str(parse_format(f"int{wide}:g{max(fitting)}{option}")) if fitting else None
