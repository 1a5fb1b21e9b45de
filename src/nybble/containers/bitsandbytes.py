"""bitsandbytes folders: NF4 and FP4 with or without double quantization, and LLM.int8, as transformers and PEFT load them.

4 bits, for a weight W of N x K values in row order, with one scale (absmax) for each run of `blocksize`:

    W                        uint8 [N*K/2, 1]     two codes a byte, the first in the high half
    W.absmax                 float32 [N*K/blocksize], or uint8 where nested (double quantization)
    W.quant_map              float32 [16]         the levels
    W.nested_absmax          float32, one for 256 scales;  W.nested_quant_map  float32 [256]
    W.quant_state.bitsandbytes__nf4 (or __fp4)    uint8: JSON with blocksize, dtype, shape, nested_offset ...

which is our `nf4:g64,dq` to the bit: the same tables, the same order. Blocks run on from row to row, so K must be a multiple of
the block. A nested scale may come out below zero in bitsandbytes, whose block then changes sign; ours is 0 there, so a weight
with such a block is read as one without double quantization: same codes, the scales that came out, `nf4:g64,f32`.

8 bits: W int8 [N, K], M.SCB float32 [N] (largest magnitude of a row), M.weight_format uint8 (0: rows), and

    value = (code * SCB) * (1/127), in float32

against our code * scale. The scale is SCB/127 and SCB is scale*127, each rounded to float32, so codes are the same and a value
differs by at most 3 units in the last place (2 in 3e8 random ones). Not every float32 is some SCB/127: `settle` gives the scale
that is kept. Inputs are rounded too in such layers, all but those of magnitude `llm_int8_threshold` and more: scheme `outliers`.

Checked against bitsandbytes 0.50.2 and transformers 5.24, which also loads GPT-2's Conv1D so, packed [out, in].
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nybble.containers.contents import Contents
from nybble.containers.hf_folder import FLOATS, Folder, float_modules, layers, one_setting, says, write_folder
from nybble.containers.integers import are_halves, check_range, narrowed
from nybble.containers.spilled import Spilled, Tagged
from nybble.errors import FileFormatError, NumericError, UsageError, shown
from nybble.files.json_strict import parse_object
from nybble.formats import Format, QTensor, parse_format
from nybble.formats.activations import Activations
from nybble.formats.codebook import NESTED_BLOCK, Codebook, dynamic_levels
from nybble.formats.spec import GROUPS

NAME = "bitsandbytes"
FOLDER = True
HOLDS = "nf4 and fp4 (:g32 to :g256, dq, f32 or neither) and int8:channel for linear layers; floats for the rest"
OPTIONS: dict[str, tuple[tuple[str, ...], str]] = {}
TYPES = ("nf4", "fp4")
LARGEST_BLOCK = 4096
THRESHOLD = 6.0
"""bitsandbytes' own default for inputs that stay floats."""
STATE = "quant_state.bitsandbytes__"
STATE_BYTES = 4096
"""A quant_state is about 150 bytes of JSON."""
STORAGE = {"U8": 1, "BF16": 2, "F16": 2, "F32": 4}
"""Types that the bytes of codes may be dressed up as (bnb_4bit_quant_storage), and their sizes."""
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
TOP = np.float32(127)


def recognizes(path: Path) -> bool:
    """Whether a folder's config.json names bitsandbytes."""
    return path.is_dir() and says(path, NAME)


def candidates(fmt: Format, shape: tuple[int, int], kind: str) -> tuple[str, ...]:
    """Layers in NF4, FP4 or int8, all else as floats. Whole numbers of more than 4 bits become int8, others NF4."""
    if fmt.is_cast:
        return (str(fmt),)
    if kind != "linear":
        return FLOATS
    if isinstance(fmt, Codebook) and isinstance(fmt.granularity, int) and shape[1] % fmt.granularity == 0:
        return (str(fmt),)
    if fmt.bits > 4 or (fmt.is_integer and fmt.granularity in ("tensor", "channel")):
        return ("int8:channel",)
    fitting = [size for size in GROUPS if shape[1] % size == 0 and size <= max(fmt.block(shape[1]), min(GROUPS))]
    if not fitting:
        return FLOATS
    if isinstance(fmt, Codebook):
        return (f"{fmt.name}:g{max(fitting)}{',dq' if fmt.double_quantized else ',f32' if fmt.wide else ''}",)
    return (f"nf4:g{max(fitting)}",)


