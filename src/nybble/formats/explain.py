"""The number formats explained: figures of every format that nybble has, and of floats it has not, for comparison.

    explain_all()    one Explanation a format, in the order of the table
    explain(spec)    that of one format

Every figure of a format of ours is asked of the format object (levels, storage, `bits_per_weight`, `max_error`), so a new
family explains itself; only how it rounds is said in words here. Those of floats follow from their layout (floating.py). Pure
values, no printing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from nybble.errors import UsageError, unknown_name
from nybble.formats.base import Format
from nybble.formats.cast import Cast
from nybble.formats.codebook import Codebook
from nybble.formats.floating import OTHERS, Floating
from nybble.formats.ggml import GgmlBlocks
from nybble.formats.integer import Integer
from nybble.formats.kquants import GgmlRuns
from nybble.formats.spec import format_names, parse_format

SHAPE = (768, 768)
"""Of the matrix whose bits per weight are stated: a square layer of GPT-2 124M, a multiple of every block."""
MOST_LEVELS = 256
"""Formats of more levels state figures alone; listing float16's 63,487 helps nobody."""
OPTIONS = ("asym", "dq")
"""Options that are rows of their own in the table, where a format has them."""
UNIT = 1024.0
"""A scale so large that what bounds add for subnormal ones does not show."""
USUAL_BLOCK = 64
"""For formats whose own default is a whole row, below 8 bits: a row is then too long for one scale."""


@dataclass(frozen=True)
class Part:
    """One array of what is stored for a weight, as its share of one run of columns."""

    name: str
    dtype: str
    """numpy's name of the type of the array; codes of fewer bits lie packed in it."""
    bits: float
    """For `Explanation.run` weights."""


@dataclass(frozen=True)
class Explanation:
    """One number format in figures. Levels and steps are those at a scale of 1; of floats they are absolute."""

    spec: str
    bits: int
    """Of one code."""
    count: int
    """Distinct finite levels."""
    lowest: float
    highest: float
    smallest_step: float
    """Between neighbouring levels; of floats next to zero."""
    largest_step: float
    """Between neighbouring levels; of floats that from 1 to the next one, since their largest is no use to anyone."""
    offset: bool
    """Whether the levels of a block are moved, by a zero point or a shift."""
    value: str
    """The value of a code as a formula of what is stored; empty for floats."""
    levels: tuple[float, ...]
    """Ascending; empty for more than MOST_LEVELS."""
    floating: Floating | None
    """Its layout, where it is a float."""
    run: int
    """Weights that share what is stored beside the codes: columns of a row, or all of the matrix."""
    stored: tuple[Part, ...]
    """Empty for floats of OTHERS."""
    bits_per_weight: float
    """Everything stored, for a matrix of SHAPE."""
    rounding: str
    bound: dict[str, float]
    """|w - value| of plain rounding is at most the sum of these, each times the magnitude of the number that it names: a stored
    one, `s` of `value`, or for floats `weight`."""
    use: str
    """Where it is met, if it is no format of ours."""


def explain_all() -> list[Explanation]:
    """Every format at its usual block and with each of OPTIONS: floats first, then ours, then ggml's, each by falling bits."""
    found = [parse_format(spec) for name in format_names() for spec in _usual_specs(name)]
    found.sort(key=lambda fmt: (not fmt.is_cast, fmt.whole, not fmt.is_integer, -fmt.bits))
    rows = [_explain_other(name) for name in OTHERS] + [explain(str(fmt)) for fmt in found]
    # Of two floats of the same size the finer one first: float16 before bfloat16, E4M3 before E5M2.
    return sorted(rows, key=lambda row: (-row.bits, -row.floating.mantissa_bits) if row.floating else (0, 0))


def explain(spec: str) -> Explanation:
    """One format, ours or of OTHERS. Raises UsageError for a spec that is neither."""
    name = spec.strip().split(",")[0].partition(":")[0].strip()
    if spec.strip() in OTHERS:
        return _explain_other(spec.strip())
    if name in OTHERS:
        raise UsageError(f"format {name} has no blocks and no options; write {name!r} alone")
    if name not in format_names():
        raise unknown_name("format", name, [*format_names(), *OTHERS])
    fmt = parse_format(spec)
    shared = math.prod(SHAPE) if fmt.granularity == "tensor" else fmt.block(SHAPE[1])
    run = 1 if fmt.is_cast else max(fmt.whole, shared)
    runs = math.prod(SHAPE) / run
    stored = tuple(
        Part(part, dtype, 8 * np.dtype(dtype).itemsize * math.prod(shape) / runs)
        for part, (dtype, shape) in fmt.storage(SHAPE).items()
    )
    if fmt.is_cast:
        return _explain_floating(str(fmt), _layout(fmt), stored, fmt.bits_per_weight(SHAPE), "")
    levels = np.unique(fmt.levels.astype(np.float64) + 0.0)
    steps = np.diff(levels)
    offset = fmt.grid(fmt.fit(np.zeros((1, max(fmt.whole, 1)), np.float32)))[1] is not None
    return Explanation(
        spec=str(fmt),
        bits=fmt.bits,
        count=len(levels),
        lowest=float(levels[0]),
        highest=float(levels[-1]),
        smallest_step=float(steps.min()),
        largest_step=float(steps.max()),
        offset=offset,
        value=value_of(fmt, offset),
        levels=tuple(levels.tolist()) if len(levels) <= MOST_LEVELS else (),
        floating=None,
        run=run,
        stored=stored,
        bits_per_weight=fmt.bits_per_weight(SHAPE),
        rounding=rounding_of(fmt),
        bound=_bound(fmt, offset),
        use="",
    )


