"""A recipe says what is wanted; a plan is a recipe applied to one model, tensor by tensor. Pure: no weights are read.

Every tensor of the model is a row. One that stays in floating point says why.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from nybble.errors import UsageError, unknown_name
from nybble.formats import Format, format_names, parse_format
from nybble.formats.activations import Activations
from nybble.methods import parse_method
from nybble.mixes import find_mix, format_of, is_positions, mix_names
from nybble.models.info import TensorInfo

FLOAT_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16}
CAST_TAGS = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}


@dataclass(frozen=True)
class Recipe:
    """What is wanted of a model."""

    format: str
    """Spec string for every weight that no rule names, or the name of a mix."""
    method: str = "rtn"
    keep: tuple[str, ...] = ()
    """Weights that stay in float: parameter or module names, their last parts, or globs of them."""
    rules: tuple[tuple[str, str], ...] = ()
    """(pattern, format spec) for some weights; the last match wins, `keep` before all."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "format", canonical(self.format))
        object.__setattr__(self, "rules", tuple((p, str(parse_format(f))) for p, f in self.rules))
        object.__setattr__(self, "keep", tuple(self.keep))


@dataclass(frozen=True)
class PlanRow:
    """One tensor and what becomes of it."""

    tensor: TensorInfo
    format: str | None
    """Spec string, or None: it stays as it is."""
    method: str | None
    bits: int
    """Everything stored for it."""
    reason: str
    """Why this and nothing else; notes such as short tail groups."""
    activations: str | None = None
    """What becomes of the inputs it multiplies (`dynamic`, `static`, `outliers`); None: they stay floats."""


