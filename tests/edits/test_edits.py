"""Edits: the float model computes what it did, a toy by hand, and everything that is edited reaches the folder and the engine."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import nybble
from nybble import demo
from nybble.calibrate.workers import Workers
from nybble.edits import Edit, apply_edits, edit_blocks
from nybble.engine import Decoder
from nybble.errors import UsageError
from nybble.files.safetensors import SafetensorsFile
from nybble.formats import parse_format
from nybble.methods import parse_method
from nybble.models.arch import table_for
from nybble.models.describe import describe, sites
from nybble.models.folding import Fold, folds
from nybble.plan import Recipe, make_plan
from nybble.run import quantize_by_plan

WINDOWS = np.random.default_rng(0).integers(3, 97, size=(6, 24))
FAMILIES = (
    "gpt2", "gpt2-untied", "gpt_neo", "llama", "llama-tied", "mistral", "qwen2", "qwen3", "phi", "gemma", "gemma2", "gemma3",
    "opt", "gpt_neox", "bloom", "falcon", "bert",
)  # fmt: skip
WITHOUT_A_TABLE = ("gpt_neo", "gemma3", "gpt_neox", "bloom", "falcon", "bert")


pytestmark = pytest.mark.usefixtures("one_thread")


def edit(model: Any, method: str, spec: str = "int3:g32", keep: tuple[str, ...] = ()) -> list[Edit]:
    formats = {name: parse_format(spec) for name in sites(model) if not any(part in name for part in keep)}
    with Workers(1) as workers:
        return edit_blocks(model, formats, parse_method(method).settings, WINDOWS, workers, lambda *_: None)


def spread_channels(model: Any, seed: int = 0) -> Any:
    """The model with norm gains that differ by decades, so that there is something to even out."""
    generator = torch.Generator().manual_seed(seed)
    for name, module in model.named_modules():
        if "norm" in name or ".ln_" in name:
            for parameter in module.parameters(False):
                parameter.data *= torch.exp(torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("method", ["awq", "smoothquant", "smoothquant:smooth=0.8"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_float_model_computes_the_same(
    name: str, method: str, tiny: Callable[..., Any], ids: Tensor, logits: Callable[[Any, Any], Tensor]
) -> None:
    model = spread_channels(tiny(name))
    twin, expected = copy.deepcopy(model), logits(model, ids)
    edits = edit(model, method)
    torch.testing.assert_close(logits(model, ids), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    if name in WITHOUT_A_TABLE:
        assert [e.scale for e in edits] == [None]
        assert "there is no table that says which norm feeds which matrix" in edits[0].reason
    else:
        done = [e for e in edits if e.scale is not None]
        assert done
        assert all(e.reason for e in edits if e.scale is None)
        assert all(e.after <= e.before for e in done if e.before is not None and e.after is not None)
    before = {key: value.clone() for key, value in twin.state_dict().items()}
    changed = apply_edits(twin, edits)  # an edit is a value: another copy becomes the same, to the bit
    after = model.state_dict()
    assert {key for key, value in before.items() if not torch.equal(value, after[key])} == changed
    for key, value in twin.state_dict().items():
        assert torch.equal(value, after[key]), key


def test_the_places_of_every_table(tiny: Callable[..., Any]) -> None:
    def places(name: str) -> dict[str, tuple[tuple[str, ...], str]]:
        config = tiny(name).config
        return {fold.source: (fold.readers, fold.reason) for fold in folds(table_for(config.model_type), config)[0]}

    assert places("gpt2") == {
        "ln_1": (("attn.c_attn",), ""),
        "attn.c_attn": (("attn.c_proj",), ""),
        "ln_2": (("mlp.c_fc",), ""),
        "mlp.c_fc": (("mlp.c_proj",), "the activation gelu_new does not commute with a scale"),
    }
    llama = places("llama")
    assert llama["input_layernorm"][0] == ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    assert llama["post_attention_layernorm"][0] == ("mlp.gate_proj", "mlp.up_proj")
    assert llama["self_attn.v_proj"] == (("self_attn.o_proj",), "")
    assert llama["mlp.up_proj"] == (("mlp.down_proj",), "")
    assert "pre_feedforward_layernorm" in places("gemma2")
    phi = places("phi")
    assert phi["input_layernorm"][0] == ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1")
    assert phi["self_attn.v_proj"] == (("self_attn.dense",), "")
    assert len(phi) == 3
    assert places("opt")["fc1"] == (("fc2",), "")
    config = copy.deepcopy(tiny("opt").config)
    config.do_layer_norm_before = False  # OPT 350M: its norms come after
    assert folds(table_for("opt"), config) == ([], "with do_layer_norm_before False this model does not run as its table says")


@pytest.mark.parametrize("method", ["awq", "smoothquant"])
def test_query_heads_that_share_a_value_head_share_its_scale(method: str, tiny: Callable[..., Any]) -> None:
    model = tiny("llama")
    config = model.config
    heads, values, generator = config.num_attention_heads, config.num_key_value_heads, torch.Generator().manual_seed(0)
    assert heads > values
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight.mul_(
                torch.exp(torch.randn(layer.self_attn.v_proj.weight.shape[0], generator=generator))[:, None]
            )
    found = [e for e in edit(model, method) if e.source.endswith("v_proj")]
    assert all(not e.reason for e in found if method == "smoothquant")
    scales = [e.scale for e in found if e.scale is not None]
    assert scales
    for scale in scales:
        by_head = scale.reshape(values, heads // values, -1)
        torch.testing.assert_close(by_head, by_head[:, :1].expand_as(by_head), rtol=0, atol=0)
        assert float(scale.max() / scale.min()) > 1.1


class Toy(torch.nn.Module):
    """A norm and two matrices around a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = torch.nn.LayerNorm(2), torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)
        with torch.no_grad():
            self.norm.weight.copy_(torch.tensor([4.0, 1.0]))
            self.norm.bias.copy_(torch.tensor([2.0, -1.0]))
            self.up.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
            self.up.bias.copy_(torch.tensor([1.0, -2.0]))
            self.down.weight.copy_(torch.tensor([[5.0, 6.0]]))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.relu(self.up(self.norm(x))))
        return y


