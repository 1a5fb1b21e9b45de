"""Optimizer states in 8 or 4 bits: codes of a fixed map and one float32 absmax for each block of elements.

    value = absmax * level[code]          absmax = the block's largest magnitude; a block of zeros has 0 and decodes to zeros

Eight bits (Dettmers et al., "8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861, sections 2.1 and 2.2): blocks of
256, the dynamic map, signed for the first moment and unsigned for the second. Four bits (Li et al., "Memory Efficient Optimizers
with 4-bit States", arXiv 2309.01507, section 4): blocks of 128, the signed dynamic map of four bits for the first moment, the
linear map 1/16 .. 16/16, which has no zero, for the second. The paper's rank-1 scales of the second moment are left out: they
need a matrix, and blocks serve every shape.

The zero point: an element whose second moment is stored as zero while its first is not takes a step of m / eps as soon as its
gradient is small, which is thousands of learning rates (arXiv 2309.01507, section 4.1). The linear map has no zero. In the
unsigned dynamic map a value above zero is stored as the smallest level above zero, never as zero, which the 8-bit paper does not
do; it differs from nearest only below 1.7e-7 of the absmax.

All maps come from `formats.codebook.dynamic_levels`, so that optimizer states and doubly quantized scales share one table.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from nybble.formats.base import Float32
from nybble.formats.codebook import dynamic_levels

BYTE = 8


@cache
def unsigned_levels() -> Float32:
    """The unsigned dynamic map of eight bits, float32 [256], ascending from 0 to 1: the bit of the sign goes to the fraction, so
    each cell of the signed map's positive half is cut in two. Within a float32 step of the table of bitsandbytes."""
    positive = dynamic_levels()[128:-1].astype(np.float64)  # behind 127 negative levels and zero; 1 is no midpoint of a cell
    decade = np.floor(np.log2(np.arange(1, positive.size + 1)))  # decade i holds 2^i of them
    quarter = 0.9 * 10.0 ** (decade - 6) / 2**decade / 4
    return np.sort(np.concatenate([[0.0], positive - quarter, positive + quarter, [1.0]])).astype(np.float32)


@cache
def signed_levels_of_four() -> Float32:
    """The signed dynamic map of four bits, float32 [16], ascending: the three lowest decades of the 8-bit map, made larger."""
    positive = dynamic_levels()[128:135].astype(np.float64) * 1e4
    return np.concatenate([-positive[::-1], [0.0], positive, [1.0]]).astype(np.float32)


@cache
def linear_levels() -> Float32:
    """1/16, 2/16 .. 1, float32 [16]: the linear map of four bits without zero."""
    return np.arange(1, 17, dtype=np.float32) / np.float32(16)


@dataclass(frozen=True)
class BlockMap:
    """How one moment is stored: a map of 2**bits ascending levels, and the elements that share an absmax."""

    name: str
    """`signed8`, `unsigned8`, `signed4` or `linear4`."""
    bits: int
    block: int
    """Elements, an even number."""

    @property
    def levels(self) -> Float32:
        """float32 [2**bits], ascending, the largest 1."""
        levels: Float32 = LEVELS[self.name]()
        return levels

    @property
    def max_error(self) -> float:
        """The bound of |value - stored value| over the block's absmax: half the widest gap, or what lies below the lowest level
        (the signed maps reach 1 but not -1; the linear one has no zero), and the float32 roundings of ratio and product."""
        levels = self.levels.astype(np.float64)
        signed = levels[0] < 0
        return float(max(np.diff(levels).max() / 2, 1 + levels[0] if signed else levels[0])) + 2.0**-22

    def sizes(self, count: int) -> tuple[int, int]:
        """(bytes of codes, number of absmax) for `count` elements."""
        return -(-count * self.bits // BYTE), -(-count // self.block)

    def zeros(self, count: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """(codes uint8, absmax float32) of `count` elements that are zero."""
        codes, blocks = self.sizes(count)
        return torch.zeros(codes, dtype=torch.uint8, device=device), torch.zeros(blocks, device=device)

    def store(self, values: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor) -> None:
        """Write the codes nearest to finite values float32 [n], and absmax, over `codes` uint8 and `absmax` float32 of the sizes
        of n. Ratios are rounded to float32; halfway between two levels the lower one is taken. Two codes of four bits share a
        byte, the first in its low half, as `kernels.pack` has them."""
        count = values.numel()
        if count % self.block:
            values = torch.nn.functional.pad(values, (0, -count % self.block))
        blocks = values.view(-1, self.block)
        torch.amax(blocks.abs(), 1, out=absmax)
        ratio = blocks / torch.where(absmax == 0, 1, absmax).unsqueeze(1)
        # The codes by the upper halves of the ratios, then at most one more: 18 times as fast as a binary search on the CPU.
        _, halves, boundaries = _tables(self, values.device)
        found = halves.index_select(0, (ratio.view(torch.int32) >> 16).bitwise_and_(0xFFFF).view(-1))
        found += ratio.view(-1) > boundaries.index_select(0, found)
        if self.bits == BYTE:
            codes.copy_(found[:count])
        else:
            found[count:] = 0
            pairs = found.view(-1, 2)
            codes.copy_((pairs[:, 0] | pairs[:, 1] << 4)[: codes.numel()])

    def load(self, codes: torch.Tensor, absmax: torch.Tensor, count: int) -> torch.Tensor:
        """The `count` values that codes and absmax stand for, a new float32 [count]."""
        values, _, _ = _tables(self, codes.device)
        found = values.index_select(0, codes.to(torch.int32)).view(torch.float32)[:count]
        whole = count // self.block
        found[: whole * self.block].view(-1, self.block).mul_(absmax[:whole].unsqueeze(1))
        if count % self.block:
            found[whole * self.block :].mul_(absmax[-1])
        return found


LEVELS = {
    "signed8": dynamic_levels,
    "unsigned8": unsigned_levels,
    "signed4": signed_levels_of_four,
    "linear4": linear_levels,
}
MAPS = {
    8: (BlockMap("signed8", 8, 256), BlockMap("unsigned8", 8, 256)),
    4: (BlockMap("signed4", 4, 128), BlockMap("linear4", 4, 128)),
}
"""Bits -> how the first and the second moment are stored."""


@cache
def _tables(how: BlockMap, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For a map, on a device: the values of each byte, float32 [256], or two of them as one int64 [256], which is four times as
    fast to look up as a row of two; the code int32 [65536] of the lowest ratio with each upper half of a float32; the boundary
    float32 [2**bits] above each code."""
    levels = how.levels
    boundaries = (levels[1:] + levels[:-1]) * np.float32(0.5)
    if levels[0] == 0:
        boundaries[0] = 0  # what is above zero stays above zero
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    ends = np.stack([upper.view(np.float32), (upper | 0xFFFF).view(np.float32)])
    ends[:, ~np.isfinite(ends).all(0)] = 2.0  # no ratio is
    lowest = np.searchsorted(boundaries, ends.min(0))
    assert (np.searchsorted(boundaries, ends.max(0)) - lowest).max() <= 1, f"{how.name}: two boundaries share an upper half"
    byte = np.arange(256)
    values = levels if how.bits == BYTE else levels[np.stack([byte & 15, byte >> 4], axis=1)].view(np.int64)[:, 0]
    above = np.append(boundaries, np.float32(np.inf))
    return tuple(torch.from_numpy(each).to(device) for each in (values, lowest.astype(np.int32), above))  # type: ignore[return-value]