@dataclass(frozen=True)
class Plan:
    """A recipe applied to one model."""

    recipe: Recipe
    rows: tuple[PlanRow, ...]

    @property
    def packed(self) -> tuple[PlanRow, ...]:
        """The rows whose tensor is given a format."""
        return tuple(row for row in self.rows if row.format is not None)

    @property
    def is_cast(self) -> bool:
        """The whole model becomes one floating type, and stays a plain checkpoint of that type."""
        return _casts_all(self.recipe)

    @property
    def bpw(self) -> float:
        """Mean bits per weight over the packed weights."""
        packed = self.packed
        return sum(row.bits for row in packed) / max(1, sum(row.tensor.weights for row in packed))

    @property
    def bytes(self) -> int:
        """All tensors as stored."""
        return sum(-(-row.bits // 8) for row in self.rows)

    @property
    def notes(self) -> list[str]:
        """What a reader of the results must know, one sentence each."""
        tails = [row for row in self.packed if "short last block" in row.reason]
        notes = []
        if tails:
            columns = sorted({row.tensor.shape[1] for row in tails})
            notes.append(
                f"{len(tails)} weights have rows of {', '.join(map(str, columns))} columns, which the block size does not "
                "divide: the last block of each row is shorter and has a scale of its own"
            )
        rounded = [row for row in self.packed if row.activations]
        if rounded:
            notes.append(f"activations {rounded[0].activations} for {len(rounded)} weights; those of the head stay floats")
        kept = [row for row in self.rows if row.format is None and row.tensor.kind != "float"]
        if kept:
            notes.append(f"kept in float: {', '.join(row.tensor.name for row in kept)}")
        return notes

    @property
    def hash(self) -> str:
        """SHA-256 of recipe and rows, in whatever order these are."""
        ordered = dataclasses.replace(self, rows=tuple(sorted(self.rows, key=lambda row: row.tensor.name)))
        content = json.dumps(dataclasses.asdict(ordered), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(content.encode()).hexdigest()


def make_plan(tensors: Sequence[TensorInfo], recipe: Recipe) -> Plan:
    """Decide for every tensor. Raises UsageError for a pattern that names no weight, and when nothing would be packed."""
    for pattern in (*recipe.keep, *(p for p, _ in recipe.rules)):
        if not any(_matches(pattern, t) for t in tensors):
            names = [t.name.removesuffix(".weight") for t in tensors if t.kind != "float"]
            raise unknown_name("weight in --keep or --rule", pattern, names)
    rows = tuple(_decide(tensor, recipe, tensors) for tensor in tensors)
    if not any(row.format for row in rows):
        raise UsageError(f"nothing to quantize: {len(rows)} tensors, none of them left to pack; loosen --keep")
    return Plan(recipe, rows)


def canonical(spec: str) -> str:
    """A format's spec or a mix's name as it is written. Raises UsageError for what is neither."""
    found = find_mix(spec)
    if found is not None:
        return found[0]
    try:
        return str(parse_format(spec))
    except UsageError as error:
        if "unknown format" not in str(error):
            raise
        raise unknown_name("format", spec.partition(":")[0], [*format_names(), *mix_names()]) from error


def prunes(row: PlanRow) -> bool:
    """Whether weights of this tensor become zero: of those that linear layers inside the blocks multiply with, where the method
    prunes."""
    inside = row.tensor.block is not None and row.tensor.kind in ("linear", "conv1d")
    return inside and row.method is not None and row.method != "cast" and parse_method(row.method).settings.prunes


def _casts_all(recipe: Recipe) -> bool:
    alone = recipe.format in CAST_TAGS and not recipe.keep and not recipe.rules
    return alone and not parse_method(recipe.method).settings.prunes


def _decide(tensor: TensorInfo, recipe: Recipe, tensors: Sequence[TensorInfo]) -> PlanRow:
    whole_cast = _casts_all(recipe)
    if tensor.kind == "float":
        if whole_cast and tensor.dtype in FLOAT_BITS:
            bits = tensor.weights * FLOAT_BITS[CAST_TAGS[recipe.format]]
            return PlanRow(tensor, None, None, bits, f"cast with the model; {tensor.reason}")
        return PlanRow(tensor, None, None, _float_bits(tensor), tensor.reason)
    for pattern in recipe.keep:
        if _matches(pattern, tensor):
            return PlanRow(tensor, None, None, _float_bits(tensor), f"kept by --keep {pattern}")
    spec, reason = recipe.format, ""
    mix = find_mix(recipe.format)
    if mix is not None:
        if is_positions(tensor):
            return PlanRow(tensor, None, None, _float_bits(tensor), f"table of positions: {mix[0]} leaves it in float")
        spec, why = format_of(mix[1], tensor, tensors)
        reason = f"{mix[0]}: {why}" if why else ""
    for pattern, rule_format in recipe.rules:
        if _matches(pattern, tensor):
            spec, reason = rule_format, f"rule {pattern}"
    fmt = parse_format(spec)
    shape = (tensor.shape[0], tensor.shape[1])
    fits, instead = _fitting(fmt, shape[1])
    notes = [
        reason or f"{tensor.kind} weight",
        f"tied with {', '.join(tensor.aliases)}" if tensor.aliases else "",
        _tail(fits, shape[1]),
        instead,
    ]
    fmt = fits
    scheme = _scheme(tensor, fmt, recipe)
    if scheme is not None:
        notes.append(f"activations {scheme}")
    settings = parse_method(recipe.method).settings
    inside = tensor.block is not None and tensor.kind != "embedding"
    if settings.prunes and inside:
        notes.append(
            f"pruned, {settings.pattern} kept" if settings.pattern != "free" else f"pruned, {settings.sparsity:.0%} zero"
        )
    elif settings.prunes and fmt.is_cast and not reason:
        return PlanRow(tensor, None, None, _float_bits(tensor), "outside the blocks: not pruned")
    method = "cast" if fmt.is_cast and not (settings.prunes and inside) else recipe.method
    bits = fmt.stored_bits(shape) + (Activations(scheme).bits if scheme else 0)
    return PlanRow(tensor, str(fmt), method, bits, "; ".join(n for n in notes if n), scheme)


def _fitting(fmt: Format, columns: int) -> tuple[Format, str]:
    """(the format, or the one that takes its place for rows of so many columns, why)."""
    fits = fmt
    while fits.whole > 1 and columns % fits.whole:
        spec = fits.fallback(columns)
        if spec is None:
            fits.check_columns(columns)
        fits = parse_format(str(spec))
    return fits, "" if fits == fmt else f"rows of {columns} columns are no multiple of {fmt.whole}: {fits}, not {fmt}"


def _scheme(tensor: TensorInfo, fmt: Format, recipe: Recipe) -> str | None:
    """Inputs of linear layers inside the blocks are rounded; those of a head, tied or not, never are: it is fed the last norm's
    outputs, and its errors go straight into the logits. A rule that casts a weight keeps its inputs too."""
    method = parse_method(recipe.method)
    scheme = method.settings.activations
    if scheme == "float" or tensor.kind == "embedding" or tensor.block is None:
        return None
    if fmt.is_cast and (find_mix(recipe.format) or not parse_format(recipe.format).is_cast):
        return None
    if not fmt.is_integer:
        raise UsageError(f"method {method} multiplies integers: {fmt} has none; use int8:channel")
    return scheme


def _tail(fmt: Format, columns: int) -> str:
    block = fmt.block(columns)
    if columns % block == 0:
        return ""
    if columns < block:
        return f"short last block: the only block has {columns} columns"
    return f"short last block: {columns // block} of {block} columns, then one of {columns % block}"


def _float_bits(tensor: TensorInfo) -> int:
    bits = FLOAT_BITS.get(tensor.dtype)
    if bits is None:
        bits = 8 if tensor.dtype in ("bool", "uint8", "int8") else 64 if tensor.dtype.endswith("64") else 32
    return tensor.weights * bits


def _matches(pattern: str, tensor: TensorInfo) -> bool:
    """A pattern names a tensor by a full name, a module, their last dotted parts, or a glob of one of these."""
    for name in (tensor.name, *tensor.aliases):
        module = name.removesuffix(".weight")
        for full in (name, module):
            if fnmatchcase(full, pattern) or full.endswith(f".{pattern}") or fnmatchcase(full, f"*.{pattern}"):
                return True
    return False
