"""`nybble convert` and `quantize --file` as a person runs them."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from nybble import demo
from nybble.containers import open_contents

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def succeed(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def gguf(nybble_command: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "model.gguf"
    words = succeed(nybble_command("convert", demo.model_folder(), path, "--to", "q4_k_m"))
    assert "51 of 76 tensors hold the same values as before; 25 changed" in words
    assert "all were read again and compared" in words
    assert "was  is" in words
    return path


def test_text_from_a_gguf_file(nybble_command: Run, gguf: Path) -> None:
    words = succeed(nybble_command("generate", gguf, "def main(", "--new-tokens", "8"))
    assert words.startswith("def main(")
    assert len(words) > 12


def test_inspect_explains_it(nybble_command: Run, gguf: Path) -> None:
    facts = json.loads(succeed(nybble_command("inspect", gguf, "--json")))
    assert facts["container"] == "gguf"
    assert facts["kind"] == "gpt2 model, gguf"
    formats = {tensor["format"] for tensor in facts["tensors"]}
    assert formats == {"q4_k", "q6_k", "F32"}
    assert facts["file_bytes"] == gguf.stat().st_size
    assert "tokenizer.ggml.model" in succeed(nybble_command("inspect", gguf))


def test_perplexity_of_it(nybble_command: Run, gguf: Path) -> None:
    found = json.loads(succeed(nybble_command("eval", gguf, "--windows", "2", "--activations", "both", "--json")))
    assert 5 < found["perplexity"] < 60
    assert found["engine"]["int8_activations"]["kl"]["mean"] < 0.001
    float_modes = found["engine"]["float"]
    assert float_modes["from_torch"]["mean"] < 1e-6, "the engine and torch compute the same weights"


def test_json_names_every_tensor(nybble_command: Run, gguf: Path, tmp_path: Path) -> None:
    facts = json.loads(succeed(nybble_command("convert", gguf, tmp_path / "folder", "--json")))
    assert facts["container"] == "nybble"
    assert facts["error"] == 0
    assert len(facts["tensors"]) == 76
    assert all(tensor["exact"] for tensor in facts["tensors"])
    assert {spec for spec, _ in open_contents(tmp_path / "folder").packed.values()} == {"q4_k", "q6_k", "fp32"}


def test_quantize_for_another_tool(nybble_command: Run, tmp_path: Path) -> None:
    folder = demo.model_folder()
    words = succeed(nybble_command("quantize", folder, "--to", "int4:g64", "--file", "gptq", "-o", tmp_path / "gptq"))
    assert "gptq" in words
    contents = open_contents(tmp_path / "gptq")
    assert contents.container == "gptq"
    assert {spec for spec, _ in contents.packed.values()} == {"int4:g64"}
    source, table = open_contents(folder), "transformer.wte.weight"
    assert contents.floats[table] == source.floats[table], "tables stay as they were, not rounded and widened again"
    assert (contents.read_float(table) == source.read_float(table)).all()
    assert succeed(nybble_command("quantize", folder, "--to", "q8_0", "-o", tmp_path / "m.gguf"))
    assert open_contents(tmp_path / "m.gguf").container == "gguf"


@pytest.mark.parametrize(
    ("arguments", "code", "parts"),
    [
        (["{model}", "out", "--file", "gptq", "--to", "nf4:g64"], 2, ("gptq cannot hold", "int4")),
        (["{model}", "out", "--file", "ggfu"], 2, ("unknown container", "did you mean gguf")),
        (["{model}", "out", "--to", "q4_k_x"], 2, ("unknown format", "q4_k_m")),
        (["{model}", "out", "--option", "x"], 2, ("NAME=VALUE",)),
        (["{model}", "out", "--method", "gptq", "--to", "int4:g64"], 2, ("reads calibration text",)),
        (["nothing", "out"], 1, ("nothing",)),
        (["{model}", "taken.gguf"], 1, ("taken.gguf exists", "--force")),
    ],
)
def test_wrong_arguments(nybble_command: Run, tmp_path: Path, arguments: list[str], code: int, parts: tuple[str, ...]) -> None:
    (tmp_path / "taken.gguf").write_bytes(b"mine")
    words = [word.format(model=demo.model_folder()) for word in arguments]
    done = nybble_command("convert", *words, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert all(part in last for part in parts), last
    assert [path.name for path in tmp_path.iterdir()] == ["taken.gguf"]
    assert (tmp_path / "taken.gguf").read_bytes() == b"mine"


def test_pickled_weights_only_on_request(nybble_command: Run, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    shutil.copytree(demo.model_folder(), tmp_path / "old")
    torch.save(load_file(tmp_path / "old" / "model.safetensors"), tmp_path / "old" / "pytorch_model.bin")
    (tmp_path / "old" / "model.safetensors").unlink()
    refused = nybble_command("convert", tmp_path / "old", tmp_path / "new", "--file", "float")
    assert refused.returncode == 1
    assert "--allow-pickle" in refused.stderr
    succeed(nybble_command("convert", tmp_path / "old", tmp_path / "new", "--file", "float", "--allow-pickle"))
    before, after = open_contents(demo.model_folder()), open_contents(tmp_path / "new")
    assert before.floats == after.floats
    assert all((before.read_float(name) == after.read_float(name)).all() for name in before.floats)
    assert before.extras == after.extras
