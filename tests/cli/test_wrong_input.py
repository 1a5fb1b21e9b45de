"""What a new user gets wrong: one line that begins with "nybble: error:", the right exit code, no traceback, nothing left
behind, and what was there before untouched."""

from __future__ import annotations

import json
import os
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

import nybble
from nybble import demo

Run = Callable[..., CompletedProcess[str]]


def check_error(done: CompletedProcess[str], code: int, *parts: str) -> None:
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode == code, done.stderr
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("nybble: error: ")
    assert "Traceback" not in done.stderr
    assert "internal error" not in lines[0]
    assert not done.stdout.strip(), "a failed run gave a result"
    for part in parts:
        assert part in lines[0], lines[0]


@pytest.fixture
def place(tmp_path: Path) -> Any:
    """An empty working folder that has to be empty again afterwards, so that nothing half-written stays."""
    folder = tmp_path / "place"
    folder.mkdir()
    yield folder
    assert list(folder.iterdir()) == []


@pytest.fixture
def broken(tmp_path: Path) -> Callable[[str], Path]:
    """A copy of the shipped model with one thing wrong."""

    def make(what: str) -> Path:
        folder = tmp_path / what
        shutil.copytree(demo.model_folder(), folder)
        weights = folder / "model.safetensors"
        if what == "truncated":
            weights.write_bytes(weights.read_bytes()[:-1000])
        elif what == "cut-in-header":
            weights.write_bytes(weights.read_bytes()[:50])
        elif what == "nan":
            content = bytearray(weights.read_bytes())
            start = 8 + struct.unpack("<Q", content[:8])[0]
            header = json.loads(content[8:start])
            at = start + header["transformer.h.1.mlp.c_fc.weight"]["data_offsets"][0]
            content[at : at + 2] = b"\x00\x7e"  # float16 NaN
            weights.write_bytes(content)
        elif what == "no-config":
            (folder / "config.json").unlink()
        elif what == "config-cut":
            (folder / "config.json").write_text('{"model_type": ')
        elif what == "no-tokenizer":
            for file in folder.glob("*token*"):
                file.unlink()
            for name in ("vocab.json", "merges.txt"):
                (folder / name).unlink(missing_ok=True)
        elif what == "no-weights":
            weights.unlink()
        elif what == "pickle":
            weights.rename(folder / "pytorch_model.bin")
        elif what == "unknown-architecture":
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**config, "architectures": ["Gpt9LMHeadModel"]}))
        return folder

    return make


@pytest.mark.parametrize("verb", ["compare", "quantize", "plan", "inspect", "eval", "generate"])
def test_a_missing_folder(verb: str, nybble_command: Run, place: Path) -> None:
    more = {"quantize": ("-o", "out"), "compare": ("-o", "out"), "generate": ("--prompt", "a")}.get(verb, ())
    done = nybble_command(verb, "./no/such", *more, cwd=place)
    check_error(done, 1, "no/such")


@pytest.mark.parametrize(
    ("what", "parts"),
    [
        ("truncated", ("model.safetensors", "not a valid safetensors file")),
        ("cut-in-header", ("model.safetensors", "not a valid safetensors file")),
        ("nan", ("transformer.h.1.mlp.c_fc.weight", "not finite")),
        ("no-config", ("config.json", "No such file")),
        ("config-cut", ("config.json", "not JSON")),
        ("no-weights", ("no model.safetensors",)),
        ("pickle", ("pickled weights", "safetensors")),
        ("unknown-architecture", ("Gpt9LMHeadModel", "not part of transformers")),
    ],
)
def test_a_broken_model(what: str, parts: tuple[str, ...], nybble_command: Run, broken: Any, place: Path) -> None:
    check_error(nybble_command("quantize", broken(what), "-o", "out", "--to", "int8", cwd=place), 1, *parts)