def value_of(fmt: Format, offset: bool) -> str:
    """The value of a code as a formula; `s` is a block's scale where that is not stored as such."""
    if isinstance(fmt, GgmlRuns):
        return f"s * level{' - dmin * min' if offset else ''}, s = d * scale"
    if isinstance(fmt, GgmlBlocks) and fmt.name == "mxfp4":
        return "s * level, s = 2^(exponent - 128)"
    if isinstance(fmt, Codebook) and fmt.double_quantized:
        return "s * level, s = scale_scale * (level of scale_codes in the signed dynamic 8-bit codebook) + scale_offset"
    if not offset:
        return "scale * level"
    return "scale * level + shift" if fmt.shifted else "scale * (level - zero)"


def rounding_of(fmt: Format) -> str:
    """How a weight gets its code without calibration, in words."""
    if isinstance(fmt, Integer):
        steps = 2**fmt.bits - 1 if fmt.asymmetric else 2 ** (fmt.bits - 1) - 1
        reach = "(greatest - least of the weights and 0)" if fmt.asymmetric else "largest magnitude"
        return f"scale = {reach} / {steps}, rounded up; weight / scale to the nearest whole number, halfway to the even one"
    if isinstance(fmt, Codebook):
        clipped = "; a scale may come out too small, and clip" if fmt.double_quantized else "; the scale is rounded up"
        return f"weight / scale to the nearest level, halfway to the lower one{clipped}"
    if isinstance(fmt, Cast):
        return FLOAT_ROUNDING
    if isinstance(fmt, GgmlBlocks) and fmt.name == "mxfp4":
        return (
            "to the nearest level, halfway to that nearer to zero; the scale is a power of two by the largest weight, as in ggml"
        )
    if isinstance(fmt, GgmlBlocks) and fmt.is_integer:
        halves = "away from zero" if fmt.name == "q8_0" else "up"
        return f"ggml's own to the bit: codes by the scale before it is rounded to float16, halfway {halves}"
    if isinstance(fmt, GgmlBlocks | GgmlRuns):
        halves = "even quotient" if fmt.is_integer else "lower level"
        return f"scales are searched for the least squared error, then to the nearest level, halfway to the {halves}"
    return "to the nearest level, halfway to the even code"


FLOAT_ROUNDING = "to the nearest number, halfway to the even mantissa; beyond the largest is an error, not infinity"


def _usual_specs(name: str) -> list[str]:
    """A format at its usual block, and the same with each option that it has."""
    fmt = parse_format(name)
    usual = f"{name}:g{USUAL_BLOCK}" if fmt.granularity == "channel" and fmt.bits < 8 else str(fmt)
    specs = [usual]
    for option in OPTIONS:
        try:
            specs.append(str(parse_format(f"{usual},{option}")))
        except UsageError:
            continue
    return specs


def _layout(fmt: Format) -> Floating:
    """That of a float of ours, from the number after 1."""
    one = fmt.encode(np.ones((1, 1), np.float32), {})
    mantissa = -int(math.log2(float(fmt.decode(one + one.dtype.type(1), {})[0, 0]) - 1))
    return Floating(fmt.bits - 1 - mantissa, mantissa)


def _explain_other(name: str) -> Explanation:
    floating, use = OTHERS[name]
    return _explain_floating(name, floating, (), floating.bits, use)


def _explain_floating(name: str, floating: Floating, stored: tuple[Part, ...], bpw: float, use: str) -> Explanation:
    count = 2 * floating.positive + 1
    positive = [floating.value(code) for code in range(1, floating.positive + 1)] if count <= MOST_LEVELS else []
    return Explanation(
        spec=name,
        bits=floating.bits,
        count=count,
        lowest=-floating.largest,
        highest=floating.largest,
        smallest_step=floating.smallest,
        largest_step=floating.epsilon,
        offset=False,
        value="",
        levels=(*(-value for value in reversed(positive)), 0.0, *positive) if positive else (),
        floating=floating,
        run=1,
        stored=stored,
        bits_per_weight=bpw,
        rounding=FLOAT_ROUNDING if stored else "to the nearest number, halfway to the even mantissa",
        bound={"weight": floating.epsilon / 2},
        use=use,
    )


def _bound(fmt: Format, offset: bool) -> dict[str, float]:
    """`max_error` as a sum over stored numbers, taken from its values at scales of UNIT and twice that: it is linear in them."""
    columns = 2 * max(fmt.whole, fmt.block(1))
    scales = np.full(fmt.blocks((2, columns)), 2 * UNIT)
    scales.flat[0] = UNIT
    params = fmt.from_grid(scales, np.zeros_like(scales) if offset else None)
    error, scale = fmt.max_error(params).ravel(), np.abs(fmt.grid(params)[0].astype(np.float64)).ravel()
    slope = float((error[-1] - error[0]) / (scale[-1] - scale[0])) if len(scale) > 1 else float(error[0] / scale[0])
    found = {"scale" if "scale" in params and "d" not in params else "s": slope}
    for name in ("d", "scale_scale"):
        if name in params:
            found[name] = float(error[0] - slope * scale[0]) / float(abs(params[name].flat[0]))
    if fmt.shifted:
        params = fmt.from_grid(scales, np.full_like(scales, -UNIT))
        name = "dmin" if "dmin" in params else "shift"
        found[name] = float(fmt.max_error(params).flat[0] - error[0]) / float(abs(params[name].flat[0]))
    return {name: float(f"{value:.6g}") for name, value in found.items()}