def test_folding_by_hand() -> None:
    toy = Toy()
    x = torch.randn(9, 2, generator=torch.Generator().manual_seed(0))
    expected = toy(x).detach()
    first = Edit("norm", ("up",), Fold("norm", ("up",)), torch.tensor([2.0, 0.5]))
    second = Edit("up", ("down",), Fold("up", ("down",), norm=False), torch.tensor([4.0, 8.0]))
    assert apply_edits(toy, [first, second]) == {"norm.weight", "norm.bias", "up.weight", "up.bias", "down.weight"}
    assert toy.norm.weight.tolist() == [2.0, 2.0]
    assert toy.norm.bias.tolist() == [1.0, -2.0]
    assert toy.up.weight.tolist() == [[2.0 / 4, 1.0 / 4], [6.0 / 8, 2.0 / 8]]
    assert toy.up.bias.tolist() == [1.0 / 4, -2.0 / 8]
    assert toy.down.weight.tolist() == [[20.0, 48.0]]
    torch.testing.assert_close(toy(x), expected)
    offset = Toy()
    apply_edits(offset, [replace(first, fold=Fold("norm", ("up",), gain_offset=1.0))])
    assert offset.norm.weight.tolist() == [5 / 2 - 1, 2 / 0.5 - 1]


@pytest.mark.parametrize("method", ["awq", "smoothquant"])
def test_scales_of_a_model_by_hand(method: str, tiny: Callable[..., Any]) -> None:
    """Two layers of OPT, where every place can be folded: the activations that the test's own hooks catch give the scales."""
    model = spread_channels(tiny("opt"))
    seen: dict[str, list[Tensor]] = {}
    float_model = copy.deepcopy(model)
    for name, module in float_model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda _, args, n=name: seen.setdefault(n, []).append(args[0].reshape(-1, args[0].shape[-1]))
            )
    with torch.no_grad():
        float_model(torch.from_numpy(WINDOWS))
    done = [e for e in edit(model, method) if e.scale is not None]
    assert len(done) >= 4
    for e in done:
        assert e.scale is not None
        x = seen[e.readers[0]][0].abs()
        matrices = torch.cat([float_model.get_submodule(reader).weight.detach() for reader in e.readers])
        if method == "smoothquant":
            expected = torch.sqrt(x.amax(0) / matrices.abs().amax(0))
            live = x.amax(0) > 0
            torch.testing.assert_close(e.scale[live], expected[live], rtol=1e-4, atol=0)
            assert (e.scale[~live] == 1).all()
        else:
            assert e.before is not None
            assert e.after is not None
            assert e.after < e.before
            assert float(e.scale.max() * e.scale.min()) == pytest.approx(1, rel=1e-4)


