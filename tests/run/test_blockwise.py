"""Calibrated methods on a model that is not held: the same result as on one that is, from any family, to any container."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import nybble
from nybble import walk_forecast
from nybble.blockwise import Calibration, Made, quantize_folder
from nybble.calibrate.importance import input_importance
from nybble.calibrate.states import FileStates
from nybble.containers import open_contents
from nybble.convert import convert
from nybble.errors import BlocksError, NumericError, UsageError
from nybble.finished import FinishedBlocks
from nybble.formats import parse_format
from nybble.methods import parse_method
from nybble.models.loading import load_model
from nybble.models.shelf import FileShelf
from nybble.plan import Recipe
from nybble.quantized import float_weights
from nybble.run import quantize

METHODS = [
    *("gptq:bias", "qronos", "gptq:block_tune=2", "awq+gptq", "smoothquant+gptq+dynamic", "sparsegpt", "best:tune=0"),
    *("static", "smoothquant+gptq+static", "imatrix+static", "gptq+static:bias"),
    *("gptq:inputs=float", "best", "gptq+llm_int8", "imatrix", "imatrix+magnitude", "gptq:tune=2", "guided"),
]


@pytest.fixture
def windows(families: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Three windows of twelve tokens, in place of what a tokenizer would make."""
    drawn = np.random.default_rng(3).integers(3, 97, (3, 12))
    monkeypatch.setattr("nybble.blockwise.draw_windows", lambda *_: drawn)
    monkeypatch.setattr("nybble.run.draw_windows", lambda *_: drawn)
    return drawn


def format_for(method: str) -> str:
    return "int8:channel" if any(scheme in method for scheme in ("dynamic", "int8", "static")) else "int4:g32"


def made(folder: Path, out: Path, method: str, container: str = "nybble", **more: Any) -> Made | None:
    fmt = format_for(method)
    calibration = Calibration("text", 3, 12, True, 0)
    return quantize_folder(folder, out, container, Recipe(fmt, method), calibration, {}, **more)


def saved(model: Any, folder: Path, dtype: Any = torch.float32) -> Path:
    model.to(dtype).save_pretrained(folder)
    return folder


def check_same(out: Path, held: Any) -> None:
    mine, its = nybble.load(out).model().state_dict(), held.model().state_dict()
    assert list(mine) == list(its)
    assert [name for name in its if hasattr(its[name], "numpy") and not torch.equal(mine[name], its[name])] == []


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_what_it_gives_a_held_model(
    method: str, tiny: Callable[..., Any], windows: Any, tmp_path: Path
) -> None:
    folder = saved(tiny("gpt2"), tmp_path / "model")
    done = made(folder, tmp_path / "out", method)
    held = quantize(folder, format_for(method), method, windows)
    check_same(tmp_path / "out", held)
    assert done is not None
    assert done.accounts == held.accounts
    assert nybble.load(tmp_path / "out").provenance == held.provenance
    assert [path.name for path in tmp_path.iterdir() if "part" in path.name] == []


@pytest.mark.parametrize("method", ["awq+gptq:bias", "smoothquant+static", "guided"])
def test_every_family_gives_what_it_gives_held(
    method: str, families: dict[str, Any], tiny: Callable[..., Any], windows: Any, tmp_path: Path
) -> None:
    for family in families:
        folder = saved(tiny(family), tmp_path / family)
        made(folder, tmp_path / f"{family}-out", method)
        check_same(tmp_path / f"{family}-out", quantize(folder, format_for(method), method, windows))


