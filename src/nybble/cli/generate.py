"""`nybble generate`: text from a model folder, float or quantized, by the engine. Imports no torch unless asked to."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from nybble.engine.sampling import Sampling

NAME = "generate"
HELP = """Continue a prompt with a model folder, float or quantized. The text appears as it is written.

\b
nybble generate model-int4 "Once upon a time"
nybble generate model-int4 "def main(" --top-k 40 --seed 1 --stop "def "
nybble generate model-int4 --prompt-file notes.txt --new-tokens 200 --json
nybble generate model-int4 --batch prompts.txt --json        one prompt a line

Without --temperature the likeliest token is taken, or, where --top-k, --top-p or --min-p say what to choose from,
one is drawn at temperature 1.
"""

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""A text may hold escape sequences: they stay off a terminal."""


TOGETHER = 16
"""Prompts of a batch that are decoded together: more need much memory for their keys and values, and gain little."""


@dataclass
class Continuation:
    """What was added to one prompt, with the keys of --json."""

    prompt: str
    text: str = ""
    """Ends before a stop string."""
    ids: list[int] = field(default_factory=list)
    """All new ids, those of the stop string or the end token too."""
    seconds: float = 0.0
    """From the prompt's ids to the last new one, the model loaded; of a batch: for all that are decoded together."""
    tokens_per_second: float = 0.0
    """New tokens over seconds; of a batch: those of all that are decoded together."""
    first_token_seconds: float | None = None
    """None in a batch."""
    stopped_by: str = "length"
    """length, end token, or stop string."""


@dataclass(frozen=True)
class Settings:
    """How to continue, checked."""

    sampling: Sampling
    new_tokens: int
    seed: int
    stops: tuple[str, ...]


class Writer:
    """A loaded model that continues prompts."""

    def __init__(self, folder: Path, settings: Settings, threads: int | None, exact: bool, cache: str | None) -> None:
        """Raises InputError for a model that the engine does not know, and for a folder without a tokenizer."""
        from nybble.engine import Decoder
        from nybble.engine.text import TextCodec
        from nybble.errors import FileFormatError, InputError

        start = time.perf_counter()
        self.settings, self.codec = settings, TextCodec.load(folder)
        try:
            self.decoder = Decoder.load(folder, threads=threads, exact=exact, cache=cache)
        except FileFormatError:
            raise
        except InputError as error:  # the folder as such was checked: it is the engine that does not know this model
            if "--runtime torch" in str(error):  # it says so itself
                raise
            raise InputError(f"{error}; --runtime torch tries it with transformers") from error
        self.load_seconds = time.perf_counter() - start

    def continue_one(self, prompt: str, write: Callable[[str], None]) -> Continuation:
        """Prompt and continuation go to `write` piece by piece; nothing before the first token is there."""
        ids, done = self._encode(prompt), Continuation(prompt)
        start = time.perf_counter()
        tokens = self.decoder.stream(ids, self.settings.new_tokens, **vars(self.settings.sampling), seed=self.settings.seed)
        try:
            for piece in self._pieces(ids, tokens, done):
                if done.first_token_seconds is None:
                    done.first_token_seconds = time.perf_counter() - start
                    write(prompt)
                write(piece)
        finally:
            if done.ids:  # also when interrupted: the shell goes on at the left
                write("\n")
        done.seconds = time.perf_counter() - start
        done.tokens_per_second = len(done.ids) / done.seconds
        return done

    def continue_all(self, prompts: list[str]) -> Iterator[list[Continuation]]:
        """Prompts in groups that are decoded together."""
        from nybble.errors import InputError

        all_ids, settings, context = [self._encode(prompt) for prompt in prompts], self.settings, self.decoder.context
        for number, ids in enumerate(all_ids, 1):  # all before the first is begun
            if len(ids) + settings.new_tokens > context:
                raise InputError(
                    f"prompt {number} of {len(prompts)} has {len(ids)} tokens, with {settings.new_tokens} new ones more than the "
                    f"model's context of {context}; shorten it or ask for fewer"
                )
        for first in range(0, len(prompts), TOGETHER):
            start, group = time.perf_counter(), slice(first, first + TOGETHER)
            seed = settings.seed + first  # text i is drawn with seed + i
            all_new = self.decoder.generate_batch(all_ids[group], settings.new_tokens, **vars(settings.sampling), seed=seed)
            seconds = time.perf_counter() - start
            rate = sum(map(len, all_new)) / seconds
            done = [Continuation(prompt, seconds=seconds, tokens_per_second=rate) for prompt in prompts[group]]
            for each, ids, new in zip(done, all_ids[group], all_new, strict=True):
                list(self._pieces(ids, new, each))
            yield done

    def summary(self, done: list[Continuation]) -> str:
        """One line about the speed."""
        first, decoder, count = done[0], self.decoder, sum(len(each.ids) for each in done)
        if first.first_token_seconds is None:
            seconds = sum(each.seconds for each in done[::TOGETHER])  # one of each group
            what, ended = f"{len(done)} prompts, {count} tokens in {seconds:.3f} s", ""
        else:
            seconds = first.seconds
            what = f"{count} tokens in {seconds:.3f} s, the first after {first.first_token_seconds:.3f} s"
            ended = f", ended by {first.stopped_by}"
        how = f"{decoder.threads} thread{'s' if decoder.threads > 1 else ''}"
        mode = "exact" if decoder.exact else "activations in int8"
        loaded = f"cache {decoder.cache}; loaded in {self.load_seconds:.2f} s"
        return f"{what}: {count / seconds:.1f} tokens/s{ended} ({how}, {mode}, {loaded})"

    def _encode(self, prompt: str) -> list[int]:
        from nybble.errors import InputError

        ids = self.codec.encode(prompt)
        if not ids:
            raise InputError("the prompt is empty; give at least one word to continue")
        return ids

    def _pieces(self, prompt: list[int], tokens: Iterable[int], done: Continuation) -> Iterator[str]:
        """Text of tokens as they come, until they end or a stop string comes; fills in `done`."""
        from nybble.engine.stopping import StopStrings
        from nybble.engine.text import Detokenizer

        detokenizer, stopping = Detokenizer(self.codec, prompt), StopStrings(self.settings.stops)
        for token in tokens:
            done.ids.append(token)
            piece = stopping.feed(detokenizer.feed(token))
            done.text += piece
            yield piece
            if stopping.stopped_by is not None:
                done.stopped_by = "stop string"
                return
        rest = stopping.feed(detokenizer.finish()) + stopping.finish()
        done.text += rest
        if stopping.stopped_by is not None:
            done.stopped_by = "stop string"
        elif done.ids[-1] in self.decoder.end_tokens:
            done.stopped_by = "end token"
        yield rest


