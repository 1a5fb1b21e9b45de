"""From one container to another: what is kept, what it costs, and that nothing half-written is left."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nybble import demo
from nybble.containers import find_container, open_contents
from nybble.containers.saving import digest_of
from nybble.convert import Conversion, convert, stay_float
from nybble.converting import describe_contents
from nybble.errors import InputError, OutputError, UsageError
from nybble.formats import parse_format
from nybble.plan import Recipe


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("convert") / "int4"
    convert(demo.model_folder(), path, to="int4:g64")
    return path


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def values(path: Path) -> dict[str, Any]:
    """Every tensor as float32."""
    contents = open_contents(path)
    return {name: contents.read_packed(name).decode() for name in contents.packed} | {
        name: contents.float32(name) for name in contents.floats
    }


def test_a_float_model_is_rounded(int4: Path) -> None:
    contents = open_contents(int4)
    assert contents.container == "nybble"
    assert {spec for spec, _ in contents.packed.values()} == {"int4:g64"}
    source = open_contents(demo.model_folder())
    weight = source.float32("transformer.h.0.attn.c_attn.weight").T
    fmt = parse_format("int4:g64")
    codes, params = fmt.round(np.ascontiguousarray(weight))
    made = contents.read_packed("transformer.h.0.attn.c_attn.weight")
    np.testing.assert_array_equal(made.codes, codes)
    np.testing.assert_array_equal(made.params["scale"], params["scale"])
    assert set(contents.extras) == set(source.extras)
    assert contents.provenance["format"] == "int4:g64"


def test_the_same_as_quantize(int4: Path, tmp_path: Path) -> None:
    import nybble

    nybble.quantize(demo.model_folder(), "int4:g64").save(tmp_path / "q")
    mine, theirs = open_contents(int4), open_contents(tmp_path / "q")
    assert set(mine.packed) == set(theirs.packed)
    for name in mine.packed:
        assert digest_of(mine.read_packed(name)) == digest_of(theirs.read_packed(name))


def test_codes_are_kept_where_values_are(int4: Path, tmp_path: Path) -> None:
    done = convert(int4, tmp_path / "int8", to="int8:g32")
    assert not done.changed
    assert done.error == 0
    before, after = values(int4), values(tmp_path / "int8")
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_loss_is_measured_and_said(int4: Path, tmp_path: Path) -> None:
    done = convert(int4, tmp_path / "nf4", to="nf4:g64")
    before, after = values(int4), values(tmp_path / "nf4")
    packed = open_contents(int4).packed
    assert {step.name for step in done.changed} == set(packed)
    error = sum(float(np.square(after[n] - before[n].astype(np.float64)).sum()) for n in packed)
    energy = sum(float(np.square(before[n].astype(np.float64)).sum()) for n in packed)
    assert done.error == pytest.approx(error / energy, rel=1e-6)
    assert 0.003 < done.error < 0.03


@pytest.mark.parametrize("to", [None, "fp16", "bf16"])
def test_floats_again(int4: Path, tmp_path: Path, to: str | None) -> None:
    done = convert(int4, tmp_path / "f", "float", to)
    contents = open_contents(tmp_path / "f")
    assert contents.container == "float"
    assert not contents.packed
    assert contents.floats["transformer.h.0.attn.c_attn.weight"] == ({None: "F32", "fp16": "F16", "bf16": "BF16"}[to], (256, 768))
    if to is None:
        assert not done.changed
    assert values(tmp_path / "f").keys() == values(int4).keys()


def test_float_to_float_is_the_same_model(tmp_path: Path) -> None:
    done = convert(demo.model_folder(), tmp_path / "f", "float")
    assert not done.changed
    source, made = open_contents(demo.model_folder()), open_contents(tmp_path / "f")
    assert source.floats == made.floats
    assert all(np.array_equal(source.read_float(name), made.read_float(name)) for name in source.floats)


@pytest.mark.parametrize(
    ("name", "to"), [("gptq", "nf4:g64"), ("gptq", "q4_k"), ("bitsandbytes", "int4:g64"), ("gguf", "nf4:g64")]
)
def test_refused_in_one_line_that_lists_what_it_can(name: str, to: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"{name} cannot hold .* in {to.split(':')[0]}.*it holds") as caught:
        convert(demo.model_folder(), tmp_path / "out", name, to)
    assert find_container(name).HOLDS in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot hold"):
        stay_float(demo.model_folder(), "gptq", Recipe("nf4:g64"))
    assert "transformer.wte.weight" in stay_float(demo.model_folder(), "gptq", Recipe("int4:g64"))
    assert stay_float(demo.model_folder(), "nybble", Recipe("int4:g64")) == []


@pytest.mark.parametrize(
    ("container", "family", "recipe", "said"),
    [
        ("awq", "gpt2", Recipe("int4:g32,asym"), "c_attn.weight is a Conv1D"),
        ("compressed-tensors", "gpt2", Recipe("int4:g32"), "c_attn.weight is a Conv1D"),
        ("gptq", "llama", Recipe("int4:g32", rules=(("*.q_proj", "int8:g32"),)), "one number of bits for all layers"),
        ("gptq", "llama", Recipe("fp16"), "for quantized layers, and no layer of this model is"),
        ("bitsandbytes", "llama", Recipe("nf4:g64", rules=(("*.q_proj", "fp4:g64"),)), "one type for all layers"),
        ("bitsandbytes", "llama", Recipe("int8:channel", "static"), r"not on one grid \(static\)"),
        (
            "compressed-tensors",
            "llama",
            Recipe("int8:channel", "llm_int8"),
            "it rounds inputs of int8:channel, dynamic or static",
        ),
    ],
)
def test_what_a_container_refuses_is_known_before_any_work(
    container: str, family: str, recipe: Recipe, said: str, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny(family).save_pretrained(tmp_path / "model")
    with pytest.raises(UsageError, match=said):
        stay_float(tmp_path / "model", container, recipe)
    if recipe.method == "static":  # reads calibration text: only `quantize` has it
        return
    monkeypatch.setattr("nybble.converting.Work._matrix", lambda *_: pytest.fail("work was done"))
    keep = stay_float(tmp_path / "model", "gptq", Recipe("int4:g32"))
    with pytest.raises(UsageError, match=said):
        convert(tmp_path / "model", tmp_path / "out", container, recipe.format, recipe.method, keep=keep, rules=recipe.rules)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_wrong_arguments(int4: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown container"):
        convert(int4, tmp_path / "x", "ggml")
    with pytest.raises(UsageError, match="unknown option"):
        convert(int4, tmp_path / "x", "gptq", options={"bits": "4"})
    with pytest.raises(UsageError, match="checkpoint_format of gptq is 'v9'; it may be auto, gptq, gptq_v2"):
        convert(int4, tmp_path / "x", "gptq", options={"checkpoint_format": "v9"})
    with pytest.raises(UsageError, match="reads calibration text"):
        convert(int4, tmp_path / "x", to="int4:g64", method="gptq")
    with pytest.raises(UsageError, match="give the format of the others with --to"):
        convert(int4, tmp_path / "x", keep=["wte"])
    with pytest.raises(InputError, match="no model"):
        convert(tmp_path / "nothing", tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_replaced_unasked(int4: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    convert(int4, target)
    before = files(target)
    with pytest.raises(OutputError, match="--force"):
        convert(int4, target)
    assert files(target) == before
    convert(int4, target, to="int8:g32", force=True)
    assert files(target) != before
    file = tmp_path / "model.gguf"
    file.write_bytes(b"mine")
    with pytest.raises(OutputError, match="--force"):
        convert(int4, file)
    assert file.read_bytes() == b"mine"


def test_what_does_not_read_back_is_not_kept(int4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite

    def broken(file: int, data: Any, at: int) -> int:
        turned = bytearray(data)
        turned[len(turned) // 2] ^= 0xFF
        return real(file, turned, at)

    monkeypatch.setattr(os, "pwrite", broken)
    with pytest.raises(OutputError, match="does not read back; the disk may be failing"):
        convert(int4, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_another_container_does_not_read_back(int4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = find_container("gptq")
    real = module.write

    def broken(path: Path, contents: Any, options: Any) -> None:
        real(path, contents, options)
        file = path / "model.safetensors"
        data = bytearray(file.read_bytes())
        at = data.index(b"}}") + 40_000  # inside some codes
        data[at] ^= 0xFF
        file.write_bytes(bytes(data))

    with monkeypatch.context() as patch:
        patch.setattr(module, "write", broken)
        with pytest.raises(OutputError, match="does not read back as it was written"):
            convert(demo.model_folder(), tmp_path / "out", "gptq", "int4:g64", keep=["wte", "wpe"])
    assert [path.name for path in tmp_path.iterdir()] == ["out.part"], "the rounded tensors are kept, the output is not"
    convert(demo.model_folder(), tmp_path / "out", "gptq", "int4:g64", keep=["wte", "wpe"])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("container", ["nybble", "gptq"])
def test_a_full_disk_is_found_before_the_work(container: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil
    from types import SimpleNamespace

    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(OutputError, match=r"takes about [\d.]+ MB"):
        convert(demo.model_folder(), tmp_path / "out", container, "int4:g64", keep=["wte", "wpe"])


def test_description_without_torch_is_that_of_the_model() -> None:
    """Names, kinds, shapes and roles as transformers' own modules give them."""
    from nybble.models.describe import describe
    from nybble.models.loading import empty_model

    mine = {info.name: info for info in describe_contents(open_contents(demo.model_folder()))}
    theirs = {info.name: info for info in describe(empty_model(demo.model_folder()), "F32")}
    assert mine.keys() == theirs.keys()
    for name, info in theirs.items():
        assert (mine[name].kind, mine[name].shape, mine[name].role, mine[name].block, mine[name].aliases) == (
            info.kind,
            info.shape,
            info.role,
            info.block,
            info.aliases,
        )


def test_conversion_adds_up() -> None:
    done = Conversion(Path("x"), "gguf", (), 0)
    assert done.error == 0
    assert done.changed == ()


def test_config_stays_whole(int4: Path) -> None:
    source = json.loads((Path(demo.model_folder()) / "config.json").read_text())
    made = json.loads((int4 / "config.json").read_text())
    assert made.pop("quantization_config")["quant_method"] == "nybble"
    assert made == source
