"""Layers whose inputs are rounded: each scheme against plain numpy, batches, folders, transformers, and what is refused."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

import nybble
from nybble.engine import Decoder
from nybble.errors import FileFormatError, InputError, UsageError
from nybble.files import safetensors
from nybble.formats import QTensor, parse_format
from nybble.formats.activations import Activations, parse_entry
from nybble.models.inputs import count_outliers, outlier_note
from nybble.models.packed import PackedWeight, set_activations

SCHEMES = {
    "dynamic": Activations("dynamic"),
    "static": Activations("static", scale=0.05, zero=128),
    "static, lopsided": Activations("static", scale=0.02, zero=9),
    "outliers": Activations("outliers", threshold=2.0),
}
FORMATS = ("int8:channel", "int8:tensor", "int8:channel,asym", "int4:g32")
WINDOWS = np.random.default_rng(0).integers(3, 97, size=(6, 32))
METHODS = ("dynamic", "static", "static:observer=percentile:no-lopsided", "llm_int8:threshold=1.5", "gptq+dynamic")

Floats = NDArray[np.float64]


def packed(scheme: Activations | None, spec: str = "int8:channel", shape: tuple[int, int] = (24, 96)) -> PackedWeight:
    weight = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    fmt = parse_format(spec)
    params = fmt.fit(weight)
    return PackedWeight.from_qtensor(QTensor(fmt, fmt.encode(weight, params), params, scheme))


def inputs(tokens: int = 9, columns: int = 96) -> torch.Tensor:
    """Tokens of very different sizes, one of zeros, one with a huge element."""
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(4)) * torch.logspace(-2, 0.3, tokens)[:, None]
    x[2] = 0
    x[5, 7] = 40.0
    return x


def by_hand(x: NDArray[np.float32], weight: Floats, scheme: Activations) -> Floats:
    """Token by token, as the papers write it."""
    rows = []
    for token in x:
        if scheme.scheme == "static":
            codes = np.clip(np.rint(token / np.float32(scheme.scale)) + scheme.zero, 0, 255).astype(np.int64)
            rows.append((codes - scheme.zero) @ weight.T * scheme.scale)
            continue
        large = np.abs(token) >= (scheme.threshold if scheme.scheme == "outliers" else np.inf)
        rest = np.where(large, np.float32(0), token)
        scale = np.abs(rest).max() / np.float32(127) or np.float32(1)
        codes = np.rint(rest / scale).astype(np.int8)
        rows.append(codes.astype(np.int64) @ weight.T * scale + token[large].astype(np.float64) @ weight[:, large].T)
    return np.stack(rows)


@pytest.mark.parametrize("spec", FORMATS)
@pytest.mark.parametrize("name", SCHEMES)
def test_against_numpy(name: str, spec: str) -> None:
    weight, x = packed(SCHEMES[name], spec), inputs()
    decoded = weight.decode().double().numpy()
    expected = by_hand(x.numpy(), decoded, SCHEMES[name])
    got = weight.linear(x, None).double().numpy()
    size = np.abs(x.double().numpy()) @ np.abs(decoded).T
    assert (np.abs(got - expected) <= 1e-6 * size + 1e-5).all()
    assert np.abs(got - x.double().numpy() @ decoded.T).max() > 1e-3  # something was rounded
    bias = torch.arange(24.0)
    torch.testing.assert_close(weight.linear(x, bias), weight.linear(x, None) + bias, rtol=0, atol=0)


def test_a_case_to_follow_with_a_pencil() -> None:
    """Weight [[1, 2, -4]] as codes [32, 64, -127] or so; here an exact one: scale 1, codes themselves."""
    fmt = parse_format("int8:channel")
    weight = np.array([[1.0, 2.0, 127.0]], dtype=np.float32)
    params = fmt.fit(weight)
    assert params["scale"] == [[1.0]]
    tensor = QTensor(fmt, fmt.encode(weight, params), params)
    x = torch.tensor([[127.0, 0.5, 1.5], [0.0, 0.0, 0.0], [8.0, 2.54, 1.27]])

    def outputs(scheme: Activations) -> list[float]:
        layer = PackedWeight.from_qtensor(tensor)
        layer.round_inputs(scheme)
        return layer.linear(x, None).flatten().tolist()

    # token 0: scale 1, codes 127, 0 (half to even), 2 (half to even); token 2: scale 8 / 127, codes 127, 40, 20
    assert outputs(Activations("dynamic")) == pytest.approx([127 + 0 + 254, 0, (127 + 80 + 20 * 127) * 8 / 127])
    # token 2: 8 goes through as it is, the rest has scale 2.54 / 127 = 0.02, codes 127 and 63 or 64
    found = outputs(Activations("outliers", threshold=6))
    assert found[0] == pytest.approx(127 + (42 * 2 + 127 * 127) * 1.5 / 127)
    assert found[2] == pytest.approx(8 + 2 * 2.54 + 127 * 1.27, abs=127 * 0.011)
    # scale 1, zero point 2: codes from -2 to 253
    assert outputs(Activations("static", scale=1, zero=2)) == [127 + 0 + 254, 0, 8 + 2 * 3 + 127]


@pytest.mark.parametrize("name", SCHEMES)
def test_a_token_does_not_depend_on_its_neighbours(name: str) -> None:
    weight, x = packed(SCHEMES[name]), inputs(40)
    whole = weight.linear(x, None)
    for at in (0, 2, 5, 39):
        assert torch.equal(weight.linear(x[at : at + 1], None)[0], whole[at])
    turned = torch.arange(39, -1, -1)
    assert torch.equal(weight.linear(x[turned].reshape(4, 10, 96), None).reshape(40, -1), whole[turned])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(weight.linear(x, None), whole)
    finally:
        torch.set_num_threads(threads)


def test_limits_of_thresholds() -> None:
    x = inputs()
    everything = packed(Activations("outliers", threshold=0.0)).linear(x, None)
    torch.testing.assert_close(everything, packed(None).linear(x, None), rtol=0, atol=0)
    nothing = packed(Activations("outliers", threshold=1e9)).linear(x, None)
    assert torch.equal(nothing, packed(Activations("dynamic")).linear(x, None))


@pytest.mark.parametrize("name", SCHEMES)
def test_what_tensors_may_hold(name: str) -> None:
    weight = packed(SCHEMES[name])
    assert weight.linear(torch.zeros(3, 0, 96), None).shape == (3, 0, 24)
    tiny = torch.full((1, 96), 1e-44)
    assert torch.isfinite(weight.linear(tiny, None)).all()
    broken = inputs()
    broken[3, 1] = float("nan")
    result = weight.linear(broken, None)
    assert torch.isnan(result[3]).all()
    assert torch.isfinite(result[[0, 1, 2, 4, 5]]).all()
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        got = weight.linear(inputs().to(dtype), None)
        assert got.dtype == dtype
        wide = weight.linear(inputs().to(dtype).float(), None)
        torch.testing.assert_close(got.float(), wide, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", SCHEMES)
def test_gradients_pass_through_the_rounding(name: str) -> None:
    weight, x = packed(SCHEMES[name]), inputs().requires_grad_()
    weight.linear(x, None).sum().backward()  # type: ignore[no-untyped-call]  # torch's
    torch.testing.assert_close(x.grad, weight.decode().sum(0).expand(9, 96))


@pytest.mark.parametrize("name", SCHEMES)
def test_copies_pickles_and_moves_keep_the_scheme(name: str) -> None:
    weight, x = packed(SCHEMES[name]), inputs()
    expected = weight.linear(x, None)
    for other in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight)), copy.deepcopy(weight).half().to("cpu")):
        assert other.to_qtensor().activations == SCHEMES[name]
        assert torch.equal(other.linear(x, None), expected)
    state = weight.state_dict()
    again = packed(SCHEMES[name].with_stored(SCHEMES[name].stored()))
    again.load_state_dict(state)
    assert torch.equal(again.linear(x, None), expected)
    weight.round_inputs(None)
    assert torch.equal(weight.linear(x, None), packed(None).linear(x, None))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("method", METHODS)
def test_folders_give_the_same_bits(
    family: str, method: str, tiny: Callable[..., Any], ids: torch.Tensor, logits: Any, tmp_path: Path
) -> None:
    model = tiny(family)
    quantized = nybble.quantize(model, "int8:channel", method, WINDOWS)
    expected = logits(quantized.model(), ids)
    folder = quantized.save(tmp_path / "m")
    loaded = nybble.load(folder)
    assert torch.equal(logits(loaded.model(), ids), expected)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder).eval(), ids), expected)
    for name, tensor in quantized.tensors.items():
        assert loaded.tensors[name].activations == tensor.activations
        assert (tensor.activations is not None) == (".h." in name or ".layers." in name)
    again = loaded.save(tmp_path / "again")
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert not torch.equal(expected, logits(nybble.quantize(model, "int8:channel").model(), ids))
    torch.testing.assert_close(expected, logits(model, ids), rtol=0.2, atol=0.2)
    assert loaded.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False).shape == (1, ids.shape[1] + 3)
    half = nybble.load(folder, "bf16").model()
    torch.testing.assert_close(logits(half, ids).float(), expected, rtol=0.3, atol=0.3)


def test_the_scheme_goes_before_the_mode_of_the_kernels(tiny: Callable[..., Any], ids: torch.Tensor, logits: Any) -> None:
    model = nybble.quantize(tiny("gpt2"), "int8:channel", "dynamic", keep=["wte", "wpe"]).model()
    expected = logits(model, ids)
    set_activations(model, "int8")
    assert torch.equal(logits(model, ids), expected)


def test_torch_compile_sees_one_node(ids: torch.Tensor) -> None:
    weight = packed(SCHEMES["outliers"])
    compiled = torch.compile(lambda x: weight.linear(x, None) * 2, backend="eager", fullgraph=True)
    assert torch.equal(compiled(inputs()), weight.linear(inputs(), None) * 2)


def test_the_engine_takes_dynamic_and_refuses_the_others(tiny: Callable[..., Any], ids: torch.Tensor, tmp_path: Path) -> None:
    for method in ("dynamic", "static", "llm_int8"):
        folder = nybble.quantize(tiny("llama"), "int8:channel", method, WINDOWS).save(tmp_path / method)
        if method == "dynamic":
            plain = nybble.quantize(tiny("llama"), "int8:channel").save(tmp_path / "plain")
            found = Decoder.load(folder, threads=1).logits(ids[0].tolist())
            np.testing.assert_array_equal(found, Decoder.load(plain, threads=1).logits(ids[0].tolist()))
            continue
        with pytest.raises(
            InputError,
            match=r"is made for activations of scheme \w+, which the engine does not compute; torch does \(nybble eval",
        ):
            Decoder.load(folder, threads=1)


def test_outliers_are_counted(tiny: Callable[..., Any], ids: torch.Tensor, logits: Any) -> None:
    weight, x = packed(Activations("outliers", threshold=2.0)), inputs()
    counts = count_outliers(weight)
    assert counts() is None
    assert outlier_note(counts()) is None
    weight.linear(x, None)
    weight.linear(x[None], None)
    large = x.abs() >= 2
    assert counts() == {
        "share": pytest.approx(float(large.float().mean())),
        "columns": int(large.any(0).sum()),
        "columns_in_all": 96,
    }
    assert outlier_note(counts()) is not None
    model = nybble.quantize(tiny("gpt2"), "int8:channel", "dynamic").model()
    counts = count_outliers(model)
    logits(model, ids)
    assert counts() is None


@pytest.mark.parametrize(
    ("spec", "method", "message"),
    [
        ("nf4:g64", "dynamic", "method dynamic multiplies integers: nf4:g64 has none; use int8:channel"),
        ("fp4:g64,dq", "static", "method static multiplies integers: fp4:g64,dq has none; use int8:channel"),
        ("fp16", "llm_int8", "method llm_int8 multiplies integers: fp16 has none; use int8:channel"),
        ("int8", "dynamic+static", "method 'dynamic+static': dynamic and static activations exclude each other"),
        ("int8", "static:observer=max", "method static: option 'observer=max' must be one of minmax, percentile, mse, entropy"),
        ("int8", "llm_int8:threshold=-1", "method llm_int8: option 'threshold=-1' must lie between 0 and 1000000"),
        (
            "int8",
            "static",
            "method static reads calibration text; give some, other than the text that scores (--calibrate FILE), "
            "let the model write it (--calibrate self), or use dynamic, which needs none",
        ),
    ],
)
def test_refusals(spec: str, method: str, message: str, tiny: Callable[..., Any]) -> None:
    with pytest.raises(UsageError) as caught:
        nybble.quantize(tiny("gpt2"), spec, method)
    assert str(caught.value) == message


def test_rules_that_cast_keep_their_inputs(tiny: Callable[..., Any], ids: torch.Tensor, logits: Any) -> None:
    quantized = nybble.quantize(tiny("gpt2"), "int8", "dynamic", rules=[("mlp.c_proj", "fp16"), ("wte", "nf4:g64")])
    schemes = {name: tensor.activations for name, tensor in quantized.tensors.items()}
    assert schemes["transformer.h.0.mlp.c_proj.weight"] is None
    assert schemes["transformer.wte.weight"] is None
    assert schemes["transformer.h.0.mlp.c_fc.weight"] == Activations("dynamic")
    logits(quantized.model(), ids)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"scheme": "fp8"}, "unknown activations 'fp8'; this nybble computes dynamic, static, outliers"),
        ("dynamic", "activations 'dynamic' name no scheme"),
        ({"scheme": 3}, "name no scheme"),
        ({"scheme": "dynamic", "bits": 4}, "are not those of scheme dynamic"),
        ({"scheme": "outliers"}, "are not those of scheme outliers"),
        ({"scheme": "outliers", "threshold": "6"}, "are not those of scheme outliers"),
        ({"scheme": "outliers", "threshold": -1}, "threshold -1.0 of activations is not a number of 0 or more"),
    ],
)
def test_folders_with_a_scheme_that_is_not_known(entry: Any, message: str, tiny: Callable[..., Any], tmp_path: Path) -> None:
    folder = nybble.quantize(tiny("gpt2"), "int8", "dynamic").save(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    name = "transformer.h.0.attn.c_attn.weight"
    assert config["quantization_config"]["tensors"][name]["activations"] == {"scheme": "dynamic"}
    config["quantization_config"]["tensors"][name]["activations"] = entry
    (folder / "config.json").write_text(json.dumps(config))
    for load in (nybble.load, Decoder.load):
        with pytest.raises(FileFormatError) as caught:
            load(folder)
        assert message in str(caught.value)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_folders_with_a_broken_scale(value: float, tiny: Callable[..., Any], tmp_path: Path) -> None:
    folder = nybble.quantize(tiny("gpt2"), "int8", "static", WINDOWS).save(tmp_path / "m")
    file = safetensors.SafetensorsFile(folder / "model.safetensors")
    arrays = {name: file.read(name).copy() for name in file.entries}
    arrays["transformer.h.1.mlp.c_fc.weight.inputs.scale"][0] = value
    safetensors.write(folder / "model.safetensors", arrays, file.metadata, {n: e.dtype for n, e in file.entries.items()})
    with pytest.raises(FileFormatError, match=r"'transformer.h.1.mlp.c_fc.weight': scale .* is not a number above 0"):
        nybble.load(folder)


def test_a_folder_without_its_grid_is_refused(tiny: Callable[..., Any], tmp_path: Path) -> None:
    folder = nybble.quantize(tiny("gpt2"), "int8", "dynamic").save(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["tensors"]["transformer.h.0.attn.c_attn.weight"]["activations"] = {"scheme": "static"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(FileFormatError, match=r"lacks tensor 'transformer\.h\.0\.attn\.c_attn\.weight\.inputs\.scale'"):
        nybble.load(folder)


@pytest.mark.parametrize("name", SCHEMES)
def test_entries_and_values(name: str) -> None:
    scheme = SCHEMES[name]
    assert parse_entry(json.loads(json.dumps(scheme.entry()))).with_stored(scheme.stored()) == scheme
    with pytest.raises(ValueError, match="zero point 256"):
        Activations("static", zero=256)
