"""Every verb as its user meets it: help, version, JSON, pipes."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from typer.main import get_command

import nybble
from nybble import demo
from nybble.cli import make_app

Run = Callable[..., CompletedProcess[str]]
README = Path(__file__).parents[2] / "README.md"
VERBS = (
    "compare",
    "report",
    "bench",
    "quantize",
    "convert",
    "methods",
    "formats",
    "plan",
    "inspect",
    "eval",
    "generate",
    "train",
)


def succeed(done: CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, nybble_command: Run) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "m"
    shown = succeed(nybble_command("quantize", demo.model_folder(), "--to", "int4:g64", "-o", folder))
    assert "4.2500 bits per weight" in shown
    assert str(folder) in shown
    return folder


def test_version(nybble_command: Run) -> None:
    assert succeed(nybble_command("--version")) == f"nybble {nybble.__version__}\n"


def test_help_names_every_verb(nybble_command: Run) -> None:
    shown = succeed(nybble_command("--help"))
    assert all(f"  {verb} " in shown for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_has_an_example_on_a_line_of_its_own(verb: str, nybble_command: Run) -> None:
    lines = [line.strip() for line in succeed(nybble_command(verb, "--help")).splitlines()]
    assert any(line.startswith(f"nybble {verb}") for line in lines)


def test_plan_shows_every_tensor_and_its_reason(nybble_command: Run) -> None:
    shown = succeed(nybble_command("plan", "--to", "int4:g64", "--keep", "wpe"))
    assert "kept by --keep wpe" in shown
    assert "tied with lm_head.weight" in shown
    facts = json.loads(succeed(nybble_command("plan", "--to", "int4:g64", "--keep", "wpe", "--json")))
    assert all(row["tensor"]["name"] in shown for row in facts["rows"])
    assert all(row["reason"] for row in facts["rows"])
    assert facts["notes"] == ["kept in float: transformer.wpe.weight"]


def test_inspect_shows_what_quantize_wrote(packed: Path, nybble_command: Run) -> None:
    for path in (packed, packed / "model.safetensors"):
        facts = json.loads(succeed(nybble_command("inspect", path, "--json")))
        assert facts["provenance"]["format"] == "int4:g64"
        assert facts["file_bytes"] == (packed / "model.safetensors").stat().st_size
        formats = {tensor["name"]: tensor["format"] for tensor in facts["tensors"]}
        assert formats["transformer.wte.weight"] == "int4:g64"
        assert formats["transformer.ln_f.weight"] == "F16"
    shown = succeed(nybble_command("inspect", packed))
    assert "packed by nybble" in shown
    assert "plan_hash" in shown


def test_inspect_imports_no_torch(packed: Path, python_script: Callable[..., str]) -> None:
    program = """
