"""`nybble train` as a person runs it: from scratch, from a model, rounded, distilled; killed and gone on; by two processes."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import nybble
from nybble import cli
from nybble.containers import open_contents
from nybble.convert import convert
from nybble.engine import Decoder
from nybble.engine.text import TextCodec
from nybble.errors import InputError, NybbleError, OutputError, UsageError
from nybble.train.distill import fewer_layers
from nybble.train.start import make_tokenizer, new

Run = Callable[..., "subprocess.CompletedProcess[str]"]
_DRAW = random.Random(0)
_NAMES = ("first", "second", "a_value", "x", "number_of_lines", "is_it")
LINES = "".join(
    f"def {_DRAW.choice(_NAMES)}({_DRAW.choice(_NAMES)}):\n    return {_DRAW.choice(_NAMES)} + {_DRAW.randrange(1000)}\n\n"
    for _ in range(600)
)
QUICK = ("--batch", "4", "--window", "32", "--threads", "1", "--device", "cpu", "--evaluate-every", "5", "--save-every", "5")


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(LINES, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def model(words: Path, tmp_path_factory: pytest.TempPathFactory, nybble_command: Run) -> Path:
    """A small model from scratch, with its own tokenizer."""
    folder = tmp_path_factory.mktemp("trained") / "model"
    shape = folder.parent / "shape.json"
    shape.write_text('{"model_type": "gpt2", "n_layer": 4, "n_embd": 32, "n_head": 2, "n_positions": 64}')
    options = ("--shape", shape, "--vocabulary", "280", "--text", words, "--steps", "150", "--lr", "0.01", *QUICK)
    done = nybble_command("train", *options, "-o", folder)
    assert done.returncode == 0, done.stderr
    before, after = map(float, re.findall(r"\d\.\d{4}", done.stdout))
    assert after < 0.5 * before
    return folder


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "training" / "log.jsonl").read_text().splitlines()]


def test_everything_opens_it(model: Path, tmp_path: Path) -> None:
    import transformers

    text = "def first(second):"
    again = transformers.AutoModelForCausalLM.from_pretrained(model).eval()
    ids = TextCodec.load(model).encode(text)
    assert transformers.AutoTokenizer.from_pretrained(model)(text)["input_ids"] == ids
    with torch.inference_mode():
        wanted = int(again(torch.tensor([ids])).logits[0, -1].argmax())
    assert Decoder.load(model, exact=True).generate(ids, max_new_tokens=1, stop_tokens=()) == [wanted]
    path = tmp_path / "model.gguf"
    convert(model, path, to="q8_0")
    assert open_contents(path).packed
    assert Decoder.load(path, exact=True).generate(ids, max_new_tokens=1, stop_tokens=()) == [wanted]


def test_what_it_leaves_for_people(model: Path) -> None:
    training = model / "training"
    report = (training / "report.md").read_text()
    assert "150 of 4 windows of 32 tokens" in report
    assert re.search(r"held-out loss \| \d\.\d+ before, \d\.\d+ after", report)
    assert (training / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (training / "loss.svg").read_text()
    assert [line["step"] for line in log_of(model)] == list(range(1, 151))


@pytest.mark.parametrize("scales", ["fit", "learned"])
def test_rounded_in_every_pass(scales: str, model: Path, words: Path, tmp_path: Path, nybble_command: Run) -> None:
    output = tmp_path / "int3"
    options = ("--text", words, "--steps", "30", "--lr", "0.003", "--qat", "int2:g32", "--qat-scales", scales, "--teacher", model)
    done = nybble_command("train", model, *options, *QUICK, "-o", output)
    assert done.returncode == 0, done.stderr
    full, rounded, trained = map(float, re.findall(r"\d\.\d{4}", done.stdout))
    assert full < rounded
    assert trained < rounded
    tensors = nybble.load(output).tensors
    assert {str(tensor.format) for tensor in tensors.values()} == {"int2:g32"}
    codec = TextCodec.load(output)
    assert codec.decode(Decoder.load(output).generate(codec.encode("def f"), max_new_tokens=5))
    convert(output, tmp_path / "model.gguf")


@pytest.mark.parametrize(("spec", "method"), [("int3:g32", "gptq"), ("int8:channel", "static"), ("int4:g32", "sparsegpt")])
def test_qat_goes_on_from_what_its_method_chose(
    spec: str, method: str, model: Path, words: Path, tmp_path: Path, nybble_command: Run
) -> None:
    """Scales and grids that calibration found come from the checkpoint: the same weights as of a run that never stopped."""
    output = tmp_path / "trained"
    options = (
        "--text",
        words,
        "--steps",
        "10",
        "--lr",
        "0.003",
        "--qat",
        spec,
        "--qat-method",
        method,
        "--teacher",
        model,
        *QUICK,
    )
    more = {"static": ("--qat-observe", "7"), "sparsegpt": ("--keep-zeros",)}.get(method, ())
    done = nybble_command("train", model, *options, *more, "-o", output)
    assert done.returncode == 0, done.stderr
    tensors = nybble.load(output).tensors
    if method == "static":
        assert {tensor.activations.scheme for tensor in tensors.values() if tensor.activations} == {"static"}
    if method == "sparsegpt":
        assert all((tensor.decode() == 0).mean() >= 0.5 for name, tensor in tensors.items() if ".h." in name)
    whole = (output / "model.safetensors").read_bytes()
    shutil.rmtree(output / "training" / "checkpoints" / "step-000010")
    (output / "model.safetensors").unlink()
    again = nybble_command("train", model, *options, *more, "-o", output)
    assert again.returncode == 0, again.stderr
    assert "going on after step 5" in " ".join(again.stderr.split())
    assert (output / "model.safetensors").read_bytes() == whole


def test_distillation_to_fewer_layers(model: Path, words: Path, tmp_path: Path, nybble_command: Run) -> None:
    output = tmp_path / "small"
    options = ("--text", words, "--steps", "20", "--layers", "2", "--teacher", model, "--share", "0.5", "--lr", "0.005")
    done = nybble_command("train", model, *options, *QUICK, "-o", output)
    assert done.returncode == 0, done.stderr
    assert json.loads((output / "config.json").read_text())["n_layer"] == 2
    before, after = map(float, re.findall(r"\d\.\d{4}", done.stdout))
    assert after < before


def test_fewer_layers_are_some_of_the_model(tiny: Callable[..., Any]) -> None:
    whole = tiny("llama")
    one = fewer_layers(whole, 1)
    assert torch.equal(one.model.layers[0].mlp.up_proj.weight, whole.model.layers[0].mlp.up_proj.weight)
    assert torch.equal(one.lm_head.weight, whole.lm_head.weight)
    assert one.config.num_hidden_layers == 1
    with pytest.raises(UsageError, match="3 layers of 2: give 1 to 2"):
        fewer_layers(whole, 3)


def test_killed_anywhere_it_goes_on(
    words: Path, model: Path, tmp_path: Path, environment: dict[str, str], nybble_command: Run
) -> None:
    def command(output: Path) -> list[str]:
        options = ["--text", str(words), "--steps", "24", "--lr", "0.003", *QUICK, "-o", str(output)]
        return [sys.executable, "-m", "nybble", "train", str(model), *options]

    whole = tmp_path / "whole"
    subprocess.run(command(whole), env=environment, check=True, capture_output=True)
    killed = tmp_path / "killed"
    for seen in (3, 11):
        process = subprocess.Popen(command(killed), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until = time.monotonic() + 60
        while time.monotonic() < until and process.poll() is None:
            log = killed / "training" / "log.jsonl"
            if log.exists() and len(log.read_bytes().splitlines()) >= seen:
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (killed / "config.json").exists(), "a run that was killed left a model"
    subprocess.run(command(killed), env=environment, check=True, capture_output=True)
    keys = ("step", "loss", "gradient", "held_out")
    assert [[line[key] for key in keys] for line in log_of(killed)] == [[line[key] for key in keys] for line in log_of(whole)]
    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    told = (killed / "training" / "run.json").read_bytes()
    done = nybble_command(*command(killed)[3:], "--seed", "5")
    assert done.returncode == 2
    assert (killed / "training" / "run.json").read_bytes() == told, "a command that was refused left its figures"
    assert "holds a run with another seed (0, now 5)" in done.stderr
    done = nybble_command(*command(killed)[3:], "--seed", "5", "--restart")
    assert done.returncode == 0, done.stderr


def test_two_processes_do_what_one_does(words: Path, model: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    """Each with the whole model, or with a part of it; parts stop and go on too."""
    shared = ["--text", str(words), "--lr", "0.003", "--warmup", "1", *QUICK, "--micro", "2"]
    plain = {**environment, "OMP_NUM_THREADS": "1"}

    def train(size: int, name: str, *more: str, steps: int = 6) -> list[dict[str, Any]]:
        start = [sys.executable, "-m", "nybble"]
        if size > 1:
            start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size), "-m", "nybble"]
        command = [*start, "train", str(model), *shared, "--steps", str(steps), *more, "-o", str(tmp_path / name)]
        done = subprocess.run(command, env=plain, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("held-out loss") == 1
        return log_of(tmp_path / name)

    alone = train(1, "alone")
    for others in (train(2, "two"), train(2, "parts", "--shard")):
        for one, other in zip(alone, others, strict=True):
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
            assert one["gradient"] == pytest.approx(other["gradient"], rel=1e-3)
            assert (one["held_out"] or 0) == pytest.approx(other["held_out"] or 0, rel=1e-4)
    shutil.rmtree(tmp_path / "parts" / "training" / "checkpoints" / "step-000006")
    again = train(2, "parts", "--shard")
    assert [line["loss"] for line in again] == pytest.approx([line["loss"] for line in alone], rel=1e-4)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "parts").state_dict()
    for name, tensor in AutoModelForCausalLM.from_pretrained(tmp_path / "alone").state_dict().items():
        torch.testing.assert_close(whole[name], tensor, rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "train needs --text TEXT and -o OUTPUT"),
        (("--text", "TEXT", "-o", "OUT"), "train begins with a MODEL or with random weights of --shape SHAPE: give one of them"),
        (("--shape", "gpt3", "--text", "TEXT", "-o", "OUT"), "unknown shape 'gpt3'; did you mean gpt2"),
        (("MODEL", "--text", "nowhere", "-o", "OUT"), "text nowhere does not exist"),
        (
            ("MODEL", "--text", "TEXT", "-o", "OUT", "--window", "65"),
            "window of 65 tokens is longer than the model's context of 64",
        ),
        (("MODEL", "--text", "TEXT", "-o", "TEXT"), "is a file; name a folder"),
        (("MODEL", "--text", "TEXT", "-o", "MODEL/.."), "holds something else than a training run; name another"),
        (
            ("MODEL", "--text", "TEXT", "-o", "OUT", "--keep", "lm_head"),
            "--keep, --rule and all of --qat-... say what --qat FORMAT does",
        ),
        (("MODEL", "--text", "TEXT", "-o", "OUT", "--hidden", "1"), "--hidden, --share and --temperature say how a teacher is"),
        (
            ("MODEL", "--text", "TEXT", "-o", "OUT", "--shard", "--precision", "fp16"),
            "--shard goes with optimizer adamw and prec",
        ),
        (
            (
                *("MODEL", "--text", "TEXT", "-o", "OUT", "--window", "32"),
                "--qat",
                "int4",
                "--qat-method",
                "gptq",
                "--qat-scales",
                "fit",
            ),
            "method gptq chooses scales: train them (learned) or leave them (fixed), not fit",
        ),
        (("MODEL", "--text", "TEXT", "-o", "OUT", "--precision", "half"), "unknown precision 'half'"),
        (("MODEL", "--text", "TEXT", "-o", "OUT", "--device", "tpu"), "device 'tpu' is not here; this machine has cpu"),
        (("MODEL", "--text", "TEXT", "-o", "OUT", "--layers", "9"), "9 layers of 4: give 1 to 4"),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...], message: str, words: Path, model: Path, tmp_path: Path) -> None:
    places = {"TEXT": str(words), "OUT": str(tmp_path / "out"), "MODEL": str(model), "MODEL/..": str(model.parent)}
    with pytest.raises(NybbleError, match=re.escape(message)):
        cli._run(["train", *(places.get(word, word) for word in arguments)])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_a_disk_without_room_is_refused_before_the_first_step(
    optimizer: str, words: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = max(path.stat().st_size for path in (model / "training" / "checkpoints").rglob("state.safetensors"))
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=largest))
    command = ["train", str(model), "--text", str(words), "--window", "32", "--optimizer", optimizer, "-o", str(tmp_path / "out")]
    with pytest.raises(OutputError, match=r"checkpoints and model take about .* are free; make room"):
        cli._run(command)
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_does_not_forget_a_run(model: Path, words: Path) -> None:
    before = {path: path.read_bytes() for path in model.rglob("*") if path.is_file()}
    for wrong in (
        ["nowhere"],
        ["--shape", "gpt2-2m", "--vocabulary", "9"],
        [str(model), "--window", "65"],
        [str(model), "--window", "32", "--qat", "int9"],
        [str(model), "--window", "32", "--qat", "int4:g64", "--keep", "no.such.weight"],
        [str(model), "--window", "32", "--qat", "q4_0", "--qat-scales", "learned"],
    ):
        with pytest.raises(NybbleError):
            cli._run(["train", *wrong, "--text", str(words), "-o", str(model), "--restart"])
    assert {path: path.read_bytes() for path in model.rglob("*") if path.is_file()} == before


def test_tokenizers() -> None:
    tokenizer = make_tokenizer([LINES], 280)
    assert tokenizer.decode(tokenizer(LINES)["input_ids"]) == LINES
    assert tokenizer.eos_token_id == 0
    assert len(tokenizer) == 280
    with pytest.raises(UsageError, match="a vocabulary of 100 tokens: give 258"):
        make_tokenizer([LINES], 100)
    with pytest.raises(InputError, match=r"the text makes \d+ tokens, not 4000; give more text or --vocabulary smaller"):
        make_tokenizer([LINES], 4000)
    assert new("llama-6m", tokenizer, 0).model.config.vocab_size == 280
