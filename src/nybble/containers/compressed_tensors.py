"""compressed-tensors folders, as llm-compressor, transformers and vLLM read and write them: whole-number weights.

For a module M with a weight [N, K] = [out, in] and groups of g columns (G of them in a row; strategy channel: one):

    pack-quantized   M.weight_packed      int32 [N, ceil(K*bits/32)]   code of each value, packed along K
                     M.weight_shape       int64 [2]                    N, K
                     M.weight_scale       [N, G] (strategy tensor: [1])
                     M.weight_zero_point  int32 [ceil(N*bits/32), G]   packed along N; asymmetric weights only
    int-quantized    M.weight             int8 [N, K]                  code - 2^(bits-1)
                     M.weight_scale, and M.weight_zero_point int8 [N, G]
    value = scale * (code - zero), rounded to the type of the scale

config.json says which modules have which scheme (`config_groups`) and which have none (`ignore`). The library packs codes without
gaps since late 2025 and padded each word before that; both are the same at 2, 4 and 8 bits, so nothing else is written or read.
Scales are written in the model's type where that holds them exactly, else in float32: a loader that computes in float16 or
bfloat16 then rounds them once.

Weights alone are pack-quantized. A weight whose inputs are rounded too is int-quantized: `dynamic` (a scale for each token) or
`static` (one grid; M.input_scale and M.input_zero_point). Only Linear layers have this: GPT-2's Conv1D has not.

Checked against compressed-tensors 0.20.0 and transformers 5.24.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nybble.containers.compressed_tensors_schemes import BITS, INT, PACKED, Scheme, read_schemes
from nybble.containers.contents import Contents
from nybble.containers.hf_folder import FLOATS, Folder, float_modules, layers, says, write_folder
from nybble.containers.integers import WHOLE_ROW, grid_of, narrowed, nearest, spec_of, tensor_of
from nybble.containers.spilled import Spilled, Tagged
from nybble.containers.words import pack_words, unpack_words, word_count
from nybble.errors import UsageError, shown
from nybble.formats import Format, QTensor, parse_format
from nybble.formats.activations import MIDDLE, Activations
from nybble.formats.spec import GROUPS

NAME = "compressed-tensors"
FOLDER = True
HOLDS = (
    "int2, int4 and int8 for Linear layers, :channel or :g32 to :g256, asym or not; int8 with rounded inputs; floats for the rest"
)
OPTIONS: dict[str, tuple[tuple[str, ...], str]] = {}
VERSION = "0.20.0"
"""The library's version whose layout is written."""
SCALE_TAGS = ("F32", "F16", "BF16")


def recognizes(path: Path) -> bool:
    """Whether a folder's config.json names compressed-tensors."""
    return path.is_dir() and says(path, NAME)


def candidates(fmt: Format, shape: tuple[int, int], kind: str) -> tuple[str, ...]:
    """Layers as whole numbers, all else as floats."""
    if fmt.is_cast:
        return (str(fmt),)
    if kind != "linear":
        return FLOATS
    if fmt.granularity not in ("tensor", "channel") and shape[1] % min(GROUPS):
        return FLOATS
    spec = nearest(fmt, shape, BITS, GROUPS, channel=True)
    if spec is not None and getattr(fmt, "wide", False):
        return (f"{spec},f32",)
    return () if spec is None else (spec,)


def settle(tensor: QTensor) -> QTensor:
    """A packed layer as it is kept: exactly as it is, with float16 scales in groups where those hold them."""
    return narrowed(tensor)