@pytest.mark.parametrize("what", ["truncated", "nan", "no-tokenizer"])
def test_compare_of_a_broken_model(what: str, nybble_command: Run, broken: Any, place: Path) -> None:
    part = {"truncated": "not a valid safetensors file", "nan": "not finite", "no-tokenizer": "no tokenizer"}[what]
    check_error(nybble_command("compare", broken(what), "--variants", "fast", "--windows", "1", "-o", "out", cwd=place), 1, part)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("compare", "--variants", "int44:g64"), ("'int44'", "did you mean int4")),
        (("compare", "--variants", "int4:g48"), ("'g48'", "g64")),
        (("compare", "--variants", "int4:g64+gptqq"), ("'gptqq'", "rtn")),
        (("compare", "--variants", "fp16+rtn"), ("takes no method",)),
        (("compare", "--variants", ","), ("no variants",)),
        (("compare", "--protocol", "papr"), ("'papr'",)),
        (("compare", "--windows", "0"), ("windows", "0", "1")),
        (("compare", "--new-tokens", "0"), ("new tokens",)),
        (("compare", "--repeats", "-1"), ("repeats",)),
        (("compare", "--threads", "0"), ("threads",)),
        (("compare", "--rule", "wte"), ("PATTERN=FORMAT",)),
        (("compare", "--shape", "gpt22"), ("gpt22", "gpt2")),
        (("compare", "--shape", "gpt2", "--text", "a.txt"), ("--shape",)),
        (("compare", "--windoes", "3"), ("--windoes",)),
        (("compare", "--windows", "many"), ("many",)),
        (("quantize", "x"), ("--output",)),
        (("quantize", "x", "-o", "out", "--to", "int9"), ("'int9'", "int8")),
        (("quantize", "x", "-o", "out", "--method", "awk"), ("'awk'",)),
        (("plan", "--keep", "c_prj"), ("'c_prj'",)),
        (("eval", "x", "--protocol", "papr"), ("'papr'", "paper")),
        (("generate", "x"), ("--prompt",)),
        (("generate", "x", "--prompt", "a", "--new-tokens", "0"), ("--new-tokens",)),
        (("comapre",), ("comapre",)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) and value and value[0] in
    ("compare", "quantize", "plan", "eval", "generate", "comapre") else "",
)  # fmt: skip
def test_wrong_usage(arguments: tuple[str, ...], parts: tuple[str, ...], nybble_command: Run, place: Path) -> None:
    check_error(nybble_command(*arguments, cwd=place), 2, *parts)


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("empty.txt", b"", ("empty.txt", "is empty")),
        ("spaces.txt", b" \n\t\n", ("is empty",)),
        ("short.txt", b"def add(a, b):\n", ("less than one window", "--window")),
        ("latin.txt", b"caf\xe9 " * 999, ("not UTF-8", "byte 3")),
        ("broken.json", b"[1, ", ("not JSON",)),
        ("numbers.json", b"[1, 2]", ("list of strings",)),
        ("keys.jsonl", b'{"words": "a"}\n', ("line 1", "text")),
        (None, b"", ("does not exist",)),
    ],
)
def test_a_text_that_cannot_be_used(
    name: str | None, content: bytes, parts: tuple[str, ...], nybble_command: Run, place: Path, tmp_path: Path
) -> None:
    text = tmp_path / (name or "missing.txt")
    if name:
        text.write_bytes(content)
    arguments = ("--text", text, "--variants", "fast", "-o", "out")
    check_error(nybble_command("compare", *arguments, cwd=place), 1, *parts)


def test_a_prompt_longer_than_the_context(nybble_command: Run, place: Path) -> None:
    done = nybble_command("generate", demo.model_folder(), "--prompt", "class " * 5000, cwd=place)
    check_error(done, 1, "context", "shorten")
    prompt = "class " * 2000
    done = nybble_command("compare", "--prompt", prompt, "--variants", "fast", "--windows", "1", cwd=place)
    check_error(done, 1, "context")


def test_an_empty_prompt(nybble_command: Run, place: Path) -> None:
    check_error(nybble_command("generate", demo.model_folder(), "--prompt", "", cwd=place), 1, "prompt is empty")


