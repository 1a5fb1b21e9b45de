"""`nybble generate`: the engine's text, streamed, in batches, as JSON; no torch."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from nybble import demo
from nybble.cli import generate
from nybble.engine import Decoder
from nybble.engine.sampling import Sampling
from nybble.engine.text import TextCodec
from nybble.errors import InputError

Run = Callable[..., CompletedProcess[str]]
PROMPT = "def main("
STORIES = Path(__file__).parents[3] / "shared" / "data" / "models" / "stories260k-llama"


def succeed(done: CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, nybble_command: Run) -> Path:
    """The model that ships, quantized."""
    folder = tmp_path_factory.mktemp("packed") / "m"
    succeed(nybble_command("quantize", demo.model_folder(), "--to", "int4:g32", "-o", folder))
    return folder


@pytest.fixture(scope="module")
def decoder(packed: Path) -> Decoder:
    return Decoder.load(packed)


@pytest.fixture(scope="module")
def codec(packed: Path) -> TextCodec:
    return TextCodec.load(packed)


def writer(folder: Path, stops: tuple[str, ...] = (), new_tokens: int = 20, **sampling: Any) -> generate.Writer:
    return generate.Writer(folder, generate.Settings(Sampling(**sampling), new_tokens, 0, stops), None, False, None)


# What it prints


def test_the_text_is_the_engines(packed: Path, decoder: Decoder, codec: TextCodec, nybble_command: Run) -> None:
    ids = codec.encode(PROMPT)
    new = decoder.generate(ids, max_new_tokens=20)
    text = codec.decode(ids + new)[len(PROMPT) :]
    done = nybble_command("generate", packed, PROMPT, "--new-tokens", "20")
    assert succeed(done) == f"{PROMPT}{text}\n"
    assert done.stderr == ""
    facts = json.loads(succeed(nybble_command("generate", packed, PROMPT, "--new-tokens", "20", "--json")))
    assert facts["ids"] == new
    assert (facts["prompt"], facts["text"], facts["stopped_by"]) == (PROMPT, text, "length")
    assert 0 < facts["first_token_seconds"] <= facts["seconds"]
    assert facts["tokens_per_second"] == pytest.approx(20 / facts["seconds"])


def test_a_float_folder_and_exact_mode(decoder: Decoder, nybble_command: Run) -> None:
    exact = Decoder.load(demo.model_folder(), exact=True)
    facts = json.loads(
        succeed(nybble_command("generate", demo.model_folder(), PROMPT, "--exact", "--cache", "f32", "--threads", "1", "--json"))
    )
    assert facts["ids"] == exact.generate(TextCodec.load(demo.model_folder()).encode(PROMPT), max_new_tokens=50)


@pytest.mark.skipif(not STORIES.is_dir(), reason=f"{STORIES} is not here")
def test_a_llama_keeps_the_space_before_the_first_new_word(nybble_command: Run) -> None:
    shown = succeed(nybble_command("generate", STORIES, "Once upon a", "--new-tokens", "12", "--exact"))
    assert shown.startswith("Once upon a time, there was")


def test_every_way_to_give_a_prompt(packed: Path, tmp_path: Path, nybble_command: Run, environment: dict[str, str]) -> None:
    wanted = succeed(nybble_command("generate", packed, PROMPT, "--new-tokens", "5"))
    assert succeed(nybble_command("generate", packed, "--prompt", PROMPT, "--new-tokens", "5")) == wanted
    (tmp_path / "prompt.txt").write_text(PROMPT + "\n")
    assert succeed(nybble_command("generate", packed, "--prompt-file", tmp_path / "prompt.txt", "--new-tokens", "5")) == wanted
    command = [sys.executable, "-m", "nybble", "generate", str(packed), "--prompt-file", "-", "--new-tokens", "5"]
    piped = subprocess.run(command, input=PROMPT, capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert succeed(piped) == wanted


def test_a_batch_gives_what_each_prompt_gives_alone(packed: Path, tmp_path: Path, nybble_command: Run) -> None:
    prompts = [PROMPT, "import os", "class A:\\n    x"] * 6  # more than are decoded together
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n")
    arguments = ("generate", packed, "--batch", tmp_path / "prompts.txt", "--new-tokens", "8")
    facts = [json.loads(line) for line in succeed(nybble_command(*arguments, "--json")).splitlines()]
    alone = writer(packed, new_tokens=8)
    assert [each["prompt"] for each in facts] == prompts
    assert [each["ids"] for each in facts] == [alone.continue_one(prompt, str).ids for prompt in prompts]
    assert {each["first_token_seconds"] for each in facts} == {None}
    shown = succeed(nybble_command(*arguments))
    assert shown == "\n".join(f"{each['prompt']}{each['text']}\n" for each in facts)


def test_a_seed_repeats_a_text_and_another_changes_it(packed: Path, nybble_command: Run) -> None:
    arguments = ("generate", packed, PROMPT, "--new-tokens", "12", "--top-k", "40")
    first = succeed(nybble_command(*arguments, "--seed", "1"))
    assert succeed(nybble_command(*arguments, "--seed", "1", "--temperature", "1")) == first
    assert succeed(nybble_command(*arguments, "--seed", "2")) != first
    assert succeed(nybble_command(*arguments, "--seed", "2", "--top-k", "1")) == succeed(nybble_command(*arguments[:5]))


def test_the_speed_is_shown_when_asked_for(packed: Path, tmp_path: Path, nybble_command: Run) -> None:
    done = nybble_command("generate", packed, PROMPT, "--new-tokens", "5", "--stats", "--threads", "1")
    assert succeed(done).startswith(PROMPT)
    (line,) = done.stderr.splitlines()
    for part in (
        "5 tokens in ",
        "the first after ",
        " tokens/s, ended by length",
        "1 thread,",
        "activations in int8",
        "cache int16",
    ):
        assert part in line
    (tmp_path / "prompts.txt").write_text("a\nb")
    done = nybble_command("generate", packed, "--batch", tmp_path / "prompts.txt", "--new-tokens", "5", "--stats", "--exact")
    (line,) = done.stderr.splitlines()
    assert "2 prompts, 10 tokens in " in line
    assert ", exact, cache f32" in line


# Where it ends


def test_a_stop_string_ends_the_text_before_it(packed: Path) -> None:
    whole = writer(packed).continue_one(PROMPT, str)
    stop = whole.text[4:6]
    done = writer(packed, ("never this", stop)).continue_one(PROMPT, str)
    assert done.text == whole.text[: whole.text.index(stop)]
    assert done.stopped_by == "stop string"
    assert len(done.ids) < len(whole.ids)
    assert done.ids == whole.ids[: len(done.ids)]


def test_a_stop_string_in_a_batch(packed: Path) -> None:
    stop = writer(packed).continue_one(PROMPT, str).text[4:6]
    alone = writer(packed, (stop,)).continue_one(PROMPT, str)
    ((done,),) = writer(packed, (stop,)).continue_all([PROMPT])
    assert (done.text, done.ids, done.stopped_by) == (alone.text, alone.ids, "stop string")


def test_the_end_token_ends_the_text_and_is_not_shown(packed: Path, tmp_path: Path) -> None:
    whole = writer(packed).continue_one(PROMPT, str)
    end = whole.ids[3]
    shutil.copytree(packed, tmp_path / "m")
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    done = writer(tmp_path / "m").continue_one(PROMPT, str)
    assert done.ids == whole.ids[: whole.ids.index(end) + 1]
    assert done.stopped_by == "end token"


# While it runs


def test_text_goes_out_token_by_token_after_the_prompt(packed: Path) -> None:
    pieces: list[str] = []
    done = writer(packed).continue_one(PROMPT, pieces.append)
    assert pieces[0] == PROMPT
    assert pieces[-1] == "\n"
    assert len(pieces) == 1 + len(done.ids) + 2
    assert "".join(pieces) == f"{PROMPT}{done.text}\n"


def test_nothing_goes_out_when_the_prompt_does_not_fit(packed: Path) -> None:
    pieces: list[str] = []
    with pytest.raises(InputError, match="context of 512"):
        writer(packed).continue_one("x = 1\n" * 400, pieces.append)
    with pytest.raises(InputError, match=r"prompt 2 of 3 has \d+ tokens.*context of 512"):
        list(writer(packed).continue_all(["a", "x = 1\n" * 400, "b"]))
    assert pieces == []


INTERRUPTED = """
import os, signal, sys
from nybble.engine import Decoder
real = Decoder.stream
def stream(self, *arguments, **settings):
    for count, token in enumerate(real(self, *arguments, **settings)):
        if count == 5:
            os.kill(os.getpid(), signal.SIGINT)
        yield token