def read(path: Path) -> Contents:
    """What a compressed-tensors folder holds. Refuses what nybble would compute otherwise than it is meant: rounded caches and
    outputs, rotations, sparse weights, 8-bit floats."""
    folder = Folder(path, NAME)
    for key in ("kv_cache_scheme", "transform_config", "sparsity_config"):
        if folder.settings.get(key):
            raise folder.broken(f"quantization_config has a {key}, which nybble does not compute; use a model without")
    folder.setting("quantization_status", ("compressed",), "compressed")
    schemes = read_schemes(folder)
    found: dict[str, Scheme] = {}
    packed: dict[str, tuple[str, tuple[int, int]]] = {}
    used: set[str] = set()
    for module in (*folder.modules("weight_packed"), *_int_modules(folder)):
        name = f"{module}.weight"
        found[name], shape = _match(folder, module, schemes)
        packed[name] = (_spec(folder, module, found[name], shape), shape)
        parts = ("weight_packed", "weight_shape") if f"{module}.weight_packed" in folder else ("weight",)
        optional = ("weight_zero_point", "weight_g_idx", "input_scale", "input_zero_point")
        used |= {f"{module}.{part}" for part in (*parts, "weight_scale")}
        used |= {f"{module}.{part}" for part in optional if f"{module}.{part}" in folder}
    inputs = {name: _inputs(folder, name.removesuffix(".weight"), scheme) for name, scheme in found.items() if scheme.inputs}

    def tensor(name: str) -> QTensor:
        spec, shape = packed[name]
        made = _tensor(folder, name.removesuffix(".weight"), found[name], parse_format(spec), shape)
        return QTensor(made.format, made.codes, made.params, inputs.get(name))

    return folder.contents(NAME, packed, used, tensor, inputs)


def _int_modules(folder: Folder) -> list[str]:
    """Modules whose weight is int8 with a scale beside it."""
    return [module for module in folder.modules("weight_scale") if f"{module}.weight_packed" not in folder]


