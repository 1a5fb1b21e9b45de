"""A model, ready to decode: logits and generation from token ids. No torch, no transformers.

    d = Decoder.load("model-int4", threads=2)
    d.generate([464, 2068, 7586], max_new_tokens=50)

Two modes. Fast, the default: activations are rounded to int8 in blocks of 32 values wherever the weight has codes. Exact:
activations stay float32 and the logits are those of the decoded weights to float32 rounding. A text's logits depend on that
text alone, to the bit: not on threads, on what else is in the batch, or on how the prompt was cut.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nybble import kernels
from nybble.containers import Contents, open_contents
from nybble.engine.program import Linear, Program, make_program
from nybble.engine.runner import MOST_ROWS, Runner, make_runner
from nybble.engine.sampling import Sampling, choose
from nybble.engine.weights import Weights
from nybble.errors import InputError, NumericError, NybbleError, UsageError, unknown_name
from nybble.files.json_strict import parse_object
from nybble.models.arch import table_for

CACHES = ("f32", "f16", "int16", "int8", "int4")
"""What keys and values may be held in."""
MOST_THREADS = 256
MARGIN = 64
"""Room is made for so many positions at a time."""

Logits = NDArray[np.float32]


class Decoder:
    """A loaded model. Not for two threads at once: it holds one cache."""

    def __init__(
        self,
        program: Program,
        runner: Runner,
        weights: Weights,
        *,
        threads: int,
        exact: bool,
        cache: str,
        context: int,
        end_tokens: tuple[int, ...],
    ) -> None:
        self.vocabulary = program.vocabulary
        self.context = context
        """Positions that a text may have, prompt and new tokens together."""
        self.end_tokens = end_tokens
        """Ids that end a text."""
        self.threads, self.exact, self.cache = threads, exact, cache
        self._program, self._runner, self._weights = program, runner, weights
        self._room = (0, 0)

    @classmethod
    def load(
        cls,
        path: str | Path,
        threads: int | None = None,
        exact: bool = False,
        cache: str | None = None,
        context: int | None = None,
    ) -> Decoder:
        """A model that any container holds: a folder that nybble or another tool wrote, float or quantized, or a GGUF file.

        `threads`: all processors that this process may use, unless given. `exact`: float activations. `cache`: what keys and
        values are held in, f32, f16, int16, int8 or int4 (int16, or f32 when exact); int16 also multiplies whole numbers, which
        is the fastest. `context`: fewer positions than the model has.
        Raises UsageError for arguments out of range, InputError for a model that cannot be decoded, FileFormatError for a
        broken file.
        """
        threads = _whole("threads", threads if threads is not None else len(_processors()), 1, MOST_THREADS)
        cache = cache or ("f32" if exact else "int16")
        if cache not in CACHES:
            raise unknown_name("cache", cache, CACHES)
        contents = open_contents(path)
        table = table_for(str(contents.config.get("model_type")))
        prefix = f"{table.block.split('.')[0]}." if table.block else ""
        weights = Weights(contents, prefix)
        program = make_program(contents.config, weights.shape_of)
        context = program.context if context is None else _whole("context", context, 1, program.context)
        ends = _end_tokens(contents, program.vocabulary)
        try:
            runner = make_runner(program, weights, threads, exact, cache)
        except ValueError as error:  # of the C++ side: matrices that do not fit each other
            if isinstance(error, NybbleError):
                raise
            raise InputError(f"{contents.path} is no model that can run: {error}") from error
        return cls(program, runner, weights, threads=threads, exact=exact, cache=cache, context=context, end_tokens=ends)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all matrices as they are in memory."""
        return sum(laid.nbytes for laid in self._weights.laid.values())

    @property
    def token_bytes(self) -> int:
        """Bytes of weights that one new token reads: every matrix that is multiplied, once."""
        names = {m.name: m for o in self._program.operations if isinstance(o, Linear) for m in o.matrices}
        return sum(self._weights.matrix(matrix, 1).nbytes for matrix in names.values())

    @property
    def position_bytes(self) -> int:
        """Bytes that the cache takes for one position, which every later token reads."""
        self._make_room(1, 1)
        return self._runner.position_bytes

    def logits(self, ids: Sequence[int]) -> Logits:
        """float32 [T, vocabulary]: the logits behind every id. Raises InputError for ids or lengths that do not fit."""
        tokens = self._checked(ids, 0)
        self._make_room(1, len(tokens))
        out = np.empty((len(tokens), self.vocabulary), dtype=np.float32)
        for start in range(0, len(tokens), MOST_ROWS):
            part = tokens[start : start + MOST_ROWS]
            places = np.arange(start, start + len(part))
            out[start : start + len(part)] = self._runner.run(part, places, np.zeros_like(places), np.arange(len(part)))
        return out

    def prefill(self, ids: Sequence[int]) -> Logits:
        """float32 [vocabulary]: the logits behind the last id."""
        tokens = self._checked(ids, 0)
        self._make_room(1, len(tokens))
        return self._read([tokens])[0]

    def generate(
        self,
        ids: Sequence[int],
        max_new_tokens: int = 50,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop_tokens: Sequence[int] | None = None,
    ) -> list[int]:
        """The new ids; the one that ended the text is the last. See `stream`."""
        how = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
        return list(self._stream(ids, max_new_tokens, how, seed, stop_tokens))

    def stream(
        self,
        ids: Sequence[int],
        max_new_tokens: int = 50,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop_tokens: Sequence[int] | None = None,
    ) -> Iterator[int]:
        """New ids as they come, at most `max_new_tokens`. Temperature 0 takes the likeliest; `sampling.py` says what the
        others mean. `stop_tokens`: ids that end the text (`end_tokens` unless given; `()` for none).

        Raises InputError when prompt and new tokens exceed the context, UsageError for settings out of range, NumericError
        when logits are not finite.
        """
        return self._stream(
            ids, max_new_tokens, Sampling(temperature, top_k, top_p, min_p, repetition_penalty), seed, stop_tokens
        )

    def generate_batch(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int = 50,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop_tokens: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """The new ids of each prompt, all decoded together; prompts may differ in length.

        Each text is what `generate` gives for it alone (text i with seed + i). Errors as for `stream`.
        """
        how = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
        new = _whole("max_new_tokens", max_new_tokens, 1, self.context)
        texts = [self._checked(ids, new) for ids in prompts]
        if not texts:
            return []
        stops = self._stops(stop_tokens)
        chosen: list[list[int]] = [[] for _ in texts]
        draws = [random.Random(seed + i) for i in range(len(texts))]
        self._make_room(len(texts), max(map(len, texts)) + new)
        rows, active = self._read(texts), list(range(len(texts)))
        while active:
            for row, i in zip(rows, active, strict=True):
                chosen[i].append(self._choose(row, how, texts[i], chosen[i], draws[i]))
            active = [i for i in active if len(chosen[i]) < new and chosen[i][-1] not in stops]
            if active:
                rows = self._step([chosen[i][-1] for i in active], [len(texts[i]) + len(chosen[i]) - 1 for i in active], active)
        return chosen

    def _stream(
        self, ids: Sequence[int], max_new_tokens: int, how: Sampling, seed: int, stop_tokens: Sequence[int] | None
    ) -> Iterator[int]:
        new = _whole("max_new_tokens", max_new_tokens, 1, self.context)
        prompt, stops, draw = self._checked(ids, new), self._stops(stop_tokens), random.Random(seed)
        self._make_room(1, len(prompt) + new)

        def tokens() -> Iterator[int]:
            row, chosen = self._read([prompt])[0], list[int]()
            while True:
                chosen.append(self._choose(row, how, prompt, chosen, draw))
                yield chosen[-1]
                if len(chosen) == new or chosen[-1] in stops:
                    return
                row = self._step([chosen[-1]], [len(prompt) + len(chosen) - 1], [0])[0]

        return tokens()

    def _choose(self, row: Logits, how: Sampling, prompt: NDArray[np.int64], chosen: list[int], draw: random.Random) -> int:
        native = kernels.native()
        if how.greedy and how.repetition_penalty == 1.0:
            best = np.empty(1, dtype=np.int64)
            if native is not None:
                native.best(row[None], best)
            else:
                best[0] = row.argmax() if np.isfinite(row).all() else -1
            if best[0] < 0:
                raise self._not_finite()
            return int(best[0])
        history = np.unique(np.concatenate([prompt, np.array(chosen, dtype=np.int64)]))
        u = draw.random()
        if native is None:
            return choose(row, history, how, u)
        if not np.isfinite(row).all():
            raise self._not_finite()
        settings = (how.temperature, how.top_k, how.top_p, how.min_p, how.repetition_penalty)
        return int(native.choose(row, history, *settings, u))

    def _not_finite(self) -> NumericError:
        return NumericError(
            f"the logits are not finite; the weights may be broken, or the {self.cache} cache overflows (try f32)"
        )

    def _read(self, texts: list[NDArray[np.int64]]) -> Logits:
        """Run prompts, text i as sequence i; the logits behind the last id of each, [texts, vocabulary]."""
        tokens = np.concatenate(texts)
        places = np.concatenate([np.arange(len(text)) for text in texts])
        sequences = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
        last = np.cumsum([len(text) for text in texts]) - 1
        out = []
        for start in range(0, len(tokens), MOST_ROWS):
            part = slice(start, start + MOST_ROWS)
            wanted = last[(last >= start) & (last < start + MOST_ROWS)] - start
            out.append(self._runner.run(tokens[part], places[part], sequences[part], wanted))
        return np.concatenate(out)

    def _step(self, tokens: list[int], positions: list[int], sequences: list[int]) -> Logits:
        """One more token of some sequences, ascending: [tokens, vocabulary]."""
        t, p, s = (np.array(values, dtype=np.int64) for values in (tokens, positions, sequences))
        pieces = [slice(start, start + MOST_ROWS) for start in range(0, len(tokens), MOST_ROWS)]
        parts = [self._runner.run(t[part], p[part], s[part], np.arange(len(t[part]))) for part in pieces]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _make_room(self, sequences: int, positions: int) -> None:
        positions = min(self.context, -(-positions // MARGIN) * MARGIN)
        if sequences > self._room[0] or positions > self._room[1]:
            self._room = (max(sequences, self._room[0]), max(positions, self._room[1]))
            self._runner.reserve(*self._room)

    def _stops(self, stop_tokens: Sequence[int] | None) -> frozenset[int]:
        return frozenset(self.end_tokens if stop_tokens is None else stop_tokens)

    def _checked(self, ids: Sequence[int], new: int) -> NDArray[np.int64]:
        """The ids as int64 [T]; InputError when they are not of the vocabulary or leave no room for `new` more."""
        try:
            tokens = np.asarray(ids)
            if tokens.size and tokens.dtype.kind not in "iu":
                raise ValueError(f"they are {tokens.dtype}")
            tokens = np.ascontiguousarray(tokens, dtype=np.int64)
        except (ValueError, OverflowError, TypeError) as error:
            raise InputError(f"ids must be whole numbers: {error}") from error
        if tokens.ndim != 1 or not len(tokens):
            raise InputError(
                f"ids have shape {tokens.shape}; give at least one id in a row (an empty prompt cannot be continued)"
            )
        wrong = (tokens < 0) | (tokens >= self.vocabulary)
        if wrong.any():
            at = int(np.argmax(wrong))
            raise InputError(f"id {int(tokens[at])} at position {at} is not of the vocabulary, 0 to {self.vocabulary - 1}")
        if len(tokens) + new > self.context:
            fix = f"shorten the prompt to {max(0, self.context - new)} tokens or ask for fewer" if new else "shorten it"
            also = f" and {new} new ones make {len(tokens) + new}," if new else " are"
            raise InputError(f"prompt of {len(tokens)} tokens{also} more than the context of {self.context}; {fix}")
        return tokens


def _whole(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise UsageError(f"{name} {value!r} is not a whole number from {low} to {high}")
    return value


def _processors() -> set[int] | range:
    """The processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return range(os.cpu_count() or 1)


def _end_tokens(contents: Contents, vocabulary: int) -> tuple[int, ...]:
    """Ids that end a text, by generation_config.json or config.json."""
    path = contents.path / "generation_config.json"
    stored = contents.extras.get("generation_config.json")
    generation = {} if stored is None else parse_object(stored, path)
    value = generation.get("eos_token_id", contents.config.get("eos_token_id"))
    ids = value if isinstance(value, list) else [value]
    return tuple(i for i in ids if type(i) is int and 0 <= i < vocabulary)
