"""`nybble.quantize`, `save` and `load`: what goes in unharmed, what comes out, and which inputs are refused."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import nybble
from nybble import demo
from nybble.calibrate.importance import input_importance
from nybble.errors import FileFormatError, InputError, NumericError, OutputError, UsageError
from nybble.models.packed import PackedWeight
from nybble.quantized import float_weights

WINDOWS = np.random.default_rng(0).integers(3, 97, size=(6, 32))


@pytest.mark.parametrize("spec", ["int4:g32", "fp16", "bf16"])
def test_a_model_in_memory_is_left_as_it_is(spec: str, tiny: Callable[..., Any], ids: torch.Tensor, logits: Any) -> None:
    model = tiny("gpt2")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected, config = logits(model, ids), model.config.to_dict()
    quantized = nybble.quantize(model, spec)
    for parameter in quantized.model().parameters():
        parameter.data.zero_()
    assert model.state_dict().keys() == before.keys()
    for name, value in model.state_dict().items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    torch.testing.assert_close(logits(model, ids), expected, rtol=0, atol=0)
    assert model.config.to_dict() == config
    assert model.lm_head.weight is model.transformer.wte.weight


def test_from_a_folder_and_from_memory_are_the_same(tiny_folder: Path, tiny: Callable[..., Any]) -> None:
    ours, theirs = nybble.quantize(tiny_folder, "int4:g32").tensors, nybble.quantize(tiny("gpt2"), "int4:g32").tensors
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        np.testing.assert_array_equal(tensor.codes, theirs[name].codes)


def test_the_tensors_are_those_of_the_issue(tiny: Callable[..., Any]) -> None:
    model = tiny("gpt2")
    quantized = nybble.quantize(model, "int8:channel")
    weight = dict(float_weights(model))
    assert quantized.tensors.keys() == weight.keys()
    for name, tensor in quantized.tensors.items():
        assert isinstance(tensor, nybble.QTensor)
        bound = np.abs(weight[name]).max(1, keepdims=True) / 127 / 2 * 1.001
        error = np.abs(tensor.decode() - weight[name])
        assert (error <= bound).all()
        assert error.max() > bound.max() / 4  # something was rounded
    # a square Conv1D, stored [in, out] by the model, is [out, in] here
    expected = model.transformer.h[0].attn.c_proj.weight.detach().T.numpy()
    np.testing.assert_allclose(quantized.tensors["transformer.h.0.attn.c_proj.weight"].decode(), expected, atol=0.01)


@pytest.mark.parametrize("spec", ["fp32", "fp16", "bf16"])
def test_casts_stay_plain_checkpoints(
    spec: str, tiny: Callable[..., Any], ids: torch.Tensor, logits: Any, tmp_path: Path
) -> None:
    quantized = nybble.quantize(tiny("llama"), spec)
    folder = quantized.save(tmp_path / "m")
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    loaded = nybble.load(folder)
    torch.testing.assert_close(logits(loaded.model(), ids), logits(quantized.model(), ids), rtol=0, atol=0)
    assert (
        loaded.weight_bytes
        == quantized.weight_bytes
        == nybble.quantize(tiny("llama"), "fp32").weight_bytes * (1 if spec == "fp32" else 0.5)
    )
    assert loaded.plan_hash == quantized.plan_hash
    for name, tensor in loaded.tensors.items():
        np.testing.assert_array_equal(tensor.codes, quantized.tensors[name].codes)


def test_saving_keeps_codes_and_provenance(tiny_folder: Path, tmp_path: Path) -> None:
    quantized = nybble.quantize(tiny_folder, "nf4:g64,dq", keep=["wpe"], rules=[("wte", "int8")])
    loaded = nybble.load(quantized.save(tmp_path / "m"))
    for name, tensor in quantized.tensors.items():
        again = loaded.tensors[name]
        np.testing.assert_array_equal(again.codes, tensor.codes)
        for key, value in tensor.params.items():
            np.testing.assert_array_equal(again.params[key], value)
    facts = loaded.provenance
    assert facts["format"] == "nf4:g64,dq"
    assert facts["keep"] == ["wpe"]
    assert facts["rules"] == [["wte", "int8:channel"]]
    assert facts["nybble"] == nybble.__version__
    assert len(facts["source_blake3"]) == 64
    assert facts["source"] == "gpt2"


def test_calibration_is_ignored_by_a_method_that_uses_none(tiny: Callable[..., Any]) -> None:
    with_data = nybble.quantize(tiny("gpt2"), "int4:g32", method="rtn", calibration=WINDOWS)
    without = nybble.quantize(tiny("gpt2"), "int4:g32")
    assert with_data.plan_hash == without.plan_hash
    for name, tensor in without.tensors.items():
        np.testing.assert_array_equal(with_data.tensors[name].codes, tensor.codes)


def test_calibration_lowers_the_error_at_the_outputs_of_layers() -> None:
    """On the model that ships, whose activations are those of real text: weighted squared error, summed over layers."""
    from nybble.demo.text import calibration_text
    from nybble.models.loading import load_model, load_tokenizer

    folder = demo.model_folder()
    tokens = np.array(load_tokenizer(folder)(calibration_text()[:20_000], verbose=False)["input_ids"])
    windows = tokens[: len(tokens) // 256 * 256].reshape(-1, 256)[:8]
    model = load_model(folder)
    weights, importance = dict(float_weights(model)), input_importance(model, windows)
    keep = ["wte", "wpe"]

    def output_error(quantized: nybble.Quantized) -> float:
        return sum(
            float((importance[name] * (tensor.decode() - weights[name]) ** 2).sum()) for name, tensor in quantized.tensors.items()
        )

    plain = output_error(nybble.quantize(model, "int4:g64", keep=keep))
    searched = output_error(nybble.quantize(model, "int4:g64", "rtn:mse", keep=keep))
    weighted = output_error(nybble.quantize(model, "int4:g64", "rtn:mse", windows, keep=keep))
    assert weighted < 0.99 * searched < 0.95 * plain


def test_calibration_by_text_needs_a_tokenizer_and_uses_it() -> None:
    text = "def add(a, b):\n    return a + b\n\n" * 400
    by_text = nybble.quantize(demo.model_folder(), "int2:g64", "rtn:mse", text, keep=["wte", "wpe"])
    plain = nybble.quantize(demo.model_folder(), "int2:g64", "rtn:mse", keep=["wte", "wpe"])
    name = "transformer.h.0.mlp.c_fc.weight"
    assert (by_text.tensors[name].codes != plain.tensors[name].codes).any()


def test_the_seed_reaches_what_a_method_draws(tiny: Callable[..., Any]) -> None:
    def made(method: str, seed: int) -> nybble.Quantized:
        return nybble.quantize(tiny("gpt2"), "int3:g32", method, WINDOWS, seed=seed)

    name = "transformer.h.1.mlp.c_fc.weight"
    one, two, again = made("guided", 1), made("guided", 2), made("guided:seed=1", 0)
    assert (one.tensors[name].codes != two.tensors[name].codes).any()
    np.testing.assert_array_equal(one.tensors[name].codes, again.tensors[name].codes)
    assert one.plan_hash == again.plan_hash != two.plan_hash
    assert made("gptq", 1).plan_hash == made("gptq", 2).plan_hash
    assert one.provenance["calibration"]["windows"] == len(WINDOWS)
    assert len(one.provenance["calibration"]["sha256"]) == 64


@pytest.mark.parametrize("calibration", ["self", "windows"])
def test_a_model_in_training_is_calibrated_without_dropout(calibration: str, tiny: Callable[..., Any]) -> None:
    def made(model: Any) -> nybble.Quantized:
        given = WINDOWS if calibration == "windows" else calibration
        return nybble.quantize(model, "int3:g32", "gptq", given, windows=4, window=8)

    model = tiny("gpt2").train()
    model.transformer.h[1].eval()
    assert model.transformer.drop.p > 0
    trained, still = made(model), made(tiny("gpt2"))
    assert trained.provenance["calibration"] == still.provenance["calibration"]
    for name, tensor in still.tensors.items():
        np.testing.assert_array_equal(trained.tensors[name].codes, tensor.codes)
    assert model.training
    assert not model.transformer.h[1].training
    assert not trained.model().training


def test_calibration_text_for_a_model_in_memory_is_refused(tiny: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match="give token windows"):
        nybble.quantize(tiny("gpt2"), "int4:g32", "rtn:mse", "some text")


@pytest.mark.parametrize(
    ("windows", "match"),
    [
        (np.ones((2, 8), np.float64) * 0.5, "must be integers"),
        (np.ones(8, np.int64), "must be integers"),
        (np.full((1, 8), 97), "the model has 97 tokens"),
        (np.full((1, 8), -1), "the model has 97 tokens"),
        (np.ones((0, 8), np.int64), "must be integers"),
    ],
)
def test_calibration_that_the_model_cannot_take_is_refused(windows: Any, match: str, tiny: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match=match):
        nybble.quantize(tiny("gpt2"), "int4:g32", "rtn:mse", windows)


def test_keep_leaves_embeddings_and_head_in_float(
    tiny: Callable[..., Any], ids: torch.Tensor, logits: Any, tmp_path: Path
) -> None:
    quantized = nybble.quantize(tiny("gpt2"), "int4:g32", keep=["*wte*", "*wpe*", "lm_head"])
    model = quantized.model()
    assert not any("wte" in name or "wpe" in name for name in quantized.tensors)
    assert len(quantized.tensors) == 8
    assert model.lm_head.weight is model.transformer.wte.weight
    assert isinstance(model.lm_head.weight, torch.nn.Parameter)
    assert isinstance(model.transformer.h[0].mlp.c_fc.weight, PackedWeight)
    loaded = nybble.load(quantized.save(tmp_path / "m"))
    assert loaded.model().lm_head.weight is loaded.model().transformer.wte.weight
    torch.testing.assert_close(logits(loaded.model(), ids), logits(model, ids), rtol=0, atol=0)


def test_weights_that_are_not_finite_are_named(tiny: Callable[..., Any]) -> None:
    model = tiny("gpt2")
    model.transformer.h[1].mlp.c_fc.weight.data[3, 5] = float("nan")
    with pytest.raises(NumericError, match=r"^transformer.h.1.mlp.c_fc.weight: 1 of \d+ weights .*row 5, column 3"):
        nybble.quantize(model, "int4:g32")


@pytest.mark.parametrize("spec", ["fp16", "int8:channel", "int4:g64"])
def test_what_overflows_its_storage_is_named(spec: str, tiny: Callable[..., Any]) -> None:
    model = tiny("gpt2")
    model.transformer.h[0].mlp.c_fc.weight.data[0, 0] = 1e6
    if spec == "int8:channel":  # float32 scales hold it
        assert nybble.quantize(model, spec).tensors["transformer.h.0.mlp.c_fc.weight"].decode().max() > 9e5
        return
    with pytest.raises(NumericError, match=r"transformer.h.0.mlp.c_fc.weight: .*(65504|overflow fp16)"):
        nybble.quantize(model, spec)


def test_a_quantized_folder_is_not_quantized_again(tiny: Callable[..., Any], tmp_path: Path) -> None:
    folder = nybble.quantize(tiny("gpt2"), "int8").save(tmp_path / "m")
    with pytest.raises(InputError, match="is quantized already"):
        nybble.quantize(folder, "int4:g64")
    with pytest.raises(InputError, match="quantized already"):
        nybble.quantize(nybble.load(folder).model(), "int4:g64")


def test_save_replaces_only_what_it_may(tiny: Callable[..., Any], tmp_path: Path) -> None:
    quantized = nybble.quantize(tiny("gpt2"), "int8")
    folder = quantized.save(tmp_path / "m")
    with pytest.raises(OutputError, match="--force"):
        quantized.save(folder)
    quantized.save(folder, force=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("words")
    with pytest.raises(OutputError, match="will not replace it"):
        quantized.save(tmp_path / "mine", force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "mine"]


def test_the_file_of_the_shipped_model_has_the_bits_that_are_stated(tmp_path: Path) -> None:
    quantized = nybble.quantize(demo.model_folder(), "int4:g64")
    folder = quantized.save(tmp_path / "m")
    content = (folder / "model.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
    packed = sum(
        entry["data_offsets"][1] - entry["data_offsets"][0]
        for name, entry in header.items()
        if name.endswith((".codes", ".scale"))
    )
    weights = sum(tensor.codes.size for tensor in quantized.tensors.values())
    assert packed * 8 == 4.25 * weights  # 4 bits and a float16 scale for 64
    assert quantized.provenance["bits_per_weight"] == 4.25
    assert (folder / "tokenizer.json").is_file()


def test_unknown_names_are_usage_errors(tiny: Callable[..., Any], tiny_folder: Path) -> None:
    with pytest.raises(UsageError, match="did you mean int4"):
        nybble.quantize(tiny_folder, "intt4")
    with pytest.raises(UsageError, match="unknown method 'gptqq'"):
        nybble.quantize(tiny("gpt2"), "int4", method="gptqq")
    with pytest.raises(UsageError, match="unknown option of method rtn 'msee'"):
        nybble.quantize(tiny("gpt2"), "int4", method="rtn:msee")
    with pytest.raises(UsageError, match="dtype 'int8'"):
        nybble.load(tiny_folder, dtype="int8")


def test_a_folder_that_does_not_fill_its_model_is_refused(tiny: Callable[..., Any], tmp_path: Path) -> None:
    tiny("gpt2").save_pretrained(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    for change, match in (({"n_layer": 3}, "12 tensors missing"), ({"n_positions": 32}, "1 of another shape")):
        (tmp_path / "m" / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(FileFormatError, match=match):
            nybble.load(tmp_path / "m")


@pytest.mark.parametrize("key", ["auto_map", "trust_remote_code"])
def test_a_folder_that_wants_to_run_its_own_code_is_refused(key: str, tiny_folder: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, key: {"AutoModel": "evil.Model"}}))
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    (tmp_path / "model.safetensors").write_bytes((tiny_folder / "model.safetensors").read_bytes())
    with pytest.raises(InputError, match="nybble never does"):
        nybble.load(tmp_path)