@pytest.mark.parametrize("verb", ["compare", "quantize"])
def test_an_output_that_cannot_be_written(verb: str, nybble_command: Run, place: Path, tmp_path: Path) -> None:
    model = () if verb == "compare" else (demo.model_folder(),)
    (tmp_path / "file").write_text("mine")
    check_error(nybble_command(verb, *model, "-o", tmp_path / "file", cwd=place), 1, "is a file")
    check_error(nybble_command(verb, *model, "-o", tmp_path / "file" / "out", cwd=place), 1, "is a file")
    assert (tmp_path / "file").read_text() == "mine"
    if Path("/proc/self").is_dir():  # a file system that nobody can write to, root neither
        check_error(nybble_command(verb, *model, "-o", "/proc/out", cwd=place), 1, "/proc", "choose another")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes in read-only folders")
def test_a_read_only_folder(nybble_command: Run, place: Path, tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o555)
    check_error(nybble_command("compare", "-o", folder / "out", cwd=place), 1, "cannot write", "choose another")


@pytest.mark.parametrize("verb", ["compare", "quantize"])
def test_an_output_that_is_there_already(verb: str, nybble_command: Run, place: Path, tmp_path: Path) -> None:
    model = () if verb == "compare" else (demo.model_folder(),)
    marker = {"compare": "results.jsonl", "quantize": "config.json"}[verb]
    earlier = tmp_path / "earlier"
    earlier.mkdir()
    (earlier / marker).write_text("{}")
    check_error(nybble_command(verb, *model, "-o", earlier, cwd=place), 1, "not empty", "--force")
    assert (earlier / marker).read_text() == "{}"
    (earlier / marker).rename(earlier / "thesis.txt")
    check_error(nybble_command(verb, *model, "-o", earlier, "--force", cwd=place), 1, marker, "will not replace")
    assert [path.name for path in earlier.iterdir()] == ["thesis.txt"]


def test_a_model_that_is_quantized_already(nybble_command: Run, place: Path, tmp_path: Path) -> None:
    nybble.quantize(demo.model_folder(), "int8").save(tmp_path / "m")
    check_error(nybble_command("quantize", tmp_path / "m", "-o", "out", cwd=place), 1, "quantized already")
    check_error(
        nybble_command("compare", tmp_path / "m", "--variants", "fast", "--windows", "1", cwd=place), 1, "quantized already"
    )


def test_a_model_that_predicts_no_next_token(nybble_command: Run, place: Path, tmp_path: Path, tiny: Any) -> None:
    tiny("bert").save_pretrained(tmp_path / "bert")
    text = tmp_path / "t.txt"
    text.write_text("words " * 99)
    check_error(nybble_command("compare", tmp_path / "bert", "--text", text, cwd=place), 1, "BertForMaskedLM", "next token")
    check_error(nybble_command("generate", tmp_path / "bert", "--prompt", "a", cwd=place), 2, "next token")


def test_a_hub_name_without_a_network(nybble_command: Run, place: Path, environment: dict[str, str], monkeypatch: Any) -> None:
    """The endpoint is one that refuses at once, so that the test needs no network and waits for none."""
    monkeypatch.setitem(environment, "HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setitem(environment, "HF_HOME", str(place.parent / "cache"))
    start = time.monotonic()
    done = nybble_command("plan", "some-org/some-model", cwd=place)
    assert time.monotonic() - start < 30
    check_error(done, 1, "some-org/some-model", "network", "folder")


@pytest.mark.parametrize(
    "content", [b"", b"{\n", b'{"schema": "nybble.results/9"}\n', b'{"schema": "nybble.results/1"}\n', b"[]\n"]
)
def test_results_that_are_none(content: bytes, nybble_command: Run, place: Path, tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_bytes(content)
    check_error(nybble_command("report", tmp_path / "results.jsonl", "-o", place / "report.html", cwd=place), 1, "results.jsonl")


def test_debug_shows_the_traceback(nybble_command: Run, place: Path) -> None:
    done = nybble_command("--debug", "inspect", "nowhere", cwd=place)
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("nybble: error: ")


def test_a_name_with_escape_sequences_stays_off_the_terminal(nybble_command: Run, place: Path) -> None:
    done = nybble_command("inspect", "a\x1b[31m\nb", cwd=place)
    check_error(done, 1)
    assert "\x1b" not in done.stderr