@pytest.mark.parametrize("method", ["static", "gptq+static", "guided"])
def test_what_needs_one_block_at_a_time_is_not_held(
    method: str, tiny: Callable[..., Any], windows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nybble.blockwise._held", lambda *_: pytest.fail("the model was held"))
    made(saved(tiny("llama"), tmp_path / "model"), tmp_path / "out", method)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened_and_what_stays_float_stays_half(
    dtype: Any, tiny: Callable[..., Any], windows: Any, tmp_path: Path
) -> None:
    folder = saved(tiny("llama"), tmp_path / "model", dtype)
    made(folder, tmp_path / "out", "gptq")
    check_same(tmp_path / "out", quantize(folder, "int4:g32", "gptq", windows))
    assert {tag for tag, _ in open_contents(tmp_path / "out").floats.values()} == {"BF16" if dtype == torch.bfloat16 else "F16"}


def test_a_model_that_writes_its_own_text(tiny: Callable[..., Any], tmp_path: Path) -> None:
    folder = saved(tiny("llama"), tmp_path / "model")
    itself = Calibration("self", 2, 12, True, 5)
    with pytest.raises(UsageError, match=r"writes its own calibration text takes .* give a text"):
        quantize_folder(folder, tmp_path / "out", "nybble", Recipe("int4:g32", "gptq"), itself, {}, memory=1_000_000)
    quantize_folder(folder, tmp_path / "out", "nybble", Recipe("int4:g32", "gptq"), itself, {})
    check_same(tmp_path / "out", quantize(folder, "int4:g32", "gptq", "self", windows=2, window=12, seed=5))


@pytest.mark.parametrize("container", ["gguf", "gptq", "compressed-tensors"])
def test_other_containers_get_the_same(container: str, tiny: Callable[..., Any], windows: Any, tmp_path: Path) -> None:
    folder = saved(tiny("llama"), tmp_path / "model")
    name = "out.gguf" if container == "gguf" else "out"
    (tmp_path / "mine").mkdir()
    (tmp_path / "its").mkdir()
    mine, its = tmp_path / "mine" / name, tmp_path / "its" / name
    keep = () if container == "gguf" else ("model.embed_tokens", "lm_head")
    recipe = Recipe("int4:g32", "gptq", keep)
    quantize_folder(folder, mine, container, recipe, Calibration("text", 3, 12, True, 0), {})
    convert(quantize(folder, "int4:g32", "gptq", windows, keep).contents(), its, container)
    first, second = nybble.load(mine).tensors, nybble.load(its).tensors
    assert {n: t.decode().tobytes() for n, t in first.items()} == {n: t.decode().tobytes() for n, t in second.items()}


def test_hidden_states_on_disk_change_nothing(
    tiny: Callable[..., Any], windows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tiny("llama"), tmp_path / "model")
    files: list[str] = []
    real = FileStates.__init__
    monkeypatch.setattr(FileStates, "__init__", lambda self, *rest: (files.append(place), real(self, *rest))[1])
    for place, least in (("memory", 1 << 40), ("disk", 0)):
        monkeypatch.setattr(walk_forecast, "LEAST_ON_DISK", least)
        monkeypatch.setattr(walk_forecast, "SHARE", 0)
        said: list[str] = []
        made(folder, tmp_path / place, "best:tune=0", announce=said.append)
        assert len(said) == 1
    assert files == ["disk", "disk"], "of the model as quantized so far, and of the float model"
    first, second = ((tmp_path / place / "model.safetensors").read_bytes() for place in ("memory", "disk"))
    assert first == second


@pytest.mark.parametrize("method", ["best:tune=0", "guided", "gptq+static"])
def test_no_more_than_a_block_is_out(
    method: str, tiny: Callable[..., Any], windows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tiny("llama"), tmp_path / "model")
    seen: set[frozenset[str]] = set()
    real = FileShelf._values

    def watched(self: FileShelf, key: int) -> Any:
        out = {self._names[other] for other, count in self._out.items() if count} | {self._names[key]}
        seen.add(frozenset(name.split(".")[2] for name in out if ".layers." in name))
        return real(self, key)

    monkeypatch.setattr(FileShelf, "_values", watched)
    made(folder, tmp_path / "out", method)
    assert seen == {frozenset(), frozenset({"0"}), frozenset({"1"})}


def test_a_limit_that_cannot_be_kept_is_refused_with_the_figure(tiny: Callable[..., Any], windows: Any, tmp_path: Path) -> None:
    folder = saved(tiny("llama"), tmp_path / "model")
    for method in ("gptq", "guided"):
        with pytest.raises(UsageError, match=r"this takes .* of memory.*--memory allows 1 MB"):
            made(folder, tmp_path / "out", method, memory=1_000_000)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_was_stopped_goes_on_to_the_same_bytes(
    tiny: Callable[..., Any], windows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tiny("llama"), tmp_path / "model")
    made(folder, tmp_path / "whole", "awq+gptq:bias")
    real = FinishedBlocks.keep

    def stops(self: FinishedBlocks, index: int, block: Any) -> None:
        real(self, index, block)
        raise KeyboardInterrupt

    said: list[str] = []
    stopped = 0
    for _ in range(4):  # two blocks, a table, a head
        with monkeypatch.context() as patch:
            patch.setattr(FinishedBlocks, "keep", stops)
            with pytest.raises(KeyboardInterrupt):
                made(folder, tmp_path / "out", "awq+gptq:bias", announce=said.append)
            stopped += 1
    assert sum("the same command goes on from" in line for line in said) == stopped
    told = [line.partition("out.part: ")[2] for line in said if line.startswith("going on")]
    assert told == [f"2 blocks edited, {count} blocks and other weights decided" for count in (1, 2, 3)]
    with pytest.raises(UsageError, match="format"):
        quantize_folder(
            folder, tmp_path / "out", "nybble", Recipe("int3:g32", "awq+gptq:bias"), Calibration("text", 3, 12, True, 0), {}
        )
    made(folder, tmp_path / "out", "awq+gptq:bias")
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    assert not (tmp_path / "out.part").exists()


def test_a_weight_that_is_not_finite_is_named(tiny: Callable[..., Any], windows: Any, tmp_path: Path) -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    folder = saved(model, tmp_path / "model")
    with pytest.raises(NumericError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: 1 of .* not finite.*\[3, 5\]"):
        made(folder, tmp_path / "out", "gptq")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["gptq", "gptq:block_tune=2", "best:tune=2:tune_bits=4:block_tune=2", "guided", "static"])
def test_a_layer_that_no_window_reaches_is_rounded_all_the_same(method: str, tiny: Callable[..., Any], windows: Any) -> None:
    model = tiny("llama")
    model.model.layers[0].spare = torch.nn.Linear(64, 32)
    assert "model.layers.0.spare.weight" in quantize(model, format_for(method), method, windows).tensors


def test_blocks_that_run_again_are_refused_or_weighed_as_a_whole(windows: Any, tmp_path: Path) -> None:
    shape = transformers.AlbertConfig(
        vocab_size=97, hidden_size=48, embedding_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4
    )
    model = transformers.AlbertForMaskedLM(shape).eval()  # one block, run twice
    folder = saved(model, tmp_path / "model")
    with pytest.raises(BlocksError, match="do not run once each"):
        made(folder, tmp_path / "out", "gptq")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    made(folder, tmp_path / "static", "static")
    check_same(tmp_path / "static", quantize(folder, "int8:channel", "static", windows))
    made(folder, tmp_path / "out", "imatrix")
    check_same(tmp_path / "out", quantize(folder, "int4:g32", "imatrix", windows))
    name = next(name for name in nybble.load(tmp_path / "out").tensors if "ffn.weight" in name)
    importance = input_importance(load_model(folder), windows)[name]
    plain = parse_method("imatrix").quantize(dict(float_weights(load_model(folder)))[name], parse_format("int4:g32"), importance)
    assert np.array_equal(nybble.load(tmp_path / "out").tensors[name].codes, plain.codes)


def test_a_model_in_memory_is_left_as_it_is(tiny: Callable[..., Any], windows: Any) -> None:
    model = tiny("llama")
    block = model.model.layers[1]
    own = block.forward
    block.forward = lambda *args, **kwargs: own(*args, **kwargs)  # as libraries that move models do
    mine = block.__dict__["forward"]
    before = {name: value.clone() for name, value in model.named_parameters()}
    for method in ("imatrix", "gptq"):
        quantize(model, "int4:g32", method, windows)
        assert block.__dict__["forward"] is mine
        assert all(value.requires_grad and torch.equal(value, before[name]) for name, value in model.named_parameters())
