"""GPTQ folders, as GPTQModel, AutoGPTQ, transformers and vLLM read and write them.

For a module M with a weight [N, K] = [out, in] and groups of g columns (G of them in a row; group_size -1: one):

    M.qweight   int32 [K*bits/32, N]     codes, packed along K
    M.qzeros    int32 [G, N*bits/32]     zero points, packed along N
    M.scales    float16 [G, N]
    M.g_idx     int32 [K]                group of each column
    value = scales * (code - zero)

What is stored for a zero point depends on `checkpoint_format`. In `gptq` (v1) it is the zero point less one, and two readers
disagree on zero points of 0, which wrap: GPTQModel and with it transformers adds 1 to whole words, so that what wraps carries
into the neighbour; vLLM adds 1 to each. So v1 is written only without such zero points, and read as transformers does (at 3 bits
it adds to each). In `gptq_v2` the zero point stands as it is. A symmetric weight has 2^(bits-1) everywhere.

Checked against GPTQModel 7.6 and transformers 5.24. Also GPTQModel's own loader takes v1 without symmetry only from itself;
transformers and vLLM take it from anyone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nybble.containers.contents import Contents
from nybble.containers.hf_folder import (
    FLOATS,
    QUANTIZER,
    Folder,
    as_json,
    float_modules,
    inside_block,
    layers,
    one_setting,
    says,
    skipped,
    write_folder,
)
from nybble.containers.integers import WHOLE_ROW, grid_of, halves, nearest, settled, spec_of, tensor_of
from nybble.containers.spilled import Spilled
from nybble.containers.words import pack_words, unpack_words, word_count
from nybble.errors import UsageError, shown
from nybble.formats import Format, QTensor, parse_format
from nybble.formats.spec import GROUPS

NAME = "gptq"
FOLDER = True
HOLDS = (
    "int2, int3, int4 and int8 for linear layers, :channel (float16 scales) or :g32 to :g256, with or without asym; else floats"
)
OPTIONS: dict[str, tuple[tuple[str, ...], str]] = {
    "checkpoint_format": (
        ("auto", "gptq", "gptq_v2"),
        "how zero points are stored: gptq is read everywhere, gptq_v2 holds all of them; auto: gptq unless one is 0",
    )
}
BITS = (2, 3, 4, 8)
MULTIPLE = 32
"""Rows and columns of a packed weight come in multiples of it: words are whole at every width."""
SETTINGS_FILE = "quantize_config.json"
PARTS = ("qweight", "qzeros", "scales", "g_idx")


def recognizes(path: Path) -> bool:
    """Whether a folder's config.json names GPTQ."""
    return path.is_dir() and says(path, NAME)


def candidates(fmt: Format, shape: tuple[int, int], kind: str) -> tuple[str, ...]:
    """Layers as whole numbers, all else as floats."""
    if fmt.is_cast:
        return (str(fmt),)
    spec = nearest(fmt, shape, BITS, GROUPS, channel=True)
    if kind != "linear" or shape[0] % MULTIPLE or shape[1] % MULTIPLE:
        return FLOATS
    return () if spec is None else (spec,)


def settle(tensor: QTensor) -> QTensor:
    """A packed layer as it is kept: scales of rows rounded to float16, inputs as floats. The codes stay."""
    return tensor if tensor.format.is_cast else settled(tensor)


def read(path: Path) -> Contents:
    """What a GPTQ folder holds. Refuses columns that are assigned to groups out of order (desc_act), since the groups of our
    formats are runs of columns."""
    folder = Folder(path, NAME)
    reader = _Reader(folder)
    packed = {f"{module}.weight": reader.describe(module) for module in folder.modules("qweight")}
    used = {f"{name.removesuffix('weight')}{part}" for name in packed for part in PARTS}
    return folder.contents(NAME, packed, used, lambda name: reader.tensor(name.removesuffix(".weight"), packed[name]))


