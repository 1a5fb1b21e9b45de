"""AWQ folders, version gemm, as AutoAWQ, GPTQModel, transformers and vLLM read and write them. What AWQ does to weights happened
before; this is only how their codes are stored.

For a module M with a weight [N, K] = [out, in] and groups of g columns (G of them in a row):

    M.qweight   int32 [K, N/8]     4-bit codes: the i-th nibble of a word is row 8c + (0, 2, 4, 6, 1, 3, 5, 7)[i] of the weight
    M.qzeros    int32 [G, N/8]     zero points, in the same order
    M.scales    float16 [G, N]
    value = scales * (code - zero)

A symmetric weight has zero points of 8. Checked against GPTQModel 7.6 and transformers 5.24.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nybble.containers.contents import Contents
from nybble.containers.hf_folder import FLOATS, Folder, float_modules, layers, one_setting, says, skipped, write_folder
from nybble.containers.integers import WHOLE_ROW, grid_of, halves, nearest, settled, spec_of, tensor_of
from nybble.containers.spilled import Spilled
from nybble.containers.words import pack_eights, unpack_eights
from nybble.errors import UsageError, shown
from nybble.formats import Format, QTensor, parse_format

NAME = "awq"
FOLDER = True
HOLDS = "int4:g32, int4:g64 and int4:g128 for linear layers, asym or not; floats for the rest"
OPTIONS: dict[str, tuple[tuple[str, ...], str]] = {}
BITS = 4
PER_WORD = 8
GROUPS = (32, 64, 128)
PARTS = ("qweight", "qzeros", "scales")


def recognizes(path: Path) -> bool:
    """Whether a folder's config.json names AWQ."""
    return path.is_dir() and says(path, NAME)


def candidates(fmt: Format, shape: tuple[int, int], kind: str) -> tuple[str, ...]:
    """Layers as 4-bit whole numbers, all else as floats."""
    if fmt.is_cast:
        return (str(fmt),)
    if kind != "linear" or shape[0] % PER_WORD or shape[1] % min(GROUPS):
        return FLOATS
    spec = nearest(fmt, shape, (BITS,), GROUPS, channel=False)
    return () if spec is None else (spec,)


def settle(tensor: QTensor) -> QTensor:
    """A packed layer as it is kept: inputs as floats."""
    return tensor if tensor.format.is_cast else settled(tensor)


def read(path: Path) -> Contents:
    """What an AWQ folder holds; version gemm only."""
    folder = Folder(path, NAME)
    folder.setting("bits", (BITS,), BITS)
    key = "version" if folder.settings.get("version") is not None else "format"
    if isinstance(folder.settings.get(key), str):
        folder.settings[key] = folder.settings[key].lower()
    folder.setting(key, ("gemm",), "gemm")
    group = folder.setting("group_size", (*GROUPS, 256, WHOLE_ROW), 128)

    def describe(module: str) -> tuple[str, tuple[int, int]]:
        columns, words = folder.entry(f"{module}.qweight", ("I32",), (None, None)).shape
        groups = 1 if group == WHOLE_ROW else -(-columns // group)
        folder.entry(f"{module}.qzeros", ("I32",), (groups, words))
        folder.entry(f"{module}.scales", ("F16", "BF16", "F32"), (groups, words * PER_WORD))
        asymmetric = bool((folder.read(f"{module}.qzeros").view(np.uint32) != np.uint32(0x88888888)).any())
        scale = folder.wide_scales(f"{module}.scales")
        return spec_of(BITS, group, columns, asymmetric, scale), (words * PER_WORD, columns)

    packed = {f"{module}.weight": describe(module) for module in folder.modules("qweight")}

    def tensor(name: str) -> QTensor:
        spec = packed[name][0]
        module = name.removesuffix(".weight")
        codes = unpack_eights(folder.read(f"{module}.qweight"))
        zero = unpack_eights(folder.read(f"{module}.qzeros")) if ",asym" in spec else None
        return tensor_of(parse_format(spec), codes, group, folder.scales(f"{module}.scales").T, zero)

    used = {f"{name.removesuffix('weight')}{part}" for name in packed for part in PARTS}
    for module in folder.modules("g_idx"):
        raise folder.broken(f"tensor {shown(f'{module}.g_idx')} orders columns, which AWQ does not")
    return folder.contents(NAME, packed, used, tensor)


def check(contents: Contents) -> None:
    """Raise UsageError for layers that an AWQ folder cannot hold, from their names, shapes and formats alone, and for
    architectures that store their layers [in, out] (GPT-2)."""
    formats = _formats(contents)
    for name, fmt in formats.items():
        if candidates(fmt, contents.packed[name][1], "linear") != (str(fmt),):
            raise UsageError(f"{NAME} cannot hold {name} {list(contents.packed[name][1])} in {fmt}: it holds {HOLDS}")
    one_setting(NAME, "group size", {name: fmt.granularity for name, fmt in formats.items()})


def write(path: Path, contents: Contents, options: Mapping[str, str]) -> None:
    """An AWQ folder. All layers share a group size; those that stay in float are named in the settings. Raises UsageError as
    `check`."""
    check(contents)
    formats = _formats(contents)
    names, group = list(formats), next(iter(formats.values())).granularity
    arrays = Spilled(path)
    for name in names:
        tensor = contents.read_packed(name)
        module = name.removesuffix(".weight")
        scale, zero = grid_of(tensor)
        arrays[f"{module}.qweight"] = "I32", pack_eights(tensor.codes)
        arrays[f"{module}.qzeros"] = "I32", pack_eights(zero)
        arrays[f"{module}.scales"] = "F16", np.ascontiguousarray(halves(scale, name, NAME).T)
    settings: dict[str, Any] = {
        "quant_method": NAME,
        "bits": BITS,
        "group_size": group,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": float_modules(contents),
    }
    if patterns := skipped(contents):
        settings["dynamic"] = patterns
    write_folder(path, contents, arrays, settings)


def _formats(contents: Contents) -> dict[str, Format]:
    return {name: parse_format(contents.packed[name][0]) for name in layers(contents, NAME, conv1d=False)}