def _match(folder: Folder, module: str, schemes: list[Scheme]) -> tuple[Scheme, tuple[int, int]]:
    """The scheme that a module's tensors have, and the weight's shape.

    The tensors themselves say it. Patterns of the settings are never run: a regular expression of somebody else's may take
    for ever."""
    if f"{module}.weight_packed" in folder:
        folder.entry(f"{module}.weight_shape", ("I64", "I32"), (2,))
        rows, columns = (int(n) for n in folder.read(f"{module}.weight_shape"))
        if not (0 < rows < 1 << 32 and 0 < columns < 1 << 32):
            raise folder.broken(f"tensor {shown(f'{module}.weight_shape')} is {[rows, columns]}, not two sizes")
        words = folder.entry(f"{module}.weight_packed", ("I32",), (rows, None)).shape[1]
        fitting = [s for s in schemes if s.packed and word_count(columns, s.bits) == words]
        seen = f"{words} words in a row of {columns}"
    else:
        rows, columns = folder.entry(f"{module}.weight", ("I8",), (None, None)).shape
        fitting = [s for s in schemes if not s.packed]
        seen = f"int8 {[rows, columns]}"
    dimensions = 1 if folder.dimensions(f"{module}.weight_scale") == 1 else 2
    scale = folder.entry(f"{module}.weight_scale", SCALE_TAGS, (None,) * dimensions)
    zeros = f"{module}.weight_zero_point" in folder
    shapes = {s: _scale_shapes(s, rows, columns) for s in fitting}
    fitting = [s for s in fitting if scale.shape in shapes[s] and (zeros or not s.asymmetric)]
    # of several schemes that fit, those that differ in nothing but how they call it are one
    kinds = {(s.bits, s.asymmetric, s.inputs, -(-columns // s.group) if s.group > 0 else 1) for s in fitting}
    if len(kinds) != 1:
        which = "no config group" if not kinds else "more than one config group"
        what = f"{seen}, scales {list(scale.shape)}, {'zero points' if zeros else 'no zero points'}"
        raise folder.broken(f"tensor {shown(f'{module}.weight')}: {which} fits {what}")
    return fitting[0], (rows, columns)


def _scale_shapes(scheme: Scheme, rows: int, columns: int) -> tuple[tuple[int, ...], ...]:
    """Shapes that a scheme's scales may have for a weight [rows, columns]."""
    if scheme.whole:
        return (1,), (1, 1)
    if scheme.group == WHOLE_ROW:
        return (rows, 1), (rows,)
    return ((rows, -(-columns // scheme.group)),)


def _spec(folder: Folder, module: str, scheme: Scheme, shape: tuple[int, int]) -> str:
    if scheme.whole:
        return f"int{scheme.bits}:tensor{',asym' if scheme.asymmetric else ''}"
    try:
        scale = folder.wide_scales(f"{module}.weight_scale")
        return spec_of(scheme.bits, scheme.group, shape[1], scheme.asymmetric, scale)
    except ValueError as error:
        raise folder.broken(f"tensor {shown(f'{module}.weight')}: {error}") from error


def _tensor(folder: Folder, module: str, scheme: Scheme, fmt: Format, shape: tuple[int, int]) -> QTensor:
    rows, columns = shape
    scale = folder.scales(f"{module}.weight_scale")
    scale = scale.reshape(1 if scheme.whole else rows, -1)
    half = 2 ** (scheme.bits - 1)
    if scheme.packed:
        codes = unpack_words(folder.read(f"{module}.weight_packed"), columns, scheme.bits)
    else:
        codes = _unsigned(folder, f"{module}.weight", half)
    order = _order(folder, module, scheme, columns, scale.shape[1])
    zero = _zeros(folder, module, scheme, scale.shape)
    if zero is not None and not scheme.asymmetric:
        if (zero != half).any():
            raise ValueError("it is symmetric and has zero points other than 0")
        zero = None
    return tensor_of(fmt, codes, scheme.group, scale[:, order], None if zero is None else zero[:, order])


def _unsigned(folder: Folder, name: str, half: int) -> NDArray[np.uint8]:
    """int8 values as codes. Raises FileFormatError for one that the bits of its scheme do not reach."""
    values = folder.read(name).astype(np.int16) + np.int16(half)
    if values.min() < 0 or values.max() >= 2 * half:
        raise folder.broken(f"tensor {shown(name)} holds values beyond {-half} to {half - 1}")
    return values.astype(np.uint8)


def _zeros(folder: Folder, module: str, scheme: Scheme, shape: tuple[int, ...]) -> NDArray[np.uint8] | None:
    """Zero points as codes, of the shape of the scales; None where there are none."""
    name, half = f"{module}.weight_zero_point", 2 ** (scheme.bits - 1)
    if name not in folder:
        return None
    rows, groups = shape
    if scheme.packed and scheme.asymmetric and not scheme.whole:
        folder.entry(name, ("I32",), (word_count(rows, scheme.bits), groups))
        return np.ascontiguousarray(unpack_words(folder.read(name).T, rows, scheme.bits).T)
    folder.entry(name, ("I8",), (1,) if scheme.whole and folder.dimensions(name) == 1 else (rows, groups))
    return _unsigned(folder, name, half).reshape(shape)


def _order(folder: Folder, module: str, scheme: Scheme, columns: int, groups: int) -> NDArray[np.int64]:
    """The group of each run of columns. Files of before 2026-08 could put columns into groups out of order (actorder group)."""
    name = f"{module}.weight_g_idx"
    if name not in folder or scheme.group == WHOLE_ROW:
        return np.arange(groups)
    folder.entry(name, ("I32", "I64"), (columns,))
    index = folder.read(name).astype(np.int64)
    if (index == -1).all():  # what the library wrote where it had not ordered anything
        return np.arange(groups)
    order = index[:: scheme.group]
    if index.min() < 0 or index.max() >= groups or (np.repeat(order, scheme.group)[:columns] != index).any():
        raise ValueError(
            "its weight_g_idx puts columns into groups out of order (actorder group), and nybble's groups are runs of columns; "
            "quantize with actorder weight or null"
        )
    return order


def _inputs(folder: Folder, module: str, scheme: Scheme) -> Activations:
    """What becomes of a module's inputs."""
    if scheme.inputs == "dynamic":
        return Activations("dynamic")
    folder.entry(f"{module}.input_scale", SCALE_TAGS, (1,) * folder.dimensions(f"{module}.input_scale"))
    scale = float(folder.scales(f"{module}.input_scale").reshape(-1)[0])
    zero = 0
    if f"{module}.input_zero_point" in folder:
        folder.entry(f"{module}.input_zero_point", ("I8",), (1,) * folder.dimensions(f"{module}.input_zero_point"))
        zero = int(folder.read(f"{module}.input_zero_point").reshape(-1)[0])
    try:
        return Activations("static", scale=scale, zero=zero + MIDDLE)
    except ValueError as error:
        raise folder.broken(f"tensor {shown(f'{module}.input_scale')}: {error}") from error


def check(contents: Contents) -> None:
    """Raise UsageError for layers that a compressed-tensors folder cannot hold, from their names, shapes, formats and schemes
    alone, and for architectures that store their layers [in, out] (GPT-2)."""
    for name in layers(contents, NAME, conv1d=False):
        fmt = parse_format(contents.packed[name][0])
        if candidates(fmt, contents.packed[name][1], "linear") != (str(fmt),):
            raise UsageError(f"{NAME} cannot hold {name} {list(contents.packed[name][1])} in {fmt}: it holds {HOLDS}")
        _scheme_of(name, fmt, contents.schemes.get(name))


def write(path: Path, contents: Contents, options: Mapping[str, str]) -> None:
    """A compressed-tensors folder: layers of one scheme are targeted as Linear, those of several by name. Raises UsageError as
    `check`."""
    check(contents)
    names = layers(contents, NAME, conv1d=False)
    arrays = Spilled(path)
    schemes: dict[Scheme, list[str]] = {}
    for name in names:
        tensor = contents.read_packed(name)
        module = name.removesuffix(".weight")
        scheme = _scheme_of(name, tensor.format, tensor.activations)
        schemes.setdefault(scheme, []).append(module)
        arrays.update({f"{module}.{part}": array for part, array in _stored(tensor, scheme, contents.float_tag).items()})
    kinds = {PACKED if scheme.packed else INT for scheme in schemes}
    settings = {
        "quant_method": NAME,
        "version": VERSION,
        "format": kinds.pop() if len(kinds) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": float_modules(contents),
        "config_groups": {
            f"group_{i}": scheme.entry(["Linear"] if len(schemes) == 1 else modules)
            for i, (scheme, modules) in enumerate(schemes.items())
        },
    }
    write_folder(path, contents, arrays, settings)


def _scheme_of(name: str, fmt: Format, inputs: Activations | None) -> Scheme:
    if inputs is not None and (inputs.scheme == "outliers" or fmt.bits != 8 or isinstance(fmt.granularity, int)):
        raise UsageError(
            f"{NAME} cannot hold {name} in {fmt} with inputs {inputs}: it rounds inputs of int8:channel, dynamic or static"
        )
    group = fmt.granularity if isinstance(fmt.granularity, int) else WHOLE_ROW
    asymmetric = bool(getattr(fmt, "asymmetric", False))
    return Scheme(fmt.bits, group, False, asymmetric, inputs is None, inputs.scheme if inputs else "")


def _stored(tensor: QTensor, scheme: Scheme, float_tag: str) -> dict[str, Tagged]:
    """The tensors of a module, by their last name."""
    rows, columns = tensor.shape
    scale, zero = grid_of(tensor)
    codes = tensor.codes.astype(np.uint8, copy=False)
    arrays: dict[str, Tagged] = {"weight_scale": _scales(scale, float_tag)}
    half = np.uint8(2 ** (scheme.bits - 1))
    if scheme.packed:
        arrays["weight_packed"] = "I32", pack_words(codes, scheme.bits)
        arrays["weight_shape"] = "I64", np.array([rows, columns], np.int64)
    else:
        arrays["weight"] = "I8", (codes - half).view(np.int8)
    if scheme.asymmetric:
        packed = np.ascontiguousarray(pack_words(np.ascontiguousarray(zero.T), scheme.bits).T)
        arrays["weight_zero_point"] = ("I32", packed) if scheme.packed else ("I8", (zero - half).view(np.int8))
    if tensor.activations is not None and scheme.inputs == "static":
        arrays["input_scale"] = "F32", np.array([tensor.activations.scale], np.float32)
        arrays["input_zero_point"] = "I8", np.array([tensor.activations.zero - MIDDLE], np.int8)
    return arrays


def _scales(scale: NDArray[np.float32], float_tag: str) -> Tagged:
    """Scales in the model's type where that holds them exactly, else in float32."""
    if float_tag == "BF16" and not (scale.view(np.uint32) & np.uint32(0xFFFF)).any():
        return "BF16", (scale.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    with np.errstate(over="ignore"):
        half = scale.astype(np.float16)
    if float_tag == "F16" and np.array_equal(half.astype(np.float32), scale):
        return "F16", half
    return "F32", scale
