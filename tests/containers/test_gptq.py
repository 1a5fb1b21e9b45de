"""GPTQ folders as we write them: values by an independent decoder and by GPTQModel where it is installed, bytes that come out the
same when they are written again, and what is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
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
    gptq_values,
    grid,
    model,
    rounded,
    settings_of,
    two_layers,
    weight,
    written,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.containers import find_container, open_contents
from nybble.containers.words import unpack_words
from nybble.convert import convert
from nybble.errors import NumericError, UsageError
from nybble.formats import QTensor, parse_format
from nybble.formats.activations import Activations

GPTQ = find_container("gptq")
MODELS = Path(__file__).parents[3] / "shared" / "data" / "models"
SPECS = [
    f"int{bits}:{block}{asym}" for bits in (2, 3, 4, 8) for block in ("channel", "g32", "g64", "g128") for asym in ("", ",asym")
]
V2 = {"checkpoint_format": "gptq_v2"}
GOLDEN = (
    "76b425c9a907f0cc95c8c3f95d9e868be81ff26e02146a6fd183b9cf2d9f92b3",
    "d963d0052f8a0f3c8eed184464b9c4808f194987fdfb8ee6315bb1a9247d7bb6",
)
"""SHA-256 of model.safetensors with one weight, v1 and v2."""
STEM = QUERY.removesuffix("weight")


def settled(spec: str, shape: tuple[int, int], seed: int = 0) -> QTensor:
    """A rounded weight as a GPTQ folder keeps it."""
    found: QTensor = GPTQ.settle(rounded(spec, shape, seed))
    return found


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zero_points_of_symmetric_weights(bits: int, tmp_path: Path) -> None:
    contents = model({QUERY: rounded(f"int{bits}:g64", (64, 128))})
    stored = {2: 0x55555555, 4: 0x77777777, 8: 0x7F7F7F7F}
    v1 = arrays_of(written("gptq", contents, tmp_path / "v1"))[f"{STEM}qzeros"][1]
    v2 = arrays_of(written("gptq", contents, tmp_path / "v2", V2))[f"{STEM}qzeros"][1]
    assert v1.shape == v2.shape == (2, 2 * bits)
    if bits in stored:
        assert set(v1.view(np.uint32).ravel().tolist()) == {stored[bits]}
        assert set(v2.view(np.uint32).ravel().tolist()) == {stored[bits] + sum(1 << i for i in range(0, 32, bits))}
    else:
        assert unpack_words(v1, 64, 3).tolist() == [[3] * 64] * 2
        assert unpack_words(v2, 64, 3).tolist() == [[4] * 64] * 2


@pytest.mark.parametrize("spec", ["int2:g32", "int3:channel", "int3:g64,asym", "int4:g64", "int4:g32,asym", "int8:g128,asym"])
@pytest.mark.parametrize("v1", [True, False])
def test_values_by_an_independent_decoder(spec: str, v1: bool, tmp_path: Path) -> None:
    tensor = settled(spec, (32, 128))
    folder = written("gptq", model({QUERY: tensor}), tmp_path / "out", {} if v1 else V2)
    found = gptq_values(arrays_of(folder), STEM[:-1], tensor.format.bits, v1)
    assert found.tobytes() == tensor.decode().tobytes()


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("options", [{}, V2], ids=["v1", "v2"])
def test_write_read_write(spec: str, options: dict[str, str], tmp_path: Path) -> None:
    contents = model({QUERY: settled(spec, (64, 128), 1), DOWN: settled(spec, (96, 256), 2)})
    again = assert_round_trip("gptq", contents, tmp_path, options)
    assert again.details["checkpoint_format"] == options.get("checkpoint_format", "gptq")
    found = settings_of(tmp_path / "first")
    assert found == json.loads((tmp_path / "first" / "quantize_config.json").read_bytes())
    assert (found["bits"], found["sym"]) == (parse_format(spec).bits, not spec.endswith("asym"))
    assert found["group_size"] == (-1 if "channel" in spec else int(spec.partition(":g")[2].removesuffix(",asym")))
    assert "dynamic" not in found
    assert "modules_in_block_to_quantize" not in found


@given(st.sampled_from([2, 3, 4, 8]), st.sampled_from([32, 64, 128]), st.integers(1, 3), st.integers(1, 3), st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_any_codes_and_zero_points(bits: int, group: int, rows: int, groups: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    fmt = parse_format(f"int{bits}:g{group},asym")
    shape = (32 * rows, group * groups)
    scale = rng.standard_normal((shape[0], groups)).astype(np.float16).astype(np.float64)
    zero = rng.integers(0, 2**bits, scale.shape).astype(np.float64)
    zero[0, 0] = 0
    zero[-1, -1] = 1
    tensor = QTensor(fmt, rng.integers(0, 2**bits, shape).astype(np.uint8), fmt.from_grid(scale, zero))
    with tempfile.TemporaryDirectory() as folder:
        assert_round_trip("gptq", model({QUERY: tensor}), Path(folder), V2)


def test_a_zero_point_of_zero_needs_v2(tmp_path: Path) -> None:
    fmt = parse_format("int4:g64,asym")
    positive = np.abs(weight((64, 128))) + np.float32(0.1)
    tensor = QTensor(fmt, *fmt.round(positive))
    with pytest.raises(UsageError, match=r"q_proj.weight has a zero point of 0 \(row 0, group 0\).*leave the option out"):
        written("gptq", model({QUERY: tensor}), tmp_path / "v1", {"checkpoint_format": "gptq"})
    again = assert_round_trip("gptq", model({QUERY: tensor}), tmp_path, {})
    assert again.details["checkpoint_format"] == "gptq_v2"


def test_scales_of_rows_are_settled_or_refused(tmp_path: Path) -> None:
    tensor = rounded("int4:channel", (64, 128))
    with pytest.raises(NumericError, match=r"q_proj.weight: scale .* is no float16, as gptq stores it; use groups"):
        written("gptq", model({QUERY: tensor}), tmp_path / "out")
    settled_tensor = GPTQ.settle(tensor)
    assert np.array_equal(settled_tensor.codes, tensor.codes)
    np.testing.assert_allclose(settled_tensor.params["scale"], tensor.params["scale"], rtol=2**-11)
    assert_same(GPTQ.settle(settled_tensor), settled_tensor)
    assert GPTQ.settle(rounded("fp16", (2, 3))).format.is_cast
    large = QTensor(tensor.format, tensor.codes, {"scale": np.full((64, 1), 1e6, np.float32)})
    with pytest.raises(NumericError, match="scale 1e\\+06 exceeds 65504"):
        GPTQ.settle(large)


def test_what_stays_in_float_is_named(tmp_path: Path) -> None:
    """Layers that 32 does not divide, the head, the token table: as floats, and no loader may take them for packed."""
    odd = "model.layers.0.mlp.up_proj.weight"
    floats: dict[str, Tagged] = {
        odd: ("F16", np.ones((172, 64), np.float16)),
        "lm_head.weight": ("F32", np.ones((97, 64), np.float32)),
        "model.embed_tokens.weight": ("BF16", np.full((97, 64), 0x3F80, np.uint16)),
    }
    assert_round_trip("gptq", model({QUERY: rounded("int4:g64", (64, 128))}, floats), tmp_path)
    found = settings_of(tmp_path / "first")
    assert found["modules_in_block_to_quantize"] == [["self_attn.q_proj"]]
    assert found["dynamic"] == {r"-:model\.layers\.0\.mlp\.up_proj$": {}}


def test_a_layer_that_is_packed_in_one_block_only_is_named_in_full(tmp_path: Path) -> None:
    other = QUERY.replace("layers.0", "layers.1")
    floats: dict[str, Tagged] = {other: ("F32", weight((64, 128)))}
    found = settings_of(written("gptq", model({QUERY: rounded("int4:g64", (64, 128))}, floats), tmp_path / "out"))
    assert found["modules_in_block_to_quantize"] == [["model.layers.0.self_attn.q_proj"]]
    assert list(found["dynamic"]) == [r"-:model\.layers\.1\.self_attn\.q_proj$"]


def test_packed_floats_stand_as_the_architecture_stores_them(tmp_path: Path) -> None:
    """GPT-2's Conv1D is [in, out]; packed layers are [out, in] whatever the architecture."""
    up, down = "transformer.h.0.mlp.c_fc.weight", "transformer.h.0.mlp.c_proj.weight"
    contents = model({up: rounded("fp16", (96, 64)), down: rounded("int8:g32", (64, 96))}, config=GPT2)
    arrays = arrays_of(written("gptq", contents, tmp_path / "out"))
    assert arrays[up][0] == "F16"
    assert np.array_equal(arrays[up][1].T, contents.read_packed(up).codes.view(np.float16))
    assert arrays[down.removesuffix("weight") + "qweight"][1].shape == (24, 64)
    again = GPTQ.read(tmp_path / "out")
    assert again.floats[up] == ("F16", (64, 96))
    assert_same(again.read_packed(down), contents.read_packed(down))