def settle(tensor: QTensor) -> QTensor:
    """A packed layer as it is kept: int8 with scales that are some SCB/127 and inputs rounded but for outliers, float16 scales
    where those hold them. The codes stay."""
    if str(tensor.format) != "int8:channel":
        tensor = narrowed(tensor)
        return tensor if tensor.activations is None else QTensor(tensor.format, tensor.codes, tensor.params)
    scale = _largest(tensor.params["scale"]) / TOP
    kept = tensor.activations
    if kept is None or kept.scheme == "static":
        kept = Activations("outliers", THRESHOLD)
    return QTensor(tensor.format, tensor.codes, {"scale": scale}, kept)


def _largest(scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """SCB of scales, the magnitude that code 127 stands for."""
    with np.errstate(over="ignore"):
        largest = scale * TOP
    if not np.isfinite(largest).all():
        raise NumericError(f"scale {np.abs(scale).max():.5g} times 127 is no float32; keep this tensor in float")
    return largest


def read(path: Path) -> Contents:
    """What a bitsandbytes folder holds."""
    folder = Folder(path, NAME)
    four = folder.setting("load_in_4bit", (True, False), False)
    eight = folder.setting("load_in_8bit", (True, False), False)
    if four == eight:
        raise folder.broken(f"quantization_config has load_in_4bit {four} and load_in_8bit {eight}; one of them is true")
    return _read_four(folder) if four else _read_eight(folder)


def _read_eight(folder: Folder) -> Contents:
    threshold = folder.settings.get("llm_int8_threshold", THRESHOLD)
    if type(threshold) not in (int, float) or not 0 <= threshold < 1e9:
        raise folder.broken(f"llm_int8_threshold of quantization_config is {shown(threshold)}, not a number from 0 on")
    scheme = Activations("outliers", float(threshold)) if threshold else Activations("dynamic")
    packed, used = {}, set()
    for module in folder.modules("SCB"):
        name = f"{module}.weight"
        rows, columns = folder.entry(name, ("I8",), (None, None)).shape
        folder.entry(f"{module}.SCB", ("F32",), (rows,))
        packed[name] = ("int8:channel", (rows, columns))
        used |= {name, f"{module}.SCB"}
        if f"{module}.weight_format" in folder:
            folder.entry(f"{module}.weight_format", ("U8",), ())
            kind = int(folder.read(f"{module}.weight_format"))
            if kind:
                raise folder.broken(f"tensor {shown(f'{module}.weight_format')} is {kind}; only 0, codes in rows, is read")
            used.add(f"{module}.weight_format")

    def tensor(name: str) -> QTensor:
        codes = folder.read(name).view(np.uint8) ^ np.uint8(128)
        scale = folder.scales(f"{name.removesuffix('.weight')}.SCB")[:, None] / TOP
        check_range(scale, 128)
        return QTensor(parse_format("int8:channel"), codes, {"scale": scale}, scheme)

    return folder.contents(NAME, packed, used, tensor, dict.fromkeys(packed, scheme))


def _read_four(folder: Folder) -> Contents:
    states = {}
    for kind in TYPES:
        for name in folder.modules(f"{STATE}{kind}"):
            if name in states:
                raise folder.broken(f"tensor {shown(name)} has two quant_states")
            states[name] = _State(folder, name, kind)
    packed = {name: (str(state.format), state.shape) for name, state in states.items()}
    used = {part for state in states.values() for part in state.parts}
    return folder.contents(NAME, packed, used, lambda name: states[name].tensor())


class _State:
    """The quant_state of a 4-bit weight, checked against its tensors."""

    def __init__(self, folder: Folder, name: str, kind: str) -> None:
        self.folder, self.name = folder, name
        key = f"{name}.{STATE}{kind}"
        size = folder.entry(key, ("U8",), (None,)).shape[0]
        if size > STATE_BYTES:
            raise folder.broken(f"tensor {shown(key)} has {size} bytes, the limit is {STATE_BYTES}")
        state = parse_object(folder.read(key).tobytes(), f"{folder.path}: tensor {shown(key)}")
        self._check(state, {"quant_type": kind})
        self.nested = f"{name}.nested_absmax" in folder
        self.block = self._whole(state, "blocksize", LARGEST_BLOCK)
        shape = state.get("shape")
        if not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and 0 < n < 1 << 32 for n in shape)):
            raise self._broken(f"shape of its quant_state is {shown(shape)}, not two numbers")
        self.shape: tuple[int, int] = (shape[0], shape[1])
        if state.get("dtype") not in DTYPES.values():
            raise self._broken(
                f"dtype of its quant_state is {shown(state.get('dtype'))}, not one of {', '.join(DTYPES.values())}"
            )
        weights, columns = shape[0] * shape[1], shape[1]
        if columns % self.block:
            raise self._broken(
                f"its rows of {columns} are no multiple of the block of {self.block}: blocks that run on into the next row "
                "are none of nybble's"
            )
        inner = next((size for size in sorted(GROUPS, reverse=True) if self.block % size == 0), None)
        if inner is None or (self.nested and inner != self.block):
            raise self._broken(f"its block is {self.block}; nybble has {', '.join(map(str, GROUPS))}")
        scales = weights // self.block
        self.parts = {name, key, f"{name}.absmax", f"{name}.quant_map"}
        width = STORAGE.get(folder.entry(name, tuple(STORAGE), (None, 1)).dtype, 1)
        folder.entry(name, tuple(STORAGE), (weights // 2 // width, 1))
        folder.entry(f"{name}.absmax", ("U8",) if self.nested else ("F32",), (scales,))
        self._table("quant_map", parse_format(kind).levels)
        self.offset = 0.0
        if self.nested:
            self.parts |= {f"{name}.nested_absmax", f"{name}.nested_quant_map"}
            folder.entry(f"{name}.nested_absmax", ("F32",), (-(-scales // NESTED_BLOCK),))
            self._table("nested_quant_map", dynamic_levels())
            self._check(state, {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"})
            offset = state.get("nested_offset")
            if not isinstance(offset, int | float) or not abs(offset) < float(np.finfo(np.float32).max):
                raise self._broken(f"nested_offset of its quant_state is {shown(offset)}, not a number")
            self.offset = float(offset)
        try:
            self.format = self._format(f"{kind}:g{inner}")
        except ValueError as error:
            if isinstance(error, FileFormatError):
                raise
            raise self._broken(str(error)) from error

    def _format(self, plain: str) -> Format:
        """The format that keeps the scales as they are."""
        double = parse_format(f"{plain},dq")
        if self.nested and not self._turns_signs(double):
            return double
        return parse_format(plain if are_halves(self._scales()) else f"{plain},f32")

    def _broken(self, why: str) -> Exception:
        return self.folder.broken(f"tensor {shown(self.name)}: {why}")

    def _check(self, state: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        for key, value in wanted.items():
            if state.get(key) != value:
                raise self._broken(f"{key} of its quant_state is {shown(state.get(key))}, it must be {value!r}")

    def _whole(self, state: Mapping[str, Any], key: str, most: int) -> int:
        value = state.get(key)
        if type(value) is not int or not 0 < value <= most:
            raise self._broken(f"{key} of its quant_state is {shown(value)}, not a number from 1 to {most}")
        return value

    def _table(self, suffix: str, levels: NDArray[np.float32]) -> None:
        """Raise unless a table is the one that bitsandbytes has: its kernels do not look at the file's."""
        name = f"{self.name}.{suffix}"
        self.folder.entry(name, ("F32",), levels.shape)
        if not np.array_equal(self.folder.read(name), levels):
            raise self.folder.broken(f"tensor {shown(name)} is another table than that of bitsandbytes")

    def _codes(self) -> NDArray[np.uint8]:
        packed = self.folder.read(self.name).reshape(-1).view(np.uint8)
        return np.stack([packed >> np.uint8(4), packed & np.uint8(15)], axis=1).reshape(self.shape)

    def _params(self) -> dict[str, NDArray[Any]]:
        """Those of double quantization."""
        return {
            "scale_codes": self.folder.read(f"{self.name}.absmax").reshape(self.shape[0], self.shape[1] // self.block),
            "scale_scale": self.folder.scales(f"{self.name}.nested_absmax"),
            "scale_offset": np.array([self.offset], np.float32),
        }

    def _scales(self) -> NDArray[np.float32]:
        """float32 [N, K/block]: what each block is multiplied with."""
        if self.nested:
            return _raw_scales(self._params())
        return self.folder.scales(f"{self.name}.absmax").reshape(self.shape[0], self.shape[1] // self.block)

    def _turns_signs(self, fmt: Format) -> bool:
        """Whether a nested scale comes out below zero where it is not multiplied with zeros."""
        return bool((self._scales() < 0).any()) and _turned_blocks(self._params(), self._codes(), fmt) > 0

    def tensor(self) -> QTensor:
        """The weight."""
        assert isinstance(self.format, Codebook)
        if self.format.double_quantized:
            return QTensor(self.format, self._codes(), self._params())
        scale = np.repeat(self._scales(), self.block // _block(self.format), axis=1)
        return QTensor(self.format, self._codes(), self.format.from_grid(scale.astype(np.float64), None))


def _raw_scales(params: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
    """Nested scales as bitsandbytes computes them: below zero where rounding took them there."""
    codes = params["scale_codes"]
    nested = np.repeat(params["scale_scale"], NESTED_BLOCK)[: codes.size].reshape(codes.shape)
    with np.errstate(over="ignore"):
        scales = dynamic_levels()[codes] * nested + params["scale_offset"][0]
    check_range(scales, 1)
    return scales


def _turned_blocks(params: Mapping[str, NDArray[Any]], codes: NDArray[Any], fmt: Format) -> int:
    """Blocks that are multiplied with a nested scale below zero, unless all they hold is zeros."""
    below = _raw_scales(params) < 0
    rows, places = np.nonzero(below)
    blocks = codes.reshape(*below.shape, -1)[rows, places]
    return int((fmt.levels[blocks] != 0).any(axis=1).sum())


def _formats(contents: Contents) -> dict[str, Format]:
    return {name: parse_format(contents.packed[name][0]) for name in layers(contents, NAME, conv1d=True)}


def _threshold(inputs: Mapping[str, Activations | None]) -> float:
    """From where elements of inputs stay floats. Raises UsageError for schemes that bitsandbytes has not."""
    scheme = one_setting(NAME, "scheme for inputs", inputs)
    if scheme is not None and scheme.scheme == "static":
        raise UsageError(f"{NAME} rounds inputs on a grid of each token, not on one grid (static); use method rtn or dynamic")
    return THRESHOLD if scheme is None else scheme.threshold if scheme.scheme == "outliers" else 0.0


def _block(fmt: Format) -> int:
    assert isinstance(fmt.granularity, int)
    return fmt.granularity


def check(contents: Contents) -> None:
    """Raise UsageError for layers that a bitsandbytes folder cannot hold, from their names, shapes, formats and schemes alone."""
    formats = _formats(contents)
    for name, fmt in formats.items():
        if candidates(fmt, contents.packed[name][1], "linear") != (str(fmt),):
            raise UsageError(f"{NAME} cannot hold {name} {list(contents.packed[name][1])} in {fmt}: it holds {HOLDS}")
    if one_setting(NAME, "type", {name: fmt.name for name, fmt in formats.items()}) == "int8":
        _threshold({name: contents.schemes.get(name) for name in formats})


def write(path: Path, contents: Contents, options: Mapping[str, str]) -> None:
    """A bitsandbytes folder: all layers in NF4, in FP4 or in int8; blocks and double quantization may differ. Raises UsageError
    as `check`."""
    check(contents)
    formats = _formats(contents)
    names, kind = list(formats), next(iter(formats.values())).name
    arrays = Spilled(path)
    inputs: dict[str, Activations | None] = {}
    for name in names:
        tensor = contents.read_packed(name)
        if kind == "int8":
            arrays.update(_eight(name, tensor))
            inputs[name] = tensor.activations
        else:
            arrays.update(_four(name, tensor, DTYPES[contents.float_tag]))
    threshold = _threshold(inputs) if kind == "int8" else THRESHOLD
    settings = {
        "quant_method": NAME,
        "load_in_4bit": kind != "int8",
        "load_in_8bit": kind == "int8",
        "llm_int8_threshold": threshold,
        "llm_int8_skip_modules": float_modules(contents),
        "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False,
        "bnb_4bit_quant_type": "nf4" if kind == "int8" else kind,
        "bnb_4bit_use_double_quant": any(getattr(fmt, "double_quantized", False) for fmt in formats.values()),
        "bnb_4bit_compute_dtype": DTYPES[contents.float_tag],
        "bnb_4bit_quant_storage": "uint8",
    }
    write_folder(path, contents, arrays, settings)


def _eight(name: str, tensor: QTensor) -> dict[str, Tagged]:
    module = name.removesuffix(".weight")
    scale = tensor.params["scale"]
    largest = _largest(scale)
    if not np.array_equal(largest / TOP, scale):
        bad = scale[largest / TOP != scale]
        raise NumericError(f"{name}: scale {bad[0]:.9g} ({bad.size} of {scale.size}) is no SCB/127 of float32; settle it first")
    return {
        name: ("I8", (tensor.codes.astype(np.uint8) ^ np.uint8(128)).view(np.int8)),
        f"{module}.SCB": ("F32", largest[:, 0]),
        f"{module}.weight_format": ("U8", np.zeros((), np.uint8)),
    }


def _four(name: str, tensor: QTensor, dtype: str) -> dict[str, Tagged]:
    fmt = tensor.format
    assert isinstance(fmt, Codebook)
    flat = tensor.codes.astype(np.uint8, copy=False).reshape(-1, 2)
    state: dict[str, Any] = {
        "quant_type": fmt.name,
        "blocksize": _block(fmt),
        "dtype": dtype,
        "shape": list(tensor.shape),
    }
    params = tensor.params
    arrays: dict[str, Tagged] = {
        name: ("U8", ((flat[:, 0] << np.uint8(4)) | flat[:, 1])[:, None]),
        f"{name}.quant_map": ("F32", fmt.levels),
    }
    if fmt.double_quantized:
        if _turned_blocks(params, tensor.codes, fmt):
            raise NumericError(f"{name}: a scale comes out below zero under double quantization, where bitsandbytes turns signs; "
                               f"use {fmt.name}:g{fmt.granularity} without dq")  # fmt: skip
        offset = float(params["scale_offset"][0])
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
        arrays[f"{name}.absmax"] = "U8", params["scale_codes"].reshape(-1)
        arrays[f"{name}.nested_absmax"] = "F32", params["scale_scale"]
        arrays[f"{name}.nested_quant_map"] = "F32", dynamic_levels()
    else:
        arrays[f"{name}.absmax"] = "F32", params["scale"].astype(np.float32).reshape(-1)
    arrays[f"{name}.{STATE}{fmt.name}"] = "U8", np.frombuffer(json.dumps(state).encode(), np.uint8)
    return arrays
