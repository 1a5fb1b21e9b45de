"""AWQ folders: words by hand, values by an independent decoder and by GPTQModel where it is installed, what is refused, and bytes
that come out the same when they are written again."""

from __future__ import annotations

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
    changed,
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
from nybble.errors import FileFormatError, UsageError
from nybble.formats import QTensor, parse_format

AWQ = find_container("awq")
MODELS = Path(__file__).parents[3] / "shared" / "data" / "models"
STEM = QUERY.removesuffix("weight")
SPECS = [f"int4:g{group}{asym}" for group in (32, 64, 128) for asym in ("", ",asym")]
GOLDEN = "14a6bfb6682a69ab7ae0fabf465dd4e0fe99fbf73244b79b995c4da7a94c7d7e"
"""SHA-256 of model.safetensors with one weight."""


def decoded(arrays: dict[str, Tagged], module: str, group: int) -> NDArray[np.float32]:
    """A weight [N, K] from a folder's tensors, nibble by nibble: shares no code with what is tested."""
    qweight, qzeros, scales = (arrays[f"{module}.{part}"][1] for part in ("qweight", "qzeros", "scales"))
    columns, words = qweight.shape
    result = np.empty((8 * words, columns), np.float32)
    for column in range(columns):
        for word in range(words):
            codes, zeros = int(qweight.view(np.uint32)[column, word]), int(qzeros.view(np.uint32)[column // group, word])
            for i, row in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                level = (codes >> 4 * i & 15) - (zeros >> 4 * i & 15)
                result[8 * word + row, column] = np.float32(scales[column // group, 8 * word + row]) * np.float32(level)
    return result


def test_a_word_by_hand(tmp_path: Path) -> None:
    """Rows 0 to 7 of a column with codes 0 to 7: nibbles 0 2 4 6 1 3 5 7, from the lowest."""
    fmt = parse_format("int4:g32")
    codes = np.repeat(np.arange(8, dtype=np.uint8)[:, None], 32, axis=1)
    tensor = QTensor(fmt, codes, {"scale": np.ones((8, 1), np.float16)})
    arrays = arrays_of(written("awq", model({QUERY: tensor}), tmp_path / "out"))
    assert set(arrays[f"{STEM}qweight"][1].view(np.uint32).ravel().tolist()) == {0x75316420}
    assert arrays[f"{STEM}qweight"][1].shape == (32, 1)
    assert arrays[f"{STEM}qzeros"][1].view(np.uint32).tolist() == [[0x88888888]]


@pytest.mark.parametrize("spec", SPECS)
def test_values_by_an_independent_decoder(spec: str, tmp_path: Path) -> None:
    tensor = rounded(spec, (24, 128))
    folder = written("awq", model({QUERY: tensor}), tmp_path / "out")
    found = decoded(arrays_of(folder), STEM[:-1], int(spec.removeprefix("int4:g").removesuffix(",asym")))
    assert found.tobytes() == tensor.decode().tobytes()


@pytest.mark.parametrize("spec", SPECS)
def test_write_read_write(spec: str, tmp_path: Path) -> None:
    contents = assert_round_trip("awq", two_layers(spec), tmp_path)
    found = settings_of(tmp_path / "first")
    assert found == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": parse_format(spec).granularity,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head"],
    }
    assert contents.details["version"] == "gemm"


def test_any_codes_and_zero_points(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    fmt = parse_format("int4:g64,asym")
    scale = rng.standard_normal((40, 3)).astype(np.float16).astype(np.float64)
    params = fmt.from_grid(scale, rng.integers(0, 16, (40, 3)).astype(np.float64))
    tensor = QTensor(fmt, rng.integers(0, 16, (40, 192)).astype(np.uint8), params)
    assert_round_trip("awq", model({QUERY: tensor}), tmp_path)
    assert decoded(arrays_of(tmp_path / "first"), STEM[:-1], 64).tobytes() == tensor.decode().tobytes()


def test_what_stays_in_float_is_named(tmp_path: Path) -> None:
    odd = "model.layers.0.mlp.up_proj.weight"
    floats: dict[str, Tagged] = {
        odd: ("F32", np.ones((172, 64), np.float32)),
        "lm_head.weight": ("F32", np.ones((97, 64), np.float32)),
        "model.embed_tokens.weight": ("F32", np.ones((97, 64), np.float32)),
    }
    assert_round_trip("awq", model({QUERY: rounded("int4:g64", (64, 128))}, floats), tmp_path)
    found = settings_of(tmp_path / "first")
    assert found["modules_to_not_convert"] == ["lm_head", "model.layers.0.mlp.up_proj"]
    assert found["dynamic"] == {r"-:model\.layers\.0\.mlp\.up_proj$": {}}


CANDIDATES = {
    ("int4:g64", (64, 128), "linear"): ("int4:g64",),
    ("int3:g64,asym", (64, 128), "linear"): ("int4:g64,asym",),
    ("int4:channel", (64, 128), "linear"): ("int4:g128",),
    ("int4:g256", (64, 256), "linear"): ("int4:g128",),
    ("int8:g64", (64, 128), "linear"): (),
    ("nf4:g64", (64, 128), "linear"): ("int4:g64",),
    ("int4:g64", (172, 64), "linear"): ("fp32", "fp16", "bf16"),
    ("int4:g64", (64, 172), "linear"): ("fp32", "fp16", "bf16"),
    ("int4:g64", (64, 128), "head"): ("fp32", "fp16", "bf16"),
    ("bf16", (64, 128), "linear"): ("bf16",),
}


@pytest.mark.parametrize("case", CANDIDATES, ids=lambda case: f"{case[0]}-{case[1]}-{case[2]}")
def test_candidates(case: tuple[str, tuple[int, int], str]) -> None:
    spec, shape, kind = case
    assert AWQ.candidates(parse_format(spec), shape, kind) == CANDIDATES[case]


REFUSED: dict[str, tuple[dict[str, tuple[str, tuple[int, int]]], dict[str, Any], str]] = {
    "Conv1D": (
        {"transformer.h.0.mlp.c_fc.weight": ("int4:g64", (64, 128))},
        GPT2,
        "awq is loaded into Linear layers, and transformer.h.0.mlp.c_fc.weight is a Conv1D; gpt2 fits into gguf, gptq",
    ),
    "different groups": ({QUERY: ("int4:g64", (64, 128)), DOWN: ("int4:g32", (64, 128))}, LLAMA, "one group size for all layers"),
    "8 bits": ({QUERY: ("int8:g64", (64, 128))}, LLAMA, "awq cannot hold .* in int8:g64: it holds int4:g32"),
    "a head": ({"lm_head.weight": ("int4:g64", (64, 128))}, LLAMA, "has to stay in float"),
    "nothing packed": ({QUERY: ("fp32", (64, 128))}, LLAMA, "awq is for quantized layers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_written(name: str, tmp_path: Path) -> None:
    specs, config, message = REFUSED[name]
    contents = model({key: rounded(spec, shape) for key, (spec, shape) in specs.items()}, config=config)
    with pytest.raises(UsageError, match=message) as caught:
        written("awq", contents, tmp_path / "out")
    assert "\n" not in str(caught.value)


def put(part: str, tag: str, array: NDArray[Any]) -> Any:
    def change(arrays: dict[str, Tagged], _: dict[str, Any]) -> None:
        arrays[f"{STEM}{part}"] = tag, array

    return change


def setting(**values: Any) -> Any:
    return lambda _, given: given.update(values)


HOSTILE: dict[str, tuple[Any, str]] = {
    "no qzeros": (lambda arrays, _: arrays.pop(f"{STEM}qzeros"), "q_proj.qzeros' is missing"),
    "no scales": (lambda arrays, _: arrays.pop(f"{STEM}scales"), "q_proj.scales' is missing"),
    "qweight of bytes": (put("qweight", "U8", np.zeros((128, 8), np.uint8)), "is U8, it must be I32"),
    "qzeros of another width": (put("qzeros", "I32", np.zeros((2, 7), np.int32)), r"has shape \[2, 7\], it must be \[2, 8\]"),
    "scales of another width": (put("scales", "F16", np.zeros((2, 65), np.float16)), r"\[2, 65\], it must be \[2, 64\]"),
    "too many groups": (put("scales", "F16", np.zeros((4, 64), np.float16)), r"\[4, 64\], it must be \[2, 64\]"),
    "g_idx": (put("g_idx", "I32", np.zeros(128, np.int32)), "g_idx' orders columns, which AWQ does not"),
    "a float weight beside": (put("weight", "F32", np.zeros((64, 128), np.float32)), "stands beside a packed weight"),
    "8 bits": (setting(bits=8), "bits of quantization_config is 8; nybble reads 4"),
    "version gemv": (setting(version="gemv"), "version of quantization_config is 'gemv'; nybble reads gemm"),
    "version 4": (setting(version=4), "version of quantization_config is 4"),
    "groups of 16": (setting(group_size=16), "group_size of quantization_config is 16"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_broken_folders(name: str, tmp_path: Path) -> None:
    change, message = HOSTILE[name]
    folder = changed(written("awq", model({QUERY: rounded("int4:g64", (64, 128))}), tmp_path / "out"), change)
    with pytest.raises(FileFormatError, match=message) as caught:
        AWQ.read(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_other_ways_to_say_gemm(tmp_path: Path) -> None:
    def older(_: dict[str, Tagged], given: dict[str, Any]) -> None:
        given["version"] = "GEMM"

    def newer(_: dict[str, Tagged], given: dict[str, Any]) -> None:
        del given["version"]
        given["format"] = "gemm"

    folder = written("awq", model({QUERY: rounded("int4:g64", (64, 128))}), tmp_path / "out")
    for change in (older, newer):
        assert_same(AWQ.read(changed(folder, change)).read_packed(QUERY), rounded("int4:g64", (64, 128)))


def test_whole_rows_are_read(tmp_path: Path) -> None:
    """group_size -1, which nobody is known to need, has a float16 scale for a row."""
    folder = written("awq", model({QUERY: rounded("int4:g128", (64, 128))}), tmp_path / "out")
    contents = AWQ.read(changed(folder, setting(group_size=-1)))
    assert contents.packed[QUERY] == ("int4:channel", (64, 128))
    assert contents.read_packed(QUERY).decode().tobytes() == rounded("int4:g128", (64, 128)).decode().tobytes()


def test_recognizes(tmp_path: Path) -> None:
    folder = written("awq", model({QUERY: rounded("int4:g64", (64, 128))}), tmp_path / "out")
    assert AWQ.recognizes(folder)
    assert not find_container("gptq").recognizes(folder)
    assert open_contents(folder).container == "awq"


def test_golden_bytes(tmp_path: Path) -> None:
    """A change here makes another file of the same weight."""
    folder = written("awq", model({QUERY: grid("int4:g64,asym", (64, 128))}), tmp_path / "out")
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() == GOLDEN


@pytest.mark.parametrize("spec", ["int4:g32", "int4:g64,asym"])
def test_a_real_model(spec: str, tmp_path: Path) -> None:
    if not (MODELS / "stories260k-llama").exists():
        pytest.skip("no stories260k-llama; it lies in the project's shared data")
    source = open_contents(MODELS / "stories260k-llama")
    convert(source, tmp_path / "first", "awq", spec)
    contents = AWQ.read(tmp_path / "first")
    assert len(contents.packed) == 20  # 172 is no multiple of 8, so the feed-forward stays in float
    for key in contents.packed:
        codes, params = parse_format(spec).round(source.float32(key))
        assert_same(contents.read_packed(key), QTensor(parse_format(spec), codes, params))
    written("awq", contents, tmp_path / "second")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "second" / file).read_bytes() == (tmp_path / "first" / file).read_bytes()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("spec", SPECS)
def test_gptqmodel_decodes_the_same_values(spec: str, tmp_path: Path) -> None:
    pytest.importorskip("gptqmodel", reason="gptqmodel is not installed")
    torch: Any = pytest.importorskip("torch")
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    tensor = rounded(spec, (64, 256))
    folder = written("awq", model({QUERY: tensor}), tmp_path / "out")
    arrays = arrays_of(folder)
    parts = (torch.from_numpy(arrays[f"{STEM}{part}"][1]) for part in ("qweight", "qzeros", "scales"))
    found = dequantize_gemm(*parts, 4, settings_of(folder)["group_size"]).T.float().numpy()
    assert np.array_equal(found, tensor.decode().astype(np.float16).astype(np.float32))