def test_order_of_tensors_keeps_every_type_aligned(tmp_path: Path) -> None:
    sizes = [array.itemsize for _, array in arrays_of(written("gptq", two_layers("int4:g64"), tmp_path / "out")).values()]
    assert sizes == sorted(sizes, reverse=True)


CANDIDATES = {
    ("int4:g64", (64, 128), "linear"): ("int4:g64",),
    ("int3:g64,asym", (64, 128), "linear"): ("int3:g64,asym",),
    ("int5:g64", (64, 128), "linear"): ("int8:g64",),
    ("int8:tensor", (64, 128), "linear"): ("int8:channel",),
    ("int4:g128", (64, 96), "linear"): ("int4:g32",),
    ("int4:g256", (64, 512), "linear"): ("int4:g256",),
    ("nf4:g64,dq", (64, 128), "linear"): ("int4:g64",),
    ("q4_0", (64, 128), "linear"): ("int4:g32",),
    ("q8_0", (64, 128), "linear"): ("int8:g32",),
    ("q4_k", (64, 256), "linear"): ("int4:g32,asym",),
    ("q6_k", (64, 256), "linear"): ("int8:g32",),
    ("int4:g64", (64, 172), "linear"): ("fp32", "fp16", "bf16"),
    ("int4:g64", (172, 64), "linear"): ("fp32", "fp16", "bf16"),
    ("int4:g64", (96, 64), "embedding"): ("fp32", "fp16", "bf16"),
    ("int4:g64", (96, 64), "head"): ("fp32", "fp16", "bf16"),
    ("bf16", (96, 64), "positions"): ("bf16",),
    ("fp16", (96, 64), "linear"): ("fp16",),
}


