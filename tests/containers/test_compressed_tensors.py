"""compressed-tensors folders: values by an independent decoder and by the library where it is installed, bytes that come out the
same when they are written again, and what is refused."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_contents import (
    DOWN,
    GPT2,
    LLAMA,
    QUERY,
    Tagged,
    arrays_of,
    assert_round_trip,
    assert_same,
    grid,
    model,
    rounded,
    settings_of,
    two_layers,
    written,
)
from numpy.typing import NDArray

from nybble.containers import find_container, open_contents
from nybble.convert import convert
from nybble.errors import UsageError
from nybble.formats import QTensor, parse_format
from nybble.formats.activations import Activations

CT = find_container("compressed-tensors")
MODELS = Path(__file__).parents[3] / "shared" / "data" / "models"
STEM = QUERY.removesuffix("weight")
SPECS = [f"int{bits}:{block}{asym}" for bits in (2, 4, 8) for block in ("channel", "g32", "g128") for asym in ("", ",asym")]
SPECS += ["int4:g32,f32", "int8:g128,asym,f32"]
SCHEMES = (Activations("dynamic"), Activations("static", scale=0.037, zero=113))
GOLDEN = "bcc32ccf6fdc97c2aae5192e7bd7ccdbf708e2170ee3ddf466e3b94b71ff70b6"
"""SHA-256 of model.safetensors with one weight."""


def decoded(arrays: dict[str, Tagged], module: str, bits: int) -> NDArray[np.float32]:
    """A pack-quantized weight from a folder's tensors, code by code: shares no code with what is tested."""
    rows, columns = (int(n) for n in arrays[f"{module}.weight_shape"][1])
    words = arrays[f"{module}.weight_packed"][1].view(np.uint32)
    scales = arrays[f"{module}.weight_scale"][1].astype(np.float32)
    zeros = arrays.get(f"{module}.weight_zero_point")
    per_word, top, half = 32 // bits, 2**bits - 1, 2 ** (bits - 1)
    size = columns // scales.shape[1]
    result = np.empty((rows, columns), np.float32)
    for row in range(rows):
        for column in range(columns):
            value = (int(words[row, column // per_word]) >> bits * (column % per_word) & top) - half
            if zeros is not None:
                word = int(zeros[1].view(np.uint32)[row // per_word, column // size])
                value -= (word >> bits * (row % per_word) & top) - half
            result[row, column] = np.float32(scales[row, column // size]) * np.float32(value)
    return result


def with_inputs(tensor: QTensor, scheme: Activations) -> QTensor:
    return dataclasses.replace(tensor, activations=scheme)


@pytest.mark.parametrize("spec", SPECS)
def test_values_by_an_independent_decoder(spec: str, tmp_path: Path) -> None:
    tensor = rounded(spec, (20, 128))
    folder = written("compressed-tensors", model({QUERY: tensor}), tmp_path / "out")
    assert decoded(arrays_of(folder), STEM[:-1], tensor.format.bits).tobytes() == tensor.decode().tobytes()


@pytest.mark.parametrize("spec", [*SPECS, "int4:g64"])
def test_write_read_write(spec: str, tmp_path: Path) -> None:
    assert_round_trip("compressed-tensors", two_layers(spec), tmp_path)
    fmt, found = parse_format(spec), settings_of(tmp_path / "first")
    grouped = isinstance(fmt.granularity, int)
    assert found["format"] == "pack-quantized"
    assert found["ignore"] == ["lm_head"]
    assert found["quantization_status"] == "compressed"
    assert found["version"] == "0.20.0"
    assert found["config_groups"] == {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": fmt.bits,
                "type": "int",
                "symmetric": ",asym" not in spec,
                "strategy": "group" if grouped else "channel",
                "group_size": fmt.granularity if grouped else None,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
            "format": "pack-quantized",
        }
    }


@pytest.mark.parametrize("shape", [(1, 32), (3, 100), (5, 1), (33, 172)])
def test_rows_of_any_length_for_whole_rows(shape: tuple[int, int], tmp_path: Path) -> None:
    assert_round_trip("compressed-tensors", model({QUERY: rounded("int4:channel,asym", shape)}), tmp_path)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("spec", ["int8:channel", "int8:channel,asym"])
def test_rounded_inputs(spec: str, scheme: Activations, tmp_path: Path) -> None:
    tensor = with_inputs(rounded(spec, (20, 64)), scheme)
    contents = assert_round_trip("compressed-tensors", model({QUERY: tensor}), tmp_path)
    assert contents.schemes == {QUERY: scheme}
    found, arrays = settings_of(tmp_path / "first"), arrays_of(tmp_path / "first")
    assert found["format"] == "int-quantized"
    inputs = found["config_groups"]["group_0"]["input_activations"]
    assert (inputs["dynamic"], inputs["strategy"]) == ((True, "token") if scheme.scheme == "dynamic" else (False, "tensor"))
    assert arrays[f"{STEM}weight"][0] == "I8"
    assert np.array_equal(arrays[f"{STEM}weight"][1].astype(np.int16) + 128, tensor.codes)
    assert (f"{STEM}input_scale" in arrays) == (scheme.scheme == "static")
    if scheme.scheme == "static":
        assert arrays[f"{STEM}input_zero_point"][1].tolist() == [113 - 128]


def test_layers_of_several_schemes_are_named(tmp_path: Path) -> None:
    other = QUERY.replace("q_proj", "k_proj")
    tensors = {
        QUERY: rounded("int4:g64", (64, 128)),
        DOWN: rounded("int8:channel", (64, 256)),
        other: with_inputs(rounded("int8:channel", (32, 128)), SCHEMES[0]),
    }
    assert_round_trip("compressed-tensors", model(tensors), tmp_path)
    found = settings_of(tmp_path / "first")
    assert found["format"] == "mixed-precision"
    targets = {tuple(group["targets"]): group["format"] for group in found["config_groups"].values()}
    assert targets == {
        (STEM[:-1],): "pack-quantized",
        (DOWN.removesuffix(".weight"),): "pack-quantized",
        (other.removesuffix(".weight"),): "int-quantized",
    }


@pytest.mark.parametrize(("dtype", "wanted"), [("float32", "F32"), ("float16", "F16"), ("bfloat16", "BF16")])
def test_scales_in_the_models_type_where_it_holds_them(dtype: str, wanted: str, tmp_path: Path) -> None:
    config = {**LLAMA, "dtype": dtype}
    fmt = parse_format("int4:g64")
    coarse = QTensor(fmt, rounded("int4:g64", (64, 128)).codes, {"scale": np.full((64, 2), 2.0**-9, np.float16)})
    fine = rounded("int4:g64", (64, 128))
    wide = rounded("int8:channel", (64, 128))
    names = (QUERY, DOWN, QUERY.replace("q_proj", "o_proj"))
    assert_round_trip("compressed-tensors", model(dict(zip(names, (coarse, fine, wide), strict=True)), config=config), tmp_path)
    arrays = arrays_of(tmp_path / "first")
    tags = [arrays[name.replace("weight", "weight_scale")][0] for name in names]
    assert tags == [wanted, "F16" if wanted == "F16" else "F32", "F32"]


CANDIDATES = {
    ("int4:g64", (64, 128), "linear"): ("int4:g64",),
    ("int3:g64", (64, 128), "linear"): ("int4:g64",),
    ("int4:g64,asym,f32", (64, 128), "linear"): ("int4:g64,asym,f32",),
    ("int5:g64,f32", (64, 128), "linear"): ("int8:g64,f32",),
    ("int5:g32,asym", (64, 128), "linear"): ("int8:g32,asym",),
    ("int2:channel", (172, 172), "linear"): ("int2:channel",),
    ("int8:tensor", (64, 172), "linear"): ("int8:channel",),
    ("int4:g64", (64, 172), "linear"): ("fp32", "fp16", "bf16"),
    ("int4:g64", (172, 64), "linear"): ("int4:g64",),
    ("q4_0", (64, 128), "linear"): ("int4:g32",),
    ("nf4:g64", (64, 128), "linear"): ("int4:g64",),
    ("int4:g64", (64, 128), "embedding"): ("fp32", "fp16", "bf16"),
    ("fp16", (64, 128), "linear"): ("fp16",),
}


@pytest.mark.parametrize("case", CANDIDATES, ids=lambda case: f"{case[0]}-{case[1]}-{case[2]}")
def test_candidates(case: tuple[str, tuple[int, int], str]) -> None:
    spec, shape, kind = case
    assert CT.candidates(parse_format(spec), shape, kind) == CANDIDATES[case]


REFUSED: dict[str, tuple[dict[str, QTensor], dict[str, Any], str]] = {
    "Conv1D": (
        {"transformer.h.0.mlp.c_fc.weight": rounded("int4:g64", (64, 128))},
        GPT2,
        "compressed-tensors is loaded into Linear layers, and transformer.h.0.mlp.c_fc.weight is a Conv1D; gpt2 fits into gguf",
    ),
    "3 bits": (
        {QUERY: rounded("int3:g64", (64, 128))},
        LLAMA,
        "cannot hold .* in int3:g64: it holds int2, int4",
    ),
    "short groups": ({QUERY: rounded("int4:g64", (64, 96))}, LLAMA, r"cannot hold .* \[64, 96\] in int4:g64"),
    "nf4": ({QUERY: rounded("nf4:g64", (64, 128))}, LLAMA, "cannot hold .* in nf4:g64"),
    "a head": ({"lm_head.weight": rounded("int8:channel", (64, 128))}, LLAMA, "has to stay in float"),
    "outliers": (
        {QUERY: with_inputs(rounded("int8:channel", (64, 128)), Activations("outliers", 6.0))},
        LLAMA,
        "with inputs outliers:threshold=6: it rounds inputs of int8:channel, dynamic or static",
    ),
    "rounded inputs of groups": ({QUERY: with_inputs(rounded("int8:g64", (64, 128)), SCHEMES[0])}, LLAMA, "with inputs dynamic"),
    "nothing packed": ({QUERY: rounded("bf16", (64, 128))}, LLAMA, "compressed-tensors is for quantized layers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_written(name: str, tmp_path: Path) -> None:
    tensors, config, message = REFUSED[name]
    with pytest.raises(UsageError, match=message) as caught:
        written("compressed-tensors", model(tensors, config=config), tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_golden_bytes(tmp_path: Path) -> None:
    """A change here makes another file of the same weight."""
    folder = written("compressed-tensors", model({QUERY: grid("int4:g64,asym", (64, 128))}), tmp_path / "out")
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() == GOLDEN


@pytest.mark.parametrize("spec", ["int4:g32", "int8:channel", "int4:g64,asym"])
def test_a_real_model(spec: str, tmp_path: Path) -> None:
    if not (MODELS / "stories260k-llama").exists():
        pytest.skip("no stories260k-llama; it lies in the project's shared data")
    source = open_contents(MODELS / "stories260k-llama")
    convert(source, tmp_path / "first", "compressed-tensors", spec)
    contents = CT.read(tmp_path / "first")
    assert len(contents.packed) == (35 if "channel" in spec else 30)  # rows of 172 are no whole groups
    for key in contents.packed:
        assert_same(contents.read_packed(key), QTensor(parse_format(spec), *parse_format(spec).round(source.float32(key))))
    written("compressed-tensors", contents, tmp_path / "second")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "second" / file).read_bytes() == (tmp_path / "first" / file).read_bytes()


def test_gpt2_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    if not (MODELS / "stdlib-gpt2-6m").exists():
        pytest.skip("no stdlib-gpt2-6m; it lies in the project's shared data")
    with pytest.raises(UsageError, match="is a Conv1D"):
        convert(MODELS / "stdlib-gpt2-6m", tmp_path / "out", "compressed-tensors", "int4:g64")
    assert list(tmp_path.iterdir()) == []


def test_recognizes(tmp_path: Path) -> None:
    folder = written("compressed-tensors", two_layers("int4:g64"), tmp_path / "out")
    assert CT.recognizes(folder)
    assert open_contents(folder).container == "compressed-tensors"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("spec", SPECS)
def test_the_library_makes_and_reads_the_same_tensors(spec: str, tmp_path: Path) -> None:
    """`decompress` of what we wrote is our weight to the bit, and `compress` of that is what we wrote."""
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    torch: Any = pytest.importorskip("torch")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    tensor = rounded(spec, (64, 256))
    folder = written("compressed-tensors", model({QUERY: tensor}), tmp_path / "out")
    scheme = QuantizationScheme(**settings_of(folder)["config_groups"]["group_0"])
    stored = {k.removeprefix(STEM): torch.from_numpy(a) for k, (_, a) in arrays_of(folder).items() if k.startswith(STEM)}
    library = BaseCompressor.get_value_from_registry("pack-quantized")
    loose = library.decompress(dict(stored), scheme)
    assert loose["weight"].numpy().tobytes() == tensor.decode().tobytes()
    again = library.compress(loose, scheme)
    assert set(again) == set(stored)
    for name, value in stored.items():
        assert torch.equal(again[name], value), name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_library_reads_int_quantized_weights(scheme: Activations, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    torch: Any = pytest.importorskip("torch")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    tensor = with_inputs(rounded("int8:channel,asym", (64, 256)), scheme)
    folder = written("compressed-tensors", model({QUERY: tensor}), tmp_path / "out")
    stored = {k.removeprefix(STEM): torch.from_numpy(a) for k, (_, a) in arrays_of(folder).items() if k.startswith(STEM)}
    settings = QuantizationScheme(**settings_of(folder)["config_groups"]["group_0"])
    found = BaseCompressor.get_value_from_registry("int-quantized").decompress(stored, settings)["weight"]
    assert found.numpy().tobytes() == tensor.decode().tobytes()