def test_a_wrong_table_is_found_out(tiny: Callable[..., Any], ids: Tensor, logits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """GELU does not commute: a table that says so has its edit taken back."""
    model = tiny("gpt2")
    expected = logits(model, ids)
    wrong = ([Fold("mlp.c_fc", ("mlp.c_proj",), norm=False), Fold("ln_1", ("attn.c_attn",))], "")
    monkeypatch.setattr("nybble.edits.folds", lambda *_: wrong)
    edits = edit(model, "smoothquant")
    torch.testing.assert_close(logits(model, ids), expected, rtol=0, atol=1e-5)
    assert [e.scale is None for e in edits] == [True, False] * 2
    assert "it moved the block's output by" in edits[0].reason


def test_what_is_left_alone(tiny: Callable[..., Any]) -> None:
    def reasons(spec: str, keep: tuple[str, ...]) -> dict[str, str]:
        return {e.source: e.reason for e in edit(spread_channels(tiny("gpt2")), "smoothquant", spec, keep)}

    kept = reasons("int4:g32", ("c_fc", "attn.c_proj"))
    assert kept["transformer.h.1.ln_2"] == kept["transformer.h.1.attn.c_attn"] == "nothing that reads it is rounded"
    assert kept["transformer.h.1.ln_1"] == ""
    assert (
        reasons("int8:tensor", ())["transformer.h.0.attn.c_attn"] == "its rows share one scale, which would have to span theirs"
    )
    assert edit(tiny("gpt2"), "awq", keep=("weight",)) == [Edit("", reason="no weight is rounded")]


@pytest.mark.parametrize("method", ["awq", "smoothquant", "awq+gptq", "smoothquant+gptaq", "awq:tune=2:batch=2"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_the_folder_and_the_engine_have_the_edits(
    name: str, method: str, tiny: Callable[..., Any], ids: Tensor, logits: Any, tmp_path: Path
) -> None:
    """int8, so that anything left unedited would show: some matrices kept in float, some cast."""
    model = spread_channels(tiny(name))
    expected, state = logits(model, ids), {key: value.clone() for key, value in model.state_dict().items()}
    keep, cast = (
        (["h.0.attn.c_attn"], "h.1.mlp.c_fc") if name == "gpt2" else (["layers.0.self_attn.k_proj"], "layers.1.mlp.up_proj")
    )
    observed: dict[str, float] = {}
    plan = make_plan(describe(model), Recipe("int8:g32", method, tuple(keep), ((cast, "fp16"),)))

    def observe(what: str, weight: Any, tensor: Any) -> None:
        observed[what] = float(np.linalg.norm(tensor.decode() - weight) / np.linalg.norm(weight))

    quantized = quantize_by_plan(model, plan, WINDOWS, observe=observe)
    assert any(e.scale is not None for e in quantized.edits)
    assert max(observed.values()) < 0.05  # the float weight that is shown is the edited one
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    ours = logits(quantized.model(), ids)
    assert float((ours - expected).norm() / expected.norm()) < 0.08
    folder = quantized.save(tmp_path / "m")
    loaded = nybble.load(folder)
    torch.testing.assert_close(logits(loaded.model(), ids), ours, rtol=0, atol=1e-5)
    assert loaded.provenance["edits"]["folded"] == sum(e.scale is not None for e in quantized.edits)
    for key, tensor in quantized.tensors.items():
        np.testing.assert_array_equal(loaded.tensors[key].codes, tensor.codes)
    decoder = Decoder.load(folder, threads=1, exact=True)
    rows = decoder.logits([int(i) for i in ids[0]])
    np.testing.assert_allclose(rows, ours[0].numpy(), rtol=0, atol=1e-4)


def test_edits_of_half_precision_are_saved_whole(tmp_path: Path) -> None:
    """The model that ships is float16; a scale in a norm and its inverse in a matrix must cancel, so those norms are float32."""
    windows = np.random.default_rng(0).integers(1, 4096, size=(2, 64))
    quantized = nybble.quantize(
        demo.model_folder(), "int4:g128", method="smoothquant", calibration=windows, keep=["h.0.attn.c_attn"]
    )
    folder = quantized.save(tmp_path / "m")
    loaded = nybble.load(folder)
    for (name, ours), (_, theirs) in zip(quantized.model().named_parameters(), loaded.model().named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    stored = {name: entry.dtype for name, entry in SafetensorsFile(next(folder.glob("*.safetensors"))).entries.items()}
    assert stored["transformer.h.1.ln_1.weight"] == stored["transformer.h.1.ln_1.bias"] == "F32"
    assert stored["transformer.h.0.attn.c_attn.weight"] == "F32"  # kept; its last rows make what a rounded matrix reads
    assert stored["transformer.h.0.ln_1.weight"] == stored["transformer.ln_f.weight"] == "F16"


def test_refusals(tiny: Callable[..., Any]) -> None:
    for method in ("awq", "smoothquant"):
        with pytest.raises(UsageError, match=f"method {method} reads calibration text"):
            nybble.quantize(tiny("gpt2"), "int4:g32", method=method)


def test_a_model_without_a_table_is_rounded_all_the_same(tiny: Callable[..., Any]) -> None:
    plain = nybble.quantize(tiny("bert"), "int4:g32")
    edited = nybble.quantize(tiny("bert"), "int4:g32", method="smoothquant", calibration=WINDOWS)
    assert "no table" in edited.edits[0].reason
    for name, tensor in plain.tensors.items():
        np.testing.assert_array_equal(edited.tensors[name].codes, tensor.codes)
