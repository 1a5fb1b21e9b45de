"""`nybble prune`: a smaller folder that everything of ours opens, and one line for what cannot be."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import nybble  # noqa: F401  # teaches transformers our folders
from nybble.demo import model_folder
from nybble.errors import UsageError

Run = Callable[..., "subprocess.CompletedProcess[str]"]
MODEL = model_folder()


@pytest.mark.parametrize(
    ("options", "bits", "zeros"),
    [
        (("--sparsity", "2:4"), 9.0, 0.5),
        (("--sparsity", "75%"), 5.0, 0.75),
        (("--to", "int4:g64", "--sparsity", "0.5"), 3.25, 0.5),
    ],
)
def test_a_smaller_folder(options: tuple[str, ...], bits: float, zeros: float, tmp_path: Path, nybble_command: Run) -> None:
    out = tmp_path / "out"
    done = nybble_command("prune", MODEL, "--method", "magnitude", *options, "-o", out)
    assert done.returncode == 0, done.stderr
    assert "nybble-sparse" in done.stdout
    facts = json.loads(nybble_command("inspect", out, "--json").stdout)
    inside = [tensor for tensor in facts["tensors"] if ".h." in tensor["name"] and len(tensor["shape"]) == 2]
    assert len(inside) == 24
    for tensor in inside:
        assert tensor["bits_per_weight"] == pytest.approx(bits, abs=0.02 if "--to" not in options else 0.25)
    assert sum(tensor["bytes"] for tensor in facts["tensors"]) < facts["file_bytes"] < 1.02 * facts["bytes"] + 20_000
    done = nybble_command("generate", out, "def main(", "--new-tokens", "4", "--temperature", "0")
    assert done.returncode == 0, done.stderr
    with pytest.raises(UsageError, match="a nybble-sparse folder is not laid out for transformers"):
        AutoModelForCausalLM.from_pretrained(out)
    plain = tmp_path / "plain"
    done = nybble_command("convert", out, plain, "--file", "float" if "--to" not in options else "nybble")
    assert done.returncode == 0, done.stderr
    if "--to" not in options:
        weight = AutoModelForCausalLM.from_pretrained(plain).transformer.h[0].mlp.c_fc.weight
        assert float((weight == 0).float().mean()) == pytest.approx(zeros, abs=1e-3)


def test_for_other_tools(tmp_path: Path, nybble_command: Run) -> None:
    done = nybble_command("prune", MODEL, "--method", "magnitude", "--to", "q8_0", "-o", tmp_path / "model.gguf")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "model.gguf").read_bytes()[:4] == b"GGUF"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--sparsity", "1.5"), "sparsity '1.5': give a share of weights between 0 and 1 (0.5, 30%), or 1:2, 2:4, 4:8"),
        (("--sparsity", "3:4"), "sparsity '3:4': give a share"),
        (("--sparsity", "half"), "sparsity 'half': give a share"),
        (("--method", "gptq"), "method gptq makes no weight zero; use magnitude, wanda, sparsegpt"),
        ((), "method sparsegpt:refine=3:sparsity=0.5 reads calibration text"),
        (("--method", "magnitude", "--to", "int4:g64,asym"), "format int4:g64,asym has offsets"),
    ],
)
def test_wrong_usage(options: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from nybble import cli

    with pytest.raises(UsageError) as error:
        cli.make_app(("prune", "plan"))(["prune", str(MODEL), "-o", str(tmp_path / "out"), *options], standalone_mode=False)
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()
