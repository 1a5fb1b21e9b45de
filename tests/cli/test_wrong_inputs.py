"""Every wrong input that a new user may try: one clear line, the right exit code, and nothing left behind.

The program runs as its user starts it, in a process of its own and a folder of its own, which must hold the same bytes
afterwards; its temporary files are sent there too.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from nybble.demo import model_folder

DEMO = str(model_folder())
NAN_TENSOR = "transformer.h.0.mlp.c_fc.weight"
LONG_PROMPT = "x = 1\n" * 400

Run = Callable[..., subprocess.CompletedProcess[str]]


def contents(folder: Path) -> dict[str, str]:
    """Every path below a folder, with a hash of what it holds; but not the cache folder that importing torch makes."""
    return {
        str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in folder.rglob("*")
        if not path.name.startswith("torchinductor_")
    }


def check_one_line(done: subprocess.CompletedProcess[str], code: int, *parts: str) -> None:
    """The error is the last line, after at most some lines of progress; it holds all the parts."""
    assert done.returncode == code, done.stderr
    *progress, last = done.stderr.splitlines()
    assert last.startswith("nybble: error: "), done.stderr
    assert "internal error" not in last
    assert "Traceback" not in done.stderr + done.stdout
    assert "\x1b" not in done.stderr
    assert all("%" in line or line.startswith("reads ") for line in progress), (
        f"more than progress before the error: {done.stderr}"
    )
    assert len(last) < 700, f"no line that a person reads: {last}"
    for part in parts:
        assert part in last
    assert done.stdout == ""


@pytest.fixture(scope="session")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models and texts, each with one thing wrong."""
    root = tmp_path_factory.mktemp("broken")
    (root / "empty.txt").write_bytes(b"")
    (root / "white.txt").write_bytes(b" \n\t\n  ")
    (root / "short.txt").write_text("A text of a few words.")
    (root / "latin1.txt").write_bytes("größer als vorher ".encode("latin-1") * 500)
    (root / "list.json").write_text('{"text": "no list"}')
    (root / "cut.json").write_text("[1, ")
    (root / "prompts.txt").write_text("a\n\nb\n")
    (root / "keys.jsonl").write_text('{"words": "a"}\n')
    (root / "nothing").mkdir()
    for name in (
        "truncated",
        "nan",
        "infinite-norm",
        "no-json",
        "own-code",
        "pickled",
        "no-tokenizer",
        "other-config",
        "unknown-class",
        "bert",
        "no-table",
    ):
        shutil.copytree(DEMO, root / name)

    weights = (root / "truncated" / "model.safetensors").read_bytes()
    (root / "truncated" / "model.safetensors").write_bytes(weights[:-1000])
    (root / "cut-in-header").mkdir()
    (root / "cut-in-header" / "model.safetensors").write_bytes(weights[:50])
    shutil.copyfile(root / "nan" / "config.json", root / "cut-in-header" / "config.json")
    poison(root / "nan", NAN_TENSOR, (3, 5), float("nan"))
    poison(root / "infinite-norm", "transformer.ln_f.weight", (7,), float("inf"))
    (root / "no-json" / "config.json").write_text('{"model_type": "gpt2", ')
    edit_config(root / "own-code", auto_map={"AutoModelForCausalLM": "modeling.Model"})
    (root / "pickled" / "model.safetensors").rename(root / "pickled" / "pytorch_model.bin")
    (root / "no-tokenizer" / "tokenizer.json").unlink()
    edit_config(root / "other-config", n_embd=128)
    edit_config(root / "unknown-class", architectures=["Gpt9LMHeadModel"])
    edit_config(root / "no-table", model_type="bloomy", architectures=["BloomyForCausalLM"])
    edit_config(root / "bert", model_type="bert", architectures=["BertForMaskedLM"])  # config.json is all that is read

    shutil.copytree(DEMO, root / "quantized")
    edit_config(root / "quantized", quantization_config={"quant_method": "nybble", "container": 1, "tensors": {}})
    (root / "results.jsonl").write_text('{"schema": "nybble.results/1", "variant": "fp32", "form')
    (root / "old.jsonl").write_text('{"schema": "nybble.results/0"}\n')
    (root / "no-records.jsonl").write_text("")
    return root