def run(
    model: Annotated[str, typer.Argument(help="Model folder or hub name.")],
    prompt: Annotated[str | None, typer.Argument(help="The text to continue.")] = None,
    prompt_option: Annotated[str | None, typer.Option("--prompt", help="The same as an option.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="Read the prompt from a file, - for standard input; one line end at its end is dropped.")
    ] = None,
    batch: Annotated[Path | None, typer.Option(help="Continue every line of a file, all together.")] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens to add at most.")] = 50,
    temperature: Annotated[float | None, typer.Option(help="0 takes the likeliest token, 1 draws as the model says.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw among this many likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw among the fewest tokens with this share of probability.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Draw among tokens at least this share as likely as the likeliest.")] = None,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 makes tokens rarer that came before.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the drawing.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="End the text before this string. Repeatable.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default all cores.")] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Keep activations in float; slower.")] = False,
    cache: Annotated[
        str | None, typer.Option(help="f32, f16, int16, int8, int4 keys and values; default int16, exact f32.")
    ] = None,
    runtime: Annotated[str, typer.Option(help="engine, or torch for models that the engine lacks.")] = "engine",
    as_json: Annotated[bool, typer.Option("--json", help="Text, ids and timing as JSON; a line a prompt with --batch.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Show the speed on standard error, also without a terminal.")] = False,
) -> None:
    """Check, load, write."""
    if runtime == "engine":  # numpy's own threads are not used here, and cost 10 ms to start
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from nybble.containers import open_contents
    from nybble.engine.decoder import CACHES
    from nybble.engine.stopping import StopStrings
    from nybble.errors import InputError, UsageError, unknown_name
    from nybble.models.checkpoint import is_causal
    from nybble.models.hub import resolve

    if runtime not in ("engine", "torch"):
        raise unknown_name("runtime", runtime, ("engine", "torch"))
    if new_tokens < 1:
        raise UsageError(f"--new-tokens {new_tokens}: at least 1 is needed")
    if runtime == "torch":
        others: dict[str, object] = {
            "--batch": batch,
            "--temperature": temperature,
            "--top-p": top_p,
            "--min-p": min_p,
            "--stop": stop,
        }
        others |= {"--threads": threads, "--exact": exact or None, "--cache": cache, "--json": as_json or None}
        given = [name for name, value in others.items() if value is not None]
        if given or repetition_penalty != 1.0:
            unknown = ", ".join(given) or "--repetition-penalty"
            raise UsageError(f"--runtime torch knows only --new-tokens, --top-k and --seed, not {unknown}")
    sampling = _sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    settings = Settings(sampling, new_tokens, seed, tuple(stop or ()))
    StopStrings(settings.stops)  # these two before a model is fetched for them
    if cache is not None and cache not in CACHES:
        raise unknown_name("cache", cache, CACHES)
    prompts = _prompts(prompt, prompt_option, prompt_file, batch)
    folder = resolve(model, download=True)
    if not is_causal(open_contents(folder).config):
        raise InputError(f"{folder} does not predict the next token, so it cannot continue a text")
    if runtime == "torch":
        typer.echo(_with_torch(folder, prompts[0], settings))
        return
    writer = Writer(folder, settings, threads, exact, cache)
    done: list[Continuation] = []
    if batch is not None:
        for group in writer.continue_all(prompts):
            for each in group:
                gap = "\n" if done else ""
                _write(f"{json.dumps(vars(each))}\n" if as_json else f"{gap}{each.prompt}{each.text}\n")
                done.append(each)
    else:
        done.append(writer.continue_one(prompts[0], _drop if as_json else _write))
        if as_json:
            typer.echo(json.dumps(vars(done[0])))
    if stats or sys.stderr.isatty():
        typer.echo(writer.summary(done), err=True)


