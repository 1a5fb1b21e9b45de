"""bitsandbytes folders: values by an independent decoder and by the library where it is installed, bytes that come out the same
when they are written again, and what is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
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
from nybble.errors import NumericError, UsageError
from nybble.formats import QTensor, parse_format
from nybble.formats.activations import Activations
from nybble.formats.codebook import NF4, dynamic_levels

BNB = find_container("bitsandbytes")
MODELS = Path(__file__).parents[3] / "shared" / "data" / "models"
STEM = QUERY.removesuffix("weight")
FOURS = [f"{name}:g{block}{dq}" for name in ("nf4", "fp4") for block in (32, 64, 128, 256) for dq in ("", ",dq", ",f32")]
STATE = f"{QUERY}.quant_state.bitsandbytes__nf4"
GOLDEN = {
    "nf4:g64": "13def1c8404d7a87e188e2d2a1f2ede08b406ce217634b51a86e45582a507bd3",
    "nf4:g64,dq": "713a345722afdc7b25ab02f30c5d17b4b74f676b6c7151c6b4667483ff97ee31",
    "int8:channel": "4aaa55334967422d9b1aed3a0d8665707086f47e5ab6bd74a1ea9e698bef790a",
}
"""SHA-256 of model.safetensors with one weight."""


def eight(shape: tuple[int, int] = (64, 128), seed: int = 0) -> QTensor:
    """An int8 weight as a bitsandbytes folder keeps it."""
    found: QTensor = BNB.settle(rounded("int8:channel", shape, seed))
    return found


def decoded(arrays: dict[str, Tagged], name: str, kind: str) -> NDArray[np.float32]:
    """A 4-bit weight [N, K] from a folder's tensors, block by block: shares no code with what is tested."""
    state = json.loads(bytes(arrays[f"{name}.quant_state.bitsandbytes__{kind}"][1]))
    absmax, table = arrays[f"{name}.absmax"][1], arrays[f"{name}.quant_map"][1]
    if "nested_absmax" in "".join(arrays):
        nested, places = arrays[f"{name}.nested_absmax"][1], arrays[f"{name}.nested_quant_map"][1]
        scales = [places[code] * nested[i // 256] + np.float32(state["nested_offset"]) for i, code in enumerate(absmax)]
    else:
        scales = list(absmax)
    values = []
    for i, byte in enumerate(arrays[name][1].ravel()):
        for j, code in enumerate((byte >> 4, byte & 15)):
            values.append(table[code] * scales[(2 * i + j) // state["blocksize"]])
    return np.array(values, np.float32).reshape(state["shape"])


def test_a_byte_by_hand(tmp_path: Path) -> None:
    """The first of two codes is in the high half; the state is JSON in bytes."""
    fmt = parse_format("nf4:g32")
    codes = np.tile(np.array([1, 15, 0, 7], np.uint8), (2, 8))
    tensor = QTensor(fmt, codes, {"scale": np.array([[0.5], [2.0]], np.float16)})
    arrays = arrays_of(written("bitsandbytes", model({QUERY: tensor}), tmp_path / "out"))
    assert arrays[QUERY][1].shape == (32, 1)
    assert arrays[QUERY][1][:2].tolist() == [[0x1F], [0x07]]
    assert arrays[f"{QUERY}.absmax"][1].tolist() == [0.5, 2.0]
    assert arrays[f"{QUERY}.quant_map"][1].tobytes() == np.array(NF4, np.float32).tobytes()
    assert bytes(arrays[STATE][1]).decode() == '{"quant_type": "nf4", "blocksize": 32, "dtype": "float32", "shape": [2, 32]}'


@pytest.mark.parametrize("spec", FOURS)
def test_values_by_an_independent_decoder(spec: str, tmp_path: Path) -> None:
    tensor = rounded(spec, (12, 256))
    folder = written("bitsandbytes", model({QUERY: tensor}), tmp_path / "out")
    assert np.array_equal(decoded(arrays_of(folder), QUERY, spec[:3]), tensor.decode())


@pytest.mark.parametrize("spec", FOURS)
def test_write_read_write(spec: str, tmp_path: Path) -> None:
    contents = model({QUERY: rounded(spec, (64, 256), 1), DOWN: rounded(spec, (96, 512), 2)})
    assert_round_trip("bitsandbytes", contents, tmp_path)
    found = settings_of(tmp_path / "first")
    assert (found["load_in_4bit"], found["load_in_8bit"]) == (True, False)
    assert (found["bnb_4bit_quant_type"], found["bnb_4bit_use_double_quant"]) == (spec[:3], spec.endswith("dq"))
    assert found["llm_int8_skip_modules"] == ["lm_head"]
    assert found["bnb_4bit_compute_dtype"] == "float32"


def test_blocks_and_double_quantization_may_differ(tmp_path: Path) -> None:
    contents = model({QUERY: rounded("nf4:g64", (64, 128)), DOWN: rounded("nf4:g32,dq", (32, 96))})
    assert_round_trip("bitsandbytes", contents, tmp_path)
    assert settings_of(tmp_path / "first")["bnb_4bit_use_double_quant"] is True


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_models_type_is_that_of_the_state(dtype: str, tmp_path: Path) -> None:
    contents = model({QUERY: rounded("nf4:g64", (64, 128))}, config={**LLAMA, "dtype": dtype})
    assert_round_trip("bitsandbytes", contents, tmp_path)
    assert json.loads(bytes(arrays_of(tmp_path / "first")[STATE][1]))["dtype"] == dtype
    assert settings_of(tmp_path / "first")["bnb_4bit_compute_dtype"] == dtype


@pytest.mark.parametrize(
    ("scheme", "threshold"), [(None, 6.0), (Activations("outliers", 3.5), 3.5), (Activations("dynamic"), 0.0)], ids=str
)
def test_int8(scheme: Activations | None, threshold: float, tmp_path: Path) -> None:
    given = {QUERY: rounded("int8:channel", (64, 128)), DOWN: rounded("int8:channel", (3, 172), 2)}
    tensors = {name: BNB.settle(dataclasses.replace(tensor, activations=scheme)) for name, tensor in given.items()}
    contents = assert_round_trip("bitsandbytes", model(tensors), tmp_path)
    assert contents.schemes[QUERY] == (scheme or Activations("outliers", 6.0))
    found, arrays = settings_of(tmp_path / "first"), arrays_of(tmp_path / "first")
    assert (found["load_in_8bit"], found["llm_int8_threshold"]) == (True, threshold)
    assert np.array_equal(arrays[QUERY][1].astype(np.int16) + 128, given[QUERY].codes)
    assert arrays[f"{STEM}SCB"][1].shape == (64,)
    assert (arrays[f"{STEM}weight_format"][0], arrays[f"{STEM}weight_format"][1].shape) == ("U8", ())


def test_scales_are_settled_or_refused(tmp_path: Path) -> None:
    """Few float32 are no SCB/127: their neighbour is. What is settled stays; codes do."""
    scale = np.random.default_rng(0).uniform(1, 2, (4096, 1)).astype(np.float32)
    tensor = QTensor(parse_format("int8:channel"), np.full((4096, 2), 255, np.uint8), {"scale": scale})
    kept = BNB.settle(tensor)
    assert_same(BNB.settle(kept), kept)
    assert np.array_equal(kept.codes, tensor.codes)
    np.testing.assert_array_max_ulp(kept.params["scale"], scale, 1)
    assert 0 < np.count_nonzero(kept.params["scale"] != scale) < 200
    with pytest.raises(NumericError, match=r"q_proj.weight: scale .* of 4096\) is no SCB/127 of float32"):
        written("bitsandbytes", model({QUERY: tensor}), tmp_path / "out")
    assert_round_trip("bitsandbytes", model({QUERY: kept}), tmp_path)
    with pytest.raises(NumericError, match="times 127 is no float32"):
        BNB.settle(QTensor(tensor.format, tensor.codes, {"scale": np.full((4096, 1), 3e38, np.float32)}))
    four = rounded("nf4:g64", (2, 64))
    assert BNB.settle(four) is four
    wide = QTensor(parse_format("nf4:g64,f32"), four.codes, {"scale": four.params["scale"].astype(np.float32)})
    assert_same(BNB.settle(wide), four)


def test_values_of_int8_are_within_three_units_in_the_last_place() -> None:
    """Of what bitsandbytes computes, (code * SCB) * (1/127) in float32; over every code and many scales."""
    largest = np.exp2(np.random.default_rng(0).uniform(-12, 4, 20_000)).astype(np.float32)[:, None]
    codes = np.tile(np.arange(256, dtype=np.uint8), (len(largest), 1))
    ours = QTensor(parse_format("int8:channel"), codes, {"scale": largest / np.float32(127)}).decode()
    theirs = (codes.astype(np.float32) - np.float32(128)) * largest * np.float32(7.874015718698502e-3)
    apart = np.abs(ours.view(np.int32).astype(np.int64) - theirs.view(np.int32))[theirs != 0]
    assert 1 <= apart.max() <= 3


def test_a_nested_scale_below_zero(tmp_path: Path) -> None:
    """bitsandbytes turns the signs of its block, our format has zeros there: it is not written so, unless its codes are all the
    level 0, and read as what came out."""
    fmt = parse_format("nf4:g64,dq")
    low = int(np.searchsorted(dynamic_levels(), -0.5))
    params = {
        "scale_codes": np.array([[low, 255]], np.uint8),
        "scale_scale": np.array([1.0], np.float32),
        "scale_offset": np.array([0.25], np.float32),
    }
    codes = np.full((1, 128), 9, np.uint8)
    with pytest.raises(NumericError, match=r"a scale comes out below zero under double quantization.*nf4:g64 without dq"):
        written("bitsandbytes", model({QUERY: QTensor(fmt, codes, params)}), tmp_path / "out")
    codes[0, :64] = 7
    assert_round_trip("bitsandbytes", model({QUERY: QTensor(fmt, codes, params)}), tmp_path)

    def other(arrays: dict[str, Tagged], _: dict[str, Any]) -> None:
        arrays[QUERY][1][0] = 0x79

    found = BNB.read(changed(tmp_path / "first", other)).read_packed(QUERY)
    assert str(found.format) == "nf4:g64,f32"
    assert found.params["scale"][0, 0] == dynamic_levels()[low] + np.float32(0.25) < 0
    assert np.array_equal(decoded(arrays_of(tmp_path / "first"), QUERY, "nf4"), found.decode())
    assert_round_trip("bitsandbytes", model({QUERY: found}), tmp_path / "plain")


CANDIDATES = {
    ("nf4:g64", (64, 128), "linear"): ("nf4:g64",),
    ("fp4:g256,dq", (64, 512), "linear"): ("fp4:g256,dq",),
    ("nf4:g128,dq", (64, 192), "linear"): ("nf4:g64,dq",),
    ("nf4:g64,f32", (64, 192), "linear"): ("nf4:g64,f32",),
    ("nf4:channel", (64, 192), "linear"): ("nf4:g64",),
    ("int8:channel", (3, 172), "linear"): ("int8:channel",),
    ("int8:g64", (64, 128), "linear"): ("int8:channel",),
    ("int4:tensor", (64, 128), "linear"): ("int8:channel",),
    ("int4:g128", (64, 128), "linear"): ("nf4:g128",),
    ("q6_k", (64, 256), "linear"): ("int8:channel",),
    ("q4_k", (64, 256), "linear"): ("nf4:g32",),
    ("nf4:g64", (64, 172), "linear"): ("fp32", "fp16", "bf16"),
    ("nf4:g64", (64, 128), "head"): ("fp32", "fp16", "bf16"),
    ("fp16", (64, 128), "linear"): ("fp16",),
}


@pytest.mark.parametrize("case", CANDIDATES, ids=lambda case: f"{case[0]}-{case[1]}-{case[2]}")
def test_candidates(case: tuple[str, tuple[int, int], str]) -> None:
    spec, shape, kind = case
    assert BNB.candidates(parse_format(spec), shape, kind) == CANDIDATES[case]


REFUSED: dict[str, tuple[dict[str, QTensor], dict[str, Any], str]] = {
    "two types": (
        {QUERY: rounded("nf4:g64", (64, 128)), DOWN: rounded("fp4:g64", (64, 128))},
        LLAMA,
        "has one type for all layers",
    ),
    "4 and 8 bits": ({QUERY: rounded("nf4:g64", (64, 128)), DOWN: eight()}, LLAMA, "has one type for all layers"),
    "blocks across rows": ({QUERY: rounded("nf4:g64", (64, 96))}, LLAMA, r"cannot hold .* \[64, 96\] in nf4:g64"),
    "int4": ({QUERY: rounded("int4:g64", (64, 128))}, LLAMA, "bitsandbytes cannot hold .* in int4:g64: it holds nf4 and fp4"),
    "a head": ({"lm_head.weight": rounded("nf4:g64", (64, 128))}, LLAMA, "has to stay in float"),
    "static inputs": (
        {QUERY: dataclasses.replace(eight(), activations=Activations("static", scale=0.1))},
        LLAMA,
        "rounds inputs on a grid of each token",
    ),
    "two schemes": (
        {QUERY: eight(), DOWN: dataclasses.replace(eight(), activations=Activations("dynamic"))},
        LLAMA,
        "one scheme for inputs for all layers",
    ),
    "nothing packed": ({QUERY: rounded("bf16", (64, 128))}, LLAMA, "bitsandbytes is for quantized layers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_written(name: str, tmp_path: Path) -> None:
    tensors, config, message = REFUSED[name]
    with pytest.raises(UsageError, match=message) as caught:
        written("bitsandbytes", model(tensors, config=config), tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_conv1d_is_packed_out_by_in(tmp_path: Path) -> None:
    """As transformers expects it of GPT-2: it turns no packed weight."""
    name = "transformer.h.0.mlp.c_fc.weight"
    assert_round_trip("bitsandbytes", model({name: rounded("nf4:g64", (96, 64))}, config=GPT2), tmp_path)
    state = json.loads(bytes(arrays_of(tmp_path / "first")[f"{name}.quant_state.bitsandbytes__nf4"][1]))
    assert state["shape"] == [96, 64]


@pytest.mark.parametrize("spec", GOLDEN)
def test_golden_bytes(spec: str, tmp_path: Path) -> None:
    """A change here makes another file of the same weight."""
    folder = written("bitsandbytes", model({QUERY: BNB.settle(grid(spec, (64, 128)))}), tmp_path / "out")
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() == GOLDEN[spec]


@pytest.mark.parametrize("name", ["stdlib-gpt2-6m", "stories260k-llama"])
@pytest.mark.parametrize("spec", ["nf4:g64", "nf4:g32,dq"])
def test_real_models(name: str, spec: str, tmp_path: Path) -> None:
    if not (MODELS / name).exists():
        pytest.skip(f"no {name}; it lies in the project's shared data")
    source = open_contents(MODELS / name)
    done = convert(source, tmp_path / "first", "bitsandbytes", spec)
    contents = BNB.read(tmp_path / "first")
    assert len(contents.packed) == (24 if name == "stdlib-gpt2-6m" else 30)  # rows of 172 are no whole blocks
    for step in done.steps:
        if step.name in contents.packed:
            wide = source.float32(step.name)
            codes, params = parse_format(spec).round(np.ascontiguousarray(wide.T if name == "stdlib-gpt2-6m" else wide))
            assert_same(contents.read_packed(step.name), QTensor(parse_format(spec), codes, params))
    written("bitsandbytes", contents, tmp_path / "second")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "second" / file).read_bytes() == (tmp_path / "first" / file).read_bytes()


def test_recognizes(tmp_path: Path) -> None:
    folder = written("bitsandbytes", two_layers("nf4:g64"), tmp_path / "out")
    assert BNB.recognizes(folder)
    assert open_contents(folder).container == "bitsandbytes"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("spec", FOURS)
def test_the_library_decodes_the_same_values(spec: str, tmp_path: Path) -> None:
    functional: Any = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed").functional
    torch: Any = pytest.importorskip("torch")
    tensor = rounded(spec, (64, 256))
    arrays = arrays_of(written("bitsandbytes", model({QUERY: tensor}), tmp_path / "out"))
    parts = {k.removeprefix(f"{QUERY}."): torch.from_numpy(a) for k, (_, a) in arrays.items() if k.startswith(f"{QUERY}.")}
    found = functional.QuantState.from_dict(parts, device="cpu")
    values = functional.dequantize_4bit(torch.from_numpy(arrays[QUERY][1]), found)
    assert np.array_equal(values.numpy(), tensor.decode())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("nested", [False, True])
def test_what_the_library_writes_is_read(nested: bool, tmp_path: Path) -> None:
    """Its own tensors of a weight that is bfloat16, as its users' are, in place of ours; written again they are the same."""
    bitsandbytes: Any = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    torch: Any = pytest.importorskip("torch")
    weight = (torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * 0.05).to(torch.bfloat16)
    layer = bitsandbytes.nn.Linear4bit(256, 64, bias=False, compress_statistics=nested, quant_type="nf4")
    layer.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, compress_statistics=nested, quant_type="nf4")
    saved = {f"{STEM}{name}": value.numpy() for name, value in layer.to("cpu").state_dict().items()}
    spec = "nf4:g64,dq" if nested else "nf4:g64"
    contents = model({QUERY: rounded(spec, (64, 256))}, config={**LLAMA, "dtype": "bfloat16"})
    folder = written("bitsandbytes", contents, tmp_path / "out")
    own = arrays_of(folder)
    assert set(own) - {"model.norm.weight"} == set(saved)
    changed(folder, lambda arrays, _: arrays.update({name: (own[name][0], value) for name, value in saved.items()}))
    found = BNB.read(folder)
    values = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    decoded_there = found.read_packed(QUERY).decode()
    assert np.array_equal(torch.from_numpy(decoded_there).to(torch.bfloat16).float().numpy(), values.float().numpy())
    again = arrays_of(written("bitsandbytes", found, tmp_path / "again"))
    for name, value in saved.items():
        assert np.array_equal(again[name][1], value), name


@pytest.mark.filterwarnings("ignore")
def test_int8_of_the_library(tmp_path: Path) -> None:
    functional: Any = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed").functional
    torch: Any = pytest.importorskip("torch")
    tensor = eight()
    arrays = arrays_of(written("bitsandbytes", model({QUERY: tensor}), tmp_path / "out"))
    codes, largest = (torch.from_numpy(arrays[name][1]) for name in (QUERY, f"{STEM}SCB"))
    values = functional.int8_vectorwise_dequant(codes, largest).numpy()
    np.testing.assert_array_max_ulp(values, tensor.decode(), 3)