import sys
sys.argv = ["nybble", "inspect", sys.argv[1]]
from nybble.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
assert not {"torch", "transformers", "matplotlib"} & set(sys.modules), "inspect imported what it does not need"
"""
    assert "transformer.wte.weight" in python_script(program, packed)


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["quantize", "convert"])
def test_what_is_made_piece_by_piece_imports_no_torch(verb: str, tmp_path: Path, python_script: Callable[..., str]) -> None:
    """It would take longer to import than most models take to be rounded, and 200 MB."""
    words = {
        "quantize": ("MODEL", "--to", "int4:g64", "-o", "OUT"),
        "convert": ("MODEL", "OUT", "--to", "q8_0", "--file", "gguf"),
    }
    places = {"MODEL": str(demo.model_folder()), "OUT": str(tmp_path / "out")}
    program = "import sys; from nybble.cli import _run; _run(sys.argv[1:]); assert 'torch' not in sys.modules"
    python_script(program, verb, *(places.get(word, word) for word in words[verb]))
    assert (tmp_path / "out").exists()


def test_eval_gives_the_same_figures_as_json(packed: Path, nybble_command: Run) -> None:
    arguments = ("eval", packed, "--windows", "2", "--window", "128")
    facts = json.loads(succeed(nybble_command(*arguments, "--json")))
    assert facts["scored_tokens"] == 2 * 127
    assert facts["window"] == 128
    shown = succeed(nybble_command(*arguments))
    assert f"perplexity {facts['perplexity']:.4f}" in shown
    assert facts["engine"]["float"]["from_torch"]["p99"] < 1e-6
    assert facts["engine"]["float"]["quality"]["perplexity"] == pytest.approx(facts["perplexity"], rel=1e-5)
    added = facts["engine"]["int8_activations"]
    assert 0 < added["kl"]["mean"] < 0.0005
    assert added["difference"] is None  # needs the float model
    assert "int8 activations move the predictions of these weights by a KL of" in shown


@pytest.mark.slow
def test_eval_against_the_float_model(packed: Path, nybble_command: Run) -> None:
    arguments = ("eval", packed, "--windows", "2", "--window", "128", "--reference", demo.model_folder())
    facts = json.loads(succeed(nybble_command(*arguments, "--json")))
    assert 0.001 < facts["kl_mean"] < 0.2
    assert facts["notes"] == []
    exact, rounded = (facts["engine"][mode]["quality"]["kl_mean"] for mode in ("float", "int8"))
    assert exact == pytest.approx(facts["kl_mean"], rel=1e-3)
    assert facts["engine"]["int8_activations"]["difference"]["mean"] == pytest.approx(rounded - exact, abs=1e-9)
    without = json.loads(succeed(nybble_command(*arguments, "--activations", "none", "--json")))
    assert without["engine"] is None
    assert without["kl_mean"] == pytest.approx(facts["kl_mean"], rel=1e-6)


def test_a_closed_pipe_is_no_error(environment: dict[str, str]) -> None:
    """`nybble plan | head -1`: the reader goes away before everything is written."""
    command = [sys.executable, "-m", "nybble", "plan", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    with process.stderr:
        assert process.stderr.read() == ""
    assert process.wait(60) in (0, 1, 141)


def test_the_plan_is_what_quantize_carries_out(packed: Path, nybble_command: Run) -> None:
    planned = json.loads(succeed(nybble_command("plan", demo.model_folder(), "--to", "int4:g64", "--json")))
    written = json.loads(succeed(nybble_command("inspect", packed, "--json")))
    assert re.fullmatch("[0-9a-f]{64}", planned["hash"])
    assert planned["hash"] == written["provenance"]["plan_hash"]
    becomes = {row["tensor"]["name"]: row["format"] for row in planned["rows"] if row["format"]}
    assert becomes == {tensor["name"]: tensor["format"] for tensor in written["tensors"] if ":" in tensor["format"]}
    assert planned["bytes"] == written["bytes"]


def test_inspect_of_a_float_folder(nybble_command: Run) -> None:
    facts = json.loads(succeed(nybble_command("inspect", demo.model_folder(), "--json")))
    assert facts["kind"] == "gpt2 model, floats"
    assert {tensor["format"] for tensor in facts["tensors"]} == {"F16"}
    assert facts["bits_per_weight"] == 16
    assert facts["bytes"] < facts["file_bytes"] < facts["bytes"] + 20_000


def commands_of_the_readme() -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.startswith("nybble ")]


def test_the_readme_shows_commands() -> None:
    shown = {shlex.split(line)[1] for line in commands_of_the_readme()}
    assert shown == set(VERBS)


@pytest.mark.parametrize("line", commands_of_the_readme())
def test_a_command_of_the_readme_exists(line: str) -> None:
    """Its verb and every option of it are those of the program, and it parses; nothing is run."""
    verb, *words = shlex.split(line, comments=True)[1:]
    command = get_command(make_app()).commands[verb]  # type: ignore[attr-defined]
    options = {name for parameter in command.params for name in parameter.opts if name.startswith("-")}
    assert {word for word in words if word.startswith("-")} <= options
    assert command.make_context(verb, words).args == []