@pytest.mark.parametrize("case", CANDIDATES, ids=lambda case: f"{case[0]}-{case[1]}-{case[2]}")
def test_candidates(case: tuple[str, tuple[int, int], str]) -> None:
    spec, shape, kind = case
    assert GPTQ.candidates(parse_format(spec), shape, kind) == CANDIDATES[case]


REFUSED = {
    "different bits": (
        {QUERY: ("int4:g64", (64, 128)), DOWN: ("int8:g64", (64, 128))},
        LLAMA,
        "one number of bits for all layers",
    ),
    "different groups": ({QUERY: ("int4:g64", (64, 128)), DOWN: ("int4:g32", (64, 128))}, LLAMA, "one group size for all layers"),
    "another format": ({QUERY: ("nf4:g64", (64, 128))}, LLAMA, "gptq cannot hold model.layers.0.self_attn.q_proj.weight"),
    "rows of 172": ({QUERY: ("int4:g64", (172, 128))}, LLAMA, r"cannot hold .*q_proj.weight \[172, 128\] in int4:g64"),
    "no whole groups": ({QUERY: ("int4:g64", (64, 96))}, LLAMA, r"cannot hold .* \[64, 96\] in int4:g64"),
    "a head": ({"lm_head.weight": ("int4:g64", (64, 128))}, LLAMA, r"lm_head.weight \(head\) has to stay in float"),
    "a table": ({"transformer.wte.weight": ("int4:g64", (64, 128))}, GPT2, "token table. has to stay in float"),
    "outside blocks": ({"model.proj.weight": ("int4:g64", (64, 128))}, LLAMA, "cannot hold model.proj.weight"),
    "nothing packed": ({QUERY: ("fp16", (64, 128))}, LLAMA, "gptq is for quantized layers, and no layer of this model is"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_written(name: str, tmp_path: Path) -> None:
    specs, config, message = REFUSED[name]
    contents = model({key: rounded(spec, shape) for key, (spec, shape) in specs.items()}, config=config)
    with pytest.raises(UsageError, match=message) as caught:
        written("gptq", contents, tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_golden_bytes(tmp_path: Path) -> None:
    """A change here makes other files of the same weights."""
    contents = model({QUERY: grid("int4:g64,asym", (64, 128))})
    for options, wanted in (({}, GOLDEN[0]), (V2, GOLDEN[1])):
        folder = written("gptq", contents, tmp_path / f"v{1 + bool(options)}", options)
        assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() == wanted


@pytest.mark.parametrize("name", ["stdlib-gpt2-6m", "stories260k-llama"])
@pytest.mark.parametrize("spec", ["int4:g64", "int3:g32,asym"])
def test_real_models(name: str, spec: str, tmp_path: Path) -> None:
    if not (MODELS / name).exists():
        pytest.skip(f"no {name}; it lies in the project's shared data")
    source = open_contents(MODELS / name)
    done = convert(source, tmp_path / "first", "gptq", spec)
    contents = GPTQ.read(tmp_path / "first")
    if name == "stories260k-llama":  # 172 is no multiple of 32
        kept = {f"model.layers.{i}.mlp.{part}_proj.weight" for i in range(5) for part in ("gate", "up", "down")}
        assert kept <= set(contents.floats)
        assert len(contents.packed) == 20
    else:
        assert len(contents.packed) == 24
    for step in done.steps:
        if step.name in contents.packed:
            wide = source.float32(step.name)
            codes, _ = parse_format(spec).round(np.ascontiguousarray(wide.T if name == "stdlib-gpt2-6m" else wide))
            assert np.array_equal(contents.read_packed(step.name).codes, codes)
            assert step.after == spec
    written("gptq", contents, tmp_path / "second")
    for file in ("model.safetensors", "config.json", "quantize_config.json"):
        assert (tmp_path / "second" / file).read_bytes() == (tmp_path / "first" / file).read_bytes()
    for key in contents.floats:
        assert np.array_equal(contents.float32(key), source.float32(key))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("spec", ["int2:g32", "int3:g64", "int4:g128", "int4:channel", "int4:g64,asym", "int8:g32,asym"])
@pytest.mark.parametrize("options", [{}, V2], ids=["v1", "v2"])
def test_gptqmodel_decodes_the_same_values(spec: str, options: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("gptqmodel", reason="gptqmodel is not installed")
    torch: Any = pytest.importorskip("torch")
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    tensor = settled(spec, (64, 256))
    folder = written("gptq", model({QUERY: tensor}), tmp_path / "out", options)
    arrays, given = arrays_of(folder), settings_of(folder)
    layer = TorchLinear(
        bits=given["bits"], group_size=given["group_size"], desc_act=False, sym=given["sym"], in_features=256, out_features=64,
        bias=False, pack_dtype=torch.int32, register_buffers=True,
    )  # fmt: skip
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        getattr(layer, part).copy_(torch.from_numpy(arrays[f"{STEM}{part}"][1]))
    if not options:
        convert_gptq_v1_to_v2_format_module(layer, given["bits"], torch.int32)
    found = layer.eval().dequantize_weight().T.float().numpy()
    assert np.array_equal(found, tensor.decode().astype(np.float16).astype(np.float32))


def test_inputs_are_dropped_when_settled() -> None:
    tensor = rounded("int8:channel", (64, 128))
    rounded_inputs = dataclasses.replace(tensor, activations=Activations("dynamic"))
    assert GPTQ.settle(rounded_inputs).activations is None