class _Reader:
    """Turns the tensors of a module into a QTensor."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self.bits: int = folder.setting("bits", BITS, None)
        self.group = folder.settings.get("group_size", 128)
        if type(self.group) is not int or not (self.group == WHOLE_ROW or 0 < self.group < 1 << 24):
            raise folder.broken(f"group_size of quantization_config is {shown(self.group)}, not -1 or a number of columns")
        key = "checkpoint_format" if folder.settings.get("checkpoint_format") is not None else "format"
        self.v1 = folder.setting(key, ("gptq", "gptq_v2"), "gptq") == "gptq"
        rules = folder.settings.get("dynamic") or {}
        if not isinstance(rules, dict):
            raise folder.broken(f"dynamic of quantization_config is {shown(rules)}, not a map of patterns")
        self.mixed = any(not pattern.startswith("-:") for pattern in rules)
        """Some modules have other bits or groups than the settings say; their tensors tell which."""

    def describe(self, module: str) -> tuple[str, tuple[int, int]]:
        """(format spec, shape) of a module's weight."""
        words, rows = self.folder.entry(f"{module}.qweight", ("I32",), (None, None)).shape
        bits, columns = self._bits(module, words)
        groups = self.folder.entry(f"{module}.scales", ("F16", "BF16", "F32"), (None, rows)).shape[0]
        group = self._group(module, columns, groups)
        self.folder.entry(f"{module}.qzeros", ("I32",), (groups, word_count(rows, bits)))
        middle = np.int32(2 ** (bits - 1))
        try:
            asymmetric = bool((self._zeros(module, rows, bits) != middle).any())
            spec = spec_of(bits, group, columns, asymmetric, self.folder.wide_scales(f"{module}.scales"))
        except ValueError as error:
            raise self.folder.broken(f"tensor {shown(f'{module}.qweight')}: {error}") from error
        self._order(module, columns, group, groups)
        return spec, (rows, columns)

    def tensor(self, module: str, described: tuple[str, tuple[int, int]]) -> QTensor:
        """A module's weight."""
        spec, (rows, columns) = described
        fmt = parse_format(spec)
        scale = self.folder.scales(f"{module}.scales")
        group = self._group(module, columns, len(scale))
        order = self._order(module, columns, group, len(scale))
        zero = _ordered(self._zeros(module, rows, fmt.bits), order).T if ",asym" in spec else None
        codes = unpack_words(self.folder.read(f"{module}.qweight").T, columns, fmt.bits)
        return tensor_of(fmt, codes, group, _ordered(scale, order).T, zero)

    def _bits(self, module: str, words: int) -> tuple[int, int]:
        """(bits, columns) of a module: as the settings say, or, where they make exceptions, as `g_idx` says."""
        if f"{module}.g_idx" not in self.folder:
            columns = words * 32 // self.bits
            if word_count(columns, self.bits) != words:
                raise self.folder.broken(
                    f"tensor {shown(f'{module}.qweight')} has {words} rows; codes of {self.bits} bits fill none so"
                )
            return self.bits, columns
        columns = self.folder.entry(f"{module}.g_idx", ("I32",), (None,)).shape[0]
        for bits in BITS if self.mixed else (self.bits,):
            if word_count(columns, bits) == words:
                return bits, columns
        raise self.folder.broken(
            f"tensor {shown(f'{module}.qweight')} has {words} rows, it must have {word_count(columns, self.bits)}: "
            f"{columns} columns of {self.bits} bits"
        )

    def _group(self, module: str, columns: int, groups: int) -> int:
        """Columns of a module's groups, -1 for all of them."""
        expected = 1 if self.group == WHOLE_ROW else -(-columns // self.group)
        if groups != expected and self.mixed and columns % groups == 0:
            return columns // groups if groups > 1 else WHOLE_ROW
        if groups != expected:
            raise self.folder.broken(
                f"tensor {shown(f'{module}.scales')} has {groups} groups, it must have {expected}: {columns} columns, "
                f"group_size {self.group}"
            )
        return int(self.group)

    def _order(self, module: str, columns: int, group: int, groups: int) -> NDArray[np.int64]:
        """For each run of columns the group that it belongs to, int64 [groups]."""
        name = f"{module}.g_idx"
        size = columns if group == WHOLE_ROW else group
        if name not in self.folder:
            if self.folder.settings.get("desc_act"):
                raise self.folder.broken(f"tensor {shown(name)} is missing, and desc_act says that columns are out of order")
            return np.arange(groups)
        index = self.folder.read(name)
        if int(index.min()) < 0 or int(index.max()) >= groups:
            raise self.folder.broken(
                f"tensor {shown(name)} names group {int(index.max() if index.min() >= 0 else index.min())}; there are {groups}"
            )
        order = index[::size].astype(np.int64)
        apart = np.flatnonzero(np.repeat(order, size)[:columns] != index)
        if apart.size:
            column = int(apart[0])
            raise self.folder.broken(
                f"tensor {shown(name)} puts column {column} into group {int(index[column])} and column {column - column % size} "
                f"into group {int(order[column // size])}: columns ordered by activation (desc_act true) are no runs of {size}, "
                "which nybble's groups are; quantize with desc_act false"
            )
        return order

    def _zeros(self, module: str, rows: int, bits: int) -> NDArray[np.uint8]:
        """Zero points [groups, N] of a module."""
        words = self.folder.read(f"{module}.qzeros")
        if self.v1 and bits != 3:
            words = (words.astype(np.uint32) + np.uint32(_ones(bits))).view(np.int32)
        zeros = unpack_words(words, rows, bits)
        return (zeros + np.uint8(1)) & np.uint8(7) if self.v1 and bits == 3 else zeros


def _ordered(groups: NDArray[Any], order: NDArray[np.int64]) -> NDArray[Any]:
    """Rows in an order; the array itself where they are."""
    return groups if np.array_equal(order, np.arange(len(groups))) else groups[order]


def _ones(bits: int) -> int:
    """A word of codes that are all 1."""
    return sum(1 << place for place in range(0, 32, bits))


def check(contents: Contents) -> None:
    """Raise UsageError for layers that a GPTQ folder cannot hold, from their names, shapes and formats alone."""
    formats = _formats(contents)
    for name, fmt in formats.items():
        rows, columns = contents.packed[name][1]
        if candidates(fmt, (rows, columns), "linear") != (str(fmt),) or inside_block(contents, name) is None:
            raise UsageError(f"{NAME} cannot hold {name} {[rows, columns]} in {fmt}, a layer of a block: it holds {HOLDS}")
    one_setting(NAME, "number of bits", {name: fmt.bits for name, fmt in formats.items()})
    one_setting(NAME, "group size", {name: _group_size(fmt) for name, fmt in formats.items()})


def write(path: Path, contents: Contents, options: Mapping[str, str]) -> None:
    """A GPTQ folder. All layers share bits and group size; what stays in float is named in the settings, so that no loader
    takes it for packed. Raises UsageError as `check`, and for zero points that the version asked for has not; NumericError for
    scales that are no float16."""
    check(contents)
    formats = _formats(contents)
    names, fmt = list(formats), next(iter(formats.values()))
    bits, group = fmt.bits, _group_size(fmt)
    version = options.get("checkpoint_format", "auto")
    v1 = version == "gptq" or (version == "auto" and not _zeros_of_zero(contents, formats))
    arrays = Spilled(path)
    symmetric = True
    for name in names:
        tensor = contents.read_packed(name)
        module = name.removesuffix(".weight")
        scale, zero = grid_of(tensor)
        symmetric = symmetric and bool((zero == 2 ** (bits - 1)).all())
        if v1 and (zero == 0).any():
            row, place = (int(i) for i in np.argwhere(zero == 0)[0])
            raise UsageError(
                f"{name} has a zero point of 0 (row {row}, group {place}), which readers of checkpoint_format gptq take for "
                "different values; leave the option out, or write a format without asym"
            )
        columns = tensor.shape[1]
        size = columns if group == WHOLE_ROW else group
        arrays[f"{module}.qweight"] = "I32", np.ascontiguousarray(pack_words(tensor.codes, bits).T)
        arrays[f"{module}.qzeros"] = "I32", pack_words(np.ascontiguousarray((zero - np.uint8(v1)).T), bits)
        arrays[f"{module}.scales"] = "F16", np.ascontiguousarray(halves(scale, name, NAME).T)
        arrays[f"{module}.g_idx"] = "I32", (np.arange(columns, dtype=np.int32) // np.int32(size))
    settings = {
        "quant_method": NAME,
        "bits": bits,
        "group_size": group,
        "sym": symmetric,
        "desc_act": False,
        "lm_head": False,
        "checkpoint_format": "gptq" if v1 else "gptq_v2",
        "format": "gptq" if v1 else "gptq_v2",
        "pack_dtype": "int32",
        "meta": {"quantizer": [QUANTIZER]},
        **_left_out(contents, names),
    }
    write_folder(path, contents, arrays, settings, {SETTINGS_FILE: as_json(settings)})


def _formats(contents: Contents) -> dict[str, Format]:
    return {name: parse_format(contents.packed[name][0]) for name in layers(contents, NAME, conv1d=True)}


def _zeros_of_zero(contents: Contents, formats: Mapping[str, Format]) -> bool:
    """Whether any zero point is 0."""
    moved = (name for name, fmt in formats.items() if getattr(fmt, "asymmetric", False))
    return any(bool((grid_of(contents.read_packed(name))[1] == 0).any()) for name in moved)


def _group_size(fmt: Format) -> int:
    return fmt.granularity if isinstance(fmt.granularity, int) else WHOLE_ROW


def _left_out(contents: Contents, names: list[str]) -> dict[str, Any]:
    """Settings that name the layers of blocks that stay in float: for transformers those that do not, for GPTQModel and vLLM
    patterns of those that do. Empty where all are packed."""
    patterns = skipped(contents)
    if not patterns:
        return {}
    modules = [name.removesuffix(".weight") for name in names]
    inner = {str(inside_block(contents, module)) for module in modules}
    apart = {str(inside_block(contents, module)) for module in float_modules(contents)}
    return {"modules_in_block_to_quantize": [modules if inner & apart else sorted(inner)], "dynamic": patterns}