def poison(folder: Path, name: str, place: tuple[int, ...], value: float) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = {key: array.copy() for key, array in load_file(folder / "model.safetensors").items()}
    tensors[name][place] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def edit_config(folder: Path, **entries: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


@pytest.fixture
def run(tmp_path: Path, broken: Path, environment: dict[str, str]) -> Iterator[Run]:
    """Runs nybble in a folder where `in` holds the broken inputs; afterwards that folder must be as it was."""
    (tmp_path / "in").symlink_to(broken)
    (tmp_path / "tmp").mkdir()
    (tmp_path / "file").write_text("a regular file")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("years of work")
    (tmp_path / "earlier").mkdir()
    (tmp_path / "earlier" / "results.jsonl").write_text("an earlier comparison")
    (tmp_path / "earlier" / "config.json").write_text("an earlier model")
    before, inputs = contents(tmp_path), sorted(contents(broken))
    env = {**environment, "TMPDIR": str(tmp_path / "tmp")}

    def command(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "nybble", *arguments]
        return subprocess.run(
            line, capture_output=True, text=True, cwd=tmp_path, env={**env, **more}, timeout=90, check=False
        )  # fmt: skip

    yield command
    assert contents(tmp_path) == before
    assert sorted(contents(broken)) == inputs


MISSING = "no/such/folder"
WRONG: dict[str, tuple[list[str], int, tuple[str, ...]]] = {
    # the model
    "compare missing folder": (["compare", MISSING], 1, (MISSING, "hub name")),
    "quantize missing folder": (["quantize", MISSING, "-o", "out"], 1, (MISSING,)),
    "plan missing folder": (["plan", MISSING], 1, (MISSING,)),
    "inspect missing folder": (["inspect", MISSING], 1, (MISSING,)),
    "eval missing folder": (["eval", MISSING], 1, (MISSING,)),
    "generate missing folder": (["generate", MISSING, "--prompt", "a"], 1, (MISSING,)),
    "compare no config": (["compare", "in/nothing"], 1, ("in/nothing/config.json",)),
    "inspect no config": (["inspect", "in/nothing"], 1, ("in/nothing/config.json",)),
    "compare a file": (["compare", "./file"], 1, ("file is a file",)),
    "inspect a text": (["inspect", "./file"], 1, ("file", "safetensors")),
    "compare truncated": (["compare", "in/truncated"], 1, ("in/truncated/model.safetensors", "truncated")),
    "quantize truncated": (["quantize", "in/truncated", "-o", "out"], 1, ("in/truncated/model.safetensors", "truncated")),
    "compare cut in its header": (["compare", "in/cut-in-header"], 1, ("in/cut-in-header/model.safetensors",)),
    "inspect truncated": (["inspect", "in/truncated"], 1, ("in/truncated/model.safetensors", "truncated")),
    "compare config not JSON": (["compare", "in/no-json"], 1, ("in/no-json/config.json", "not JSON")),
    "plan config not JSON": (["plan", "in/no-json"], 1, ("in/no-json/config.json", "not JSON")),
    "compare own code": (["compare", "in/own-code"], 1, ("auto_map",)),
    "generate own code": (["generate", "in/own-code", "--prompt", "a"], 1, ("auto_map",)),
    "compare pickled": (["compare", "in/pickled"], 1, ("in/pickled", "*.bin")),
    "compare no tokenizer": (["compare", "in/no-tokenizer"], 1, ("in/no-tokenizer", "tokenizer.json")),
    "eval no tokenizer": (["eval", "in/no-tokenizer"], 1, ("in/no-tokenizer", "tokenizer.json")),
    "compare encoder": (["compare", "in/bert"], 1, ("in/bert", "BertForMaskedLM")),
    "eval encoder": (["eval", "in/bert"], 1, ("in/bert", "next token")),
    "generate encoder": (["generate", "in/bert", "--prompt", "a"], 1, ("in/bert", "next token")),
    "generate no tokenizer": (["generate", "in/no-tokenizer", "a"], 1, ("in/no-tokenizer", "tokenizer.json")),
    "generate truncated": (["generate", "in/truncated", "a"], 1, ("in/truncated/model.safetensors", "truncated")),
    "generate unknown model type": (["generate", "in/no-table", "a"], 1, ("'bloomy'", "gpt2", "--runtime torch")),
    "compare quantized": (["compare", "in/quantized"], 1, ("in/quantized", "quantized already")),
    "quantize quantized": (["quantize", "in/quantized", "-o", "out"], 1, ("in/quantized", "quantized already")),
    "plan quantized": (["plan", "in/quantized"], 1, ("in/quantized", "quantized already")),
    # the text
    "compare empty text": (["compare", "--text", "in/empty.txt"], 1, ("in/empty.txt", "empty")),
    "compare white text": (["compare", "--text", "in/white.txt"], 1, ("in/white.txt", "empty")),
    "eval empty text": (["eval", DEMO, "--text", "in/empty.txt"], 1, ("in/empty.txt", "empty")),
    "compare text not UTF-8": (["compare", "--text", "in/latin1.txt"], 1, ("in/latin1.txt", "UTF-8", "byte 2")),
    "compare missing text": (["compare", "--text", "in/no.txt"], 1, ("in/no.txt",)),
    "compare folder as text": (["compare", "--text", "in/nothing"], 1, ("in/nothing", "folder")),
    "compare JSON text": (["compare", "--text", "in/list.json"], 1, ("in/list.json", "list of strings")),
    "compare JSON cut short": (["compare", "--text", "in/cut.json"], 1, ("in/cut.json", "not JSON")),
    "compare JSON lines of other keys": (["compare", "--text", "in/keys.jsonl"], 1, ("in/keys.jsonl, line 1", '"text"')),
    "generate no prompt": (["generate", DEMO], 2, ("no prompt", "--prompt-file")),
    "generate two prompts": (["generate", DEMO, "a", "--batch", "in/prompts.txt"], 2, ("PROMPT and --batch",)),
    "generate missing prompt file": (["generate", DEMO, "--prompt-file", "in/no.txt"], 1, ("in/no.txt",)),
    "generate prompt not UTF-8": (["generate", DEMO, "--prompt-file", "in/latin1.txt"], 1, ("in/latin1.txt", "byte 2")),
    "generate empty line": (["generate", DEMO, "--batch", "in/prompts.txt"], 1, ("in/prompts.txt", "line 2 is empty")),
    "generate empty prompt": (["generate", DEMO, ""], 1, ("prompt is empty",)),
    "quantize calibration empty": (
        ["quantize", DEMO, "--method", "rtn:mse", "--calibrate", "in/empty.txt", "-o", "out"], 1, ("in/empty.txt",),
    ),
    "compare bad text before a missing model": (["compare", MISSING, "--text", "in/empty.txt"], 1, ("in/empty.txt",)),
    # names and options
    "unknown variant": (["compare", "--variants", "int4:g64,nf5"], 2, ("'nf5'", "did you mean nf4")),
    "unknown set": (["compare", "--variants", "defalt"], 2, ("'defalt'",)),
    "no variant": (["compare", "--variants", ","], 2, ("no variants", "fast")),
    "unknown option of a format": (["compare", "--variants", "int4:g64,dqq"], 2, ("dqq",)),
    "option of another format": (["quantize", DEMO, "--to", "int4:g64,dq", "-o", "out"], 2, ("int4", "dq")),
    "unknown group": (["quantize", DEMO, "--to", "int4:g48", "-o", "out"], 2, ("g48",)),
    "unknown format": (["quantize", DEMO, "--to", "int9", "-o", "out"], 2, ("int9", "int8")),
    "plan unknown format": (["plan", "--to", "int44"], 2, ("int44", "int4")),
    "unknown method": (["quantize", DEMO, "--method", "rnt", "-o", "out"], 2, ("'rnt'", "did you mean rtn")),
    "plan unknown method": (["plan", "--method", "gptqq"], 2, ("gptqq", "rtn")),
    "variant unknown method": (["compare", "--variants", "int4:g64+mse"], 2, ("'mse'", "rtn")),
    "method of a cast": (["compare", "--variants", "fp16+rtn"], 2, ("fp16+rtn", "takes no method")),
    "name with escape sequences": (["inspect", "a\x1b[31m\nb"], 1, ("a [31m b",)),
    "rule without =": (["quantize", DEMO, "--rule", "lm_head", "-o", "out"], 2, ("'lm_head'", "PATTERN=FORMAT")),
    "shape and model": (["compare", DEMO, "--shape", "gpt2"], 2, ("--shape", "MODEL")),
    "unknown shape": (["compare", "--shape", "gpt9"], 2, ("gpt9", "gpt2")),
    "unknown protocol": (["compare", "--protocol", "papr"], 2, ("'papr'", "did you mean paper")),
    "eval unknown protocol": (["eval", DEMO, "--protocol", "papr"], 2, ("'papr'", "did you mean paper")),
    "eval unknown activations": (["eval", DEMO, "--activations", "int4"], 2, ("'int4'", "both, float, int8, none")),
    "no windows": (["compare", "--windows", "0"], 2, ("windows is 0", "least is 1")),
    "eval no windows": (["eval", DEMO, "--windows", "0"], 2, ("windows is 0", "least is 1")),
    "window of one": (["compare", "--window", "1"], 2, ("window is 1", "least is 2")),
    "no threads": (["compare", "--threads", "0"], 2, ("threads is 0", "least is 1")),
    "no repeats": (["compare", "--repeats", "0"], 2, ("repeats is 0",)),
    "no new tokens": (["compare", "--new-tokens", "0"], 2, ("new tokens is 0",)),
    "generate no tokens": (["generate", DEMO, "--prompt", "a", "--new-tokens", "0"], 2, ("--new-tokens 0",)),
    "generate top-k of none": (["generate", DEMO, "a", "--top-k", "0"], 2, ("--top-k 0",)),
    "generate top-k below": (["generate", DEMO, "a", "--top-k", "-3"], 2, ("top_k is -3",)),
    "generate top-p over 1": (["generate", DEMO, "a", "--top-p", "1.5"], 2, ("top_p is 1.5", "to 1")),
    "generate min-p over 1": (["generate", DEMO, "a", "--min-p", "2"], 2, ("min_p is 2", "0 to 1")),
    "generate temperature below 0": (["generate", DEMO, "a", "--temperature", "-1"], 2, ("temperature is -1", "0 is greedy")),
    "generate temperature NaN": (["generate", DEMO, "a", "--temperature", "nan"], 2, ("temperature is nan",)),
    "generate no penalty": (["generate", DEMO, "a", "--repetition-penalty", "0"], 2, ("repetition_penalty is 0",)),
    "generate cut of greedy": (["generate", DEMO, "a", "--temperature", "0", "--top-p", "0.5"], 2, ("--top-p 0.5", "leave one")),
    "generate empty stop": (["generate", DEMO, "a", "--stop", ""], 2, ("stop string is empty",)),
    "generate unknown cache": (["generate", DEMO, "a", "--cache", "int5"], 2, ("'int5'", "did you mean int8 or int4")),
    "generate no threads": (["generate", DEMO, "a", "--threads", "0"], 2, ("threads 0",)),
    "generate unknown runtime": (["generate", DEMO, "a", "--runtime", "tortch"], 2, ("'tortch'", "did you mean torch")),
    "generate torch with stop": (["generate", DEMO, "a", "--runtime", "torch", "--stop", "b"], 2, ("not --stop",)),
    "stride of another protocol": (["compare", "--stride", "8"], 2, ("stride 8", "paper")),
    "stride over window": (
        ["compare", "--protocol", "stride", "--window", "64", "--stride", "64"], 2, ("stride 64", "window of 64"),
    ),
    "windows no number": (["compare", "--windows", "many"], 2, ("--windows", "valid integer")),
    "unknown verb": (["compair"], 2, ("'compair'",)),
    "unknown flag": (["compare", "--varients", "fast"], 2, ("--varients",)),
    "no output": (["quantize", DEMO], 2, ("--output",)),
    # the output
    "compare over an earlier one": (["compare", "-o", "earlier"], 1, ("earlier", "--force")),
    "quantize over an earlier one": (["quantize", DEMO, "-o", "earlier"], 1, ("earlier", "--force")),
    "compare over foreign files": (["compare", "-o", "foreign", "--force"], 1, ("foreign", "results.jsonl")),
    "quantize over foreign files": (["quantize", DEMO, "-o", "foreign", "--force"], 1, ("foreign", "config.json")),
    "compare onto a file": (["compare", "-o", "file"], 1, ("file is a file",)),
    "compare below a file": (["compare", "-o", "file/deep/out"], 1, ("file is a file",)),
    "quantize below a file": (["quantize", DEMO, "-o", "file/out"], 1, ("file is a file",)),
    "failed in new parents": (["compare", MISSING, "-o", "new/parents/out"], 1, (MISSING,)),
    # results
    "report cut short": (["report", "in/results.jsonl", "-o", "r.html"], 1, ("in/results.jsonl, line 1", "cut short")),
    "report of another schema": (["report", "in/old.jsonl", "-o", "r.html"], 1, ("in/old.jsonl, line 1", "nybble.results/0")),
    "report empty": (["report", "in/no-records.jsonl", "-o", "r.html"], 1, ("in/no-records.jsonl", "no records")),
    "report missing": (["report", "in/none.jsonl", "-o", "r.html"], 1, ("in/none.jsonl",)),
    "report of a folder": (["report", "in/nothing", "-o", "r.html"], 1, ("in/nothing",)),
}  # fmt: skip
"""What is found before any model is loaded: name -> arguments, exit code, parts of the message."""


@pytest.mark.parametrize("case", WRONG)
def test_found_before_a_model_is_loaded(case: str, run: Run) -> None:
    arguments, code, parts = WRONG[case]
    start = time.perf_counter()
    done = run(*arguments)
    seconds = time.perf_counter() - start
    check_one_line(done, code, *parts)
    if case != "unknown shape":  # a worker that has imported torch names the shapes
        assert seconds < 60


LOADED: dict[str, tuple[list[str], int, tuple[str, ...]]] = {
    "compare text shorter than a window": (["compare", "--text", "in/short.txt"], 1, ("one window of 512", "--window")),
    "eval text shorter than a window": (["eval", DEMO, "--text", "in/short.txt"], 1, ("one window of 512", "--window")),
    "compare window over the context": (["compare", "--window", "513"], 2, ("513", "context of 512")),
    "eval window over the context": (["eval", DEMO, "--window", "513"], 2, ("513", "context of 512")),
    "compare prompt over the context": (["compare", "--prompt", LONG_PROMPT], 1, ("tokens and 50 new", "context of 512")),
    "compare new tokens over the context": (["compare", "--new-tokens", "512"], 1, ("512 new", "context of 512")),
    "generate prompt over the context": (["generate", DEMO, "--prompt", LONG_PROMPT], 1, ("tokens and 50 new", "context of 512")),
    "compare NaN": (["compare", "in/nan"], 1, (NAN_TENSOR, "1 of 262144", "[3, 5]")),
    "eval NaN": (["eval", "in/nan"], 1, (NAN_TENSOR, "1 of 262144", "[3, 5]")),
    "generate NaN": (["generate", "in/nan", "a"], 1, ("not finite",)),
    "generate infinite norm": (["generate", "in/infinite-norm", "a"], 1, ("not finite",)),
    "quantize infinite norm": (["quantize", "in/infinite-norm", "-o", "out"], 1, ("transformer.ln_f.weight", "1 of 256", "inf")),
    "class that transformers lacks": (["plan", "in/unknown-class"], 1, ("Gpt9LMHeadModel", "not part of transformers")),
    "config of another model": (["quantize", "in/other-config", "-o", "out"], 1, ("in/other-config", "another shape")),
    "keep that matches nothing": (["plan", "--keep", "wtf"], 2, ("'wtf'", "known", "and 6 more")),
    "keep everything": (["quantize", DEMO, "--keep", "*", "-o", "out"], 2, ("nothing to quantize",)),
    "calibration too short": (
        ["compare", "--variants", "int4:g64+rtn:mse", "--calibrate", "in/short.txt"], 1, ("less than one window",),
    ),
}  # fmt: skip
"""What only the model can tell."""


@pytest.mark.parametrize("case", LOADED)
def test_found_when_the_model_is_loaded(case: str, run: Run) -> None:
    arguments, code, parts = LOADED[case]
    check_one_line(run(*arguments), code, *parts)


@pytest.mark.parametrize("verb", ["compare", "quantize"])
def test_output_on_a_read_only_file_system(verb: str, run: Run) -> None:
    """/proc refuses new files, to root as to anybody."""
    if not os.path.isdir("/proc/self"):
        pytest.skip("no /proc on this system to stand for a read-only disk")
    model = [DEMO] if verb == "quantize" else []
    check_one_line(run(verb, *model, "-o", "/proc/nybble-out"), 1, "/proc", "-o")


def test_hub_name_without_a_network(run: Run, tmp_path: Path) -> None:
    """A port where nobody listens stands for no network."""
    start = time.perf_counter()
    done = run("compare", "somebody/some-model", HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path / "in" / "nothing"))
    check_one_line(done, 1, "'somebody/some-model'", "network", "folder")
    assert time.perf_counter() - start < 60  # a hang lasts two minutes and more


def test_hub_that_never_answers(run: Run, tmp_path: Path) -> None:
    """A network that swallows what is sent must not hang the program."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(16)
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        start = time.perf_counter()
        done = run("plan", "gpt2", HF_ENDPOINT=address, HF_HOME=str(tmp_path / "in" / "nothing"))
        check_one_line(done, 1, "'gpt2'", "network", "folder")
        assert time.perf_counter() - start < 60


def test_hub_name_in_offline_mode(run: Run, tmp_path: Path) -> None:
    done = run("quantize", "gpt2", "-o", "out", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "in" / "nothing"))
    check_one_line(done, 1, "'gpt2'", "network", "folder")


def test_debug_shows_the_traceback_before_the_line(run: Run) -> None:
    done = run("--debug", "inspect", MISSING)
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("nybble: error: ")