Decoder.stream = stream
from nybble.cli import main
sys.argv[0] = "nybble"
main()
"""


def test_an_interrupt_ends_the_line(packed: Path, environment: dict[str, str]) -> None:
    command = [sys.executable, "-c", INTERRUPTED, "generate", str(packed), PROMPT]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert done.returncode == 130
    assert done.stdout.startswith(PROMPT)
    assert done.stdout.endswith("\n")
    assert len(done.stdout) > len(PROMPT) + 2
    assert done.stderr.splitlines() == ["nybble: error: interrupted; no half-written output was left behind"]


def test_a_closed_pipe_ends_it_quietly(packed: Path, environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "nybble", "generate", str(packed), PROMPT, "--new-tokens", "300"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    with process.stderr:
        assert process.stderr.read() == ""
    assert process.wait(60) in (1, 141)  # typer ends with 1 where the pipe breaks inside it


# Where it goes


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_escape_sequences_stay_off_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a\x1b[31m\tb\r\n\x9b c 👩‍🚀"
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert generate._shown(text) == "a\ufffd[31m\tb\ufffd\n\ufffd c 👩‍🚀"
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    assert generate._shown(text) == text
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert generate._shown("größer\n") == "gr??er\n"


def test_an_output_that_is_not_utf8(packed: Path, environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "nybble", "generate", str(packed), "# größer", "--new-tokens", "3"]
    done = subprocess.run(
        command, capture_output=True, env={**environment, "PYTHONIOENCODING": "ascii"}, timeout=60, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"# gr??er")


# What it needs


def test_it_imports_no_torch(packed: Path, python_script: Callable[..., str]) -> None:
    program = """
import sys
sys.argv = ["nybble", "generate", sys.argv[1], "def main(", "--new-tokens", "5", "--stats", "--top-k", "3"]
from nybble.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
heavy = {"torch", "transformers", "matplotlib", "huggingface_hub", "jinja2", "rich"} & set(sys.modules)
assert not heavy, f"generate imported what it does not need: {heavy}"
"""
    assert python_script(program, packed).startswith("def main(")


@pytest.mark.slow
def test_torch_continues_as_the_engine_does(nybble_command: Run) -> None:
    arguments = ("generate", demo.model_folder(), PROMPT, "--new-tokens", "12")
    shown = succeed(nybble_command(*arguments, "--runtime", "torch"))
    assert shown == succeed(nybble_command(*arguments, "--exact"))
    drawn = succeed(nybble_command(*arguments, "--runtime", "torch", "--top-k", "40", "--seed", "1"))
    assert drawn.startswith(PROMPT)
    assert drawn != shown