def _sampling(
    temperature: float | None, top_k: int | None, top_p: float | None, min_p: float | None, repetition_penalty: float
) -> Sampling:
    """The settings of the options, None where one was not given."""
    from nybble.engine.sampling import Sampling
    from nybble.errors import UsageError

    cuts = {"--top-k": top_k, "--top-p": top_p, "--min-p": min_p}
    given = [f"{name} {value}" for name, value in cuts.items() if value is not None]
    if temperature == 0.0 and given:
        raise UsageError(f"--temperature 0 takes the likeliest token, so {', '.join(given)} would do nothing; leave one out")
    if top_k == 0:
        raise UsageError("--top-k 0 leaves no token; give at least 1, or leave it out to draw among all")
    return Sampling(
        temperature=temperature if temperature is not None else 1.0 if given else 0.0,
        top_k=top_k if top_k is not None else 0,
        top_p=top_p if top_p is not None else 1.0,
        min_p=min_p if min_p is not None else 0.0,
        repetition_penalty=repetition_penalty,
    )


def _prompts(prompt: str | None, option: str | None, file: Path | None, batch: Path | None) -> list[str]:
    """The prompt, or the lines of `batch`, from the one place that was given."""
    from nybble.errors import InputError, UsageError

    places = {"PROMPT": prompt, "--prompt": option, "--prompt-file": file, "--batch": batch}
    given = [name for name, value in places.items() if value is not None]
    if len(given) != 1:
        found = f"{' and '.join(given)} give more than one prompt" if given else "there is no prompt"
        raise UsageError(f'{found}; give it once: nybble generate MODEL "PROMPT", --prompt-file FILE or --batch FILE')
    if batch is not None:
        lines = _read(batch).removesuffix("\n").split("\n")
        empty = [str(number) for number, line in enumerate(lines, 1) if not line.strip()]
        if empty:
            raise InputError(f"{batch}: the prompt of line {empty[0]} is empty; give at least one word to continue on every line")
        return [line.removesuffix("\r") for line in lines]
    if file is not None:
        return [_read(file).removesuffix("\n").removesuffix("\r")]
    return [str(prompt if prompt is not None else option)]


def _read(path: Path) -> str:
    """The text of a UTF-8 file, or of standard input for `-`."""
    from nybble.errors import InputError

    name = "standard input" if str(path) == "-" else str(path)
    try:
        return (sys.stdin.buffer.read() if name == "standard input" else path.read_bytes()).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8 (byte {error.start}); convert it first") from error
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the prompt from {name}: {getattr(error, 'strerror', None) or error}") from error


def _drop(piece: str) -> None:
    """Nowhere: the text is shown when it is complete."""


def _write(piece: str) -> None:
    """To standard output at once."""
    sys.stdout.write(_shown(piece))
    sys.stdout.flush()


def _shown(text: str) -> str:
    """Text as standard output can take it."""
    if sys.stdout.isatty():
        text = CONTROL.sub("\ufffd", text)
    encoding = sys.stdout.encoding or "utf-8"
    return text if encoding.lower() == "utf-8" else text.encode(encoding, "replace").decode(encoding)


def _with_torch(folder: Path, prompt: str, settings: Settings) -> str:
    """Prompt and continuation by transformers."""
    from nybble.containers import open_contents
    from nybble.containers.contents import check_texts

    check_texts(open_contents(folder))
    from nybble.evaluate.speed import greedy_text, top_k_text
    from nybble.quantized import load, load_tokenizer

    tokenizer, model = load_tokenizer(folder), load(folder).model()
    if settings.sampling.greedy:
        return prompt + greedy_text(model, tokenizer, prompt, settings.new_tokens)
    return prompt + top_k_text(model, tokenizer, prompt, settings.new_tokens, settings.seed, settings.sampling.top_k)
