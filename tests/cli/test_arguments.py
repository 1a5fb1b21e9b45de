"""Plain command lines read without typer: the same arguments, or none at all."""

from __future__ import annotations

import functools
import importlib
import shlex
import subprocess
import sys
from collections.abc import Callable
from typing import Annotated, Any

import pytest
import typer

from nybble.cli import VERBS, arguments


def by_typer(name: str, words: list[str]) -> dict[str, Any]:
    """What typer calls the verb with."""
    verb = importlib.import_module(f"nybble.cli.{name}")
    taken: dict[str, Any] = {}

    @functools.wraps(verb.run)
    def record(**values: Any) -> None:
        taken.update(values)

    app = typer.Typer(add_completion=False)
    app.callback()(lambda: None)
    app.command(name)(record)
    app(args=[name, *words], standalone_mode=False)
    return taken


def by_us(name: str, words: list[str]) -> dict[str, Any] | None:
    return arguments.read(importlib.import_module(f"nybble.cli.{name}").run, words)


PLAIN = (
    "compare",
    "compare m --text a.txt --variants int4:g64,nf4:g64,dq -o out --force --threads 2 --keep wpe --keep lm_head",
    "compare --rule 'mlp=int8' --windows 3 --json --shape=gpt2 --prompt ''",
    "report results.jsonl",
    "report results.jsonl --output page.html",
    "quantize m --to int4 -o out",
    "quantize -o out m --method rtn:mse --calibrate text.txt --force",
    "plan",
    "plan m --to=int4:g64 --json",
    "formats int4:g64 nf4,dq q4_k",
    "formats fp16 -o levels.svg fp32 --json",
    "inspect m",
    "inspect m/model.safetensors --json",
    "eval m --text t.txt --window 512 --stride 256 --protocol stride",
    "generate m 'Once upon a time'",
    "generate m --prompt 'a = b' --stop x --stop 'y z' --top-k 40 --top-p 0.95 --min-p 0 --temperature 1 --seed -3",
    "generate m --prompt-file - --new-tokens 5 --repetition-penalty 1.25 --exact --cache int8 --json --stats",
    "generate m '' --temperature -0.5",
    "generate m a --seed 1 --seed 2",
    "bench --shape gpt2 --formats int4:g32 --against torch,llama.cpp --threads 2 --json",
)


@pytest.mark.parametrize("line", PLAIN)
def test_the_same_arguments_as_typer_reads(line: str) -> None:
    name, *words = shlex.split(line)
    read, wanted = by_us(name, words), by_typer(name, words)
    assert read == wanted
    assert {key: type(value) for key, value in read.items()} == {key: type(value) for key, value in wanted.items()}


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_can_be_read(name: str) -> None:
    """None of them has an option that typer alone can carry out: it would be slow to start."""
    required = {
        "report": ["r"],
        "quantize": ["m", "-o", "out"],
        "prune": ["m", "-o", "out"],
        "inspect": ["m"],
        "convert": ["m", "out"],
        "eval": ["m"],
        "generate": ["m"],
    }
    assert by_us(name, required.get(name, [])) is not None


LEFT_TO_TYPER = (
    "generate --help",
    "generate m -h",
    "generate",
    "generate m a b",
    "generate m --seed",
    "generate m --seed one",
    "generate m --seed 1.5",
    "generate m --seed 1_000",
    "generate m --seed ' 1'",
    "generate m --temperature nan",
    "generate m --temperature 1e-3",
    "generate m --prompt --json",
    "generate m --json=1",
    "generate m --new_tokens 5",
    "generate m --new-token 5",
    "generate -- m a",
    "quantize m",
    "quantize m -oout",
)


@pytest.mark.parametrize("line", LEFT_TO_TYPER)
def test_what_is_left_to_typer(line: str) -> None:
    name, *words = shlex.split(line)
    assert by_us(name, words) is None


def plain(x: Annotated[int, typer.Option(help="A number.")] = 1) -> None:
    pass


def bounded(x: Annotated[int, typer.Option(min=2)] = 2) -> None:
    pass


def from_environment(x: Annotated[int, typer.Option(envvar="X")] = 2) -> None:
    pass


def switch(x: Annotated[bool, typer.Option()] = True) -> None:
    pass


def either(x: Annotated[int | str, typer.Option()] = 1) -> None:
    pass


def bare(x: int = 1) -> None:
    pass


@pytest.mark.parametrize("run", [bounded, from_environment, switch, either, bare])
def test_options_that_only_typer_can_carry_out(run: Callable[..., None]) -> None:
    assert arguments.read(run, []) is None
    assert arguments.read(plain, ["--x", "3"]) == {"x": 3}


def test_pydantic_is_not_imported(environment: dict[str, str]) -> None:
    program = """
import sys
sys.argv = ["nybble", "inspect", "/no/such/folder"]
from nybble.cli import main
try:
    main()
except SystemExit as end:
    assert end.code == 1, end.code
assert "pydantic" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("nybble: error: no model /no/such/folder")
