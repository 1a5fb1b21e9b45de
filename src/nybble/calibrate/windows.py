"""Text to tokens to windows: what a perplexity is measured on, and which of its tokens are scored.

A perplexity means nothing without its protocol, so the three that we offer live here and nowhere else:

    paper       windows side by side, every target inside a window scored (the GPTQ and AWQ papers' way)
    llama.cpp   windows side by side, only targets after position L // 2 scored (llama.cpp's `perplexity` tool)
    stride      windows that overlap and advance by `stride`; every token scored once, in the window that gives it the
                longest context (the recipe in the Hugging Face documentation)

        paper       [. s s s s s s s][. s s s s s s s]        . = context only, s = scored target
        llama.cpp   [. . . . . s s s][. . . . . s s s]
        stride      [. s s s s s s s]
                            [. . . . s s s s]

Position 0 of a window is never scored: nothing precedes it. With a model whose tokenizer begins a text with a
begin-of-sequence token (bos), every window begins with it: for `paper` and `stride` it is put before L - 1 text tokens,
all of which can be scored; for `llama.cpp` it takes the place of the window's first token, as it does there (and the
text as a whole begins with one), so that the figures can be laid beside that tool's.

Left out: tokens that depend on a chat template, padding, and windows of unequal length. This module needs numpy only.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nybble.errors import InputError, UsageError, unknown_name

PROTOCOLS = ("paper", "llama.cpp", "stride")


@dataclass(frozen=True)
class Windows:
    """Token windows of one length, with the targets that count."""

    ids: NDArray[np.int64]
    """[windows, length] token ids, bos included where the model has one."""
    scored: NDArray[np.bool_]
    """[windows, length]; target t is scored when scored[w, t], predicted from ids[w, :t]. Column 0 is all False."""
    protocol: str
    """`paper`, `llama.cpp` or `stride`."""
    stride: int
    """Text tokens from the start of one window to that of the next (the last `stride` window may advance by less)."""
    bos: int | None
    """The id that begins every window, or None."""

    @property
    def length(self) -> int:
        """Tokens in a window."""
        return int(self.ids.shape[1])

    @property
    def scored_tokens(self) -> int:
        """How many targets are scored in all windows together."""
        return int(self.scored.sum())

    @property
    def sha256(self) -> str:
        """Hash of the ids and of what is scored: equal hashes mean comparable figures."""
        digest = hashlib.sha256(repr(self.ids.shape).encode())
        digest.update(np.ascontiguousarray(self.ids, dtype="<i8").tobytes())
        digest.update(np.ascontiguousarray(self.scored, dtype=np.uint8).tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return int(self.ids.shape[0])


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file: its documents (`read_documents`) joined by an empty line."""
    return "\n\n".join(read_documents(path))


def read_documents(path: str | Path) -> list[str]:
    """The documents of a UTF-8 file, line ends as they are.

    `.jsonl` gives the key "text" of every line, `.json` a list of strings, any other file is one document. Raises InputError
    when the path is missing, a folder, empty (or white space only), not UTF-8, or not the JSON described.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"text {path} is a folder; name a file")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise InputError(f"text {path} does not exist") from error
    except UnicodeDecodeError as error:
        raise InputError(f"text {path} is not UTF-8 (byte {error.start}); convert it first") from error
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read text {path}: {getattr(error, 'strerror', None) or error}") from error
    documents = [text]
    if path.suffix == ".jsonl":
        # Split at line feeds only: str.splitlines would cut inside strings that hold U+2028 or U+0085.
        lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
        documents = [_text_of_line(path, i, line) for i, line in lines]
    elif path.suffix == ".json":
        documents = _parse_json(text, f"text {path}")
        if not isinstance(documents, list) or not all(isinstance(part, str) for part in documents):
            raise InputError(f"text {path} must hold a JSON list of strings")
    if not any(document.strip() for document in documents):
        raise InputError(f"text {path} is empty; quality is measured on a text of at least one window")
    return documents


def _text_of_line(path: Path, number: int, line: str) -> str:
    entry = _parse_json(line, f"text {path}, line {number}")
    if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
        raise InputError(f'text {path}, line {number}: expected an object with a string under "text"')
    return str(entry["text"])


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON: {error}") from error


def encode(tokenizer: Any, text: str) -> tuple[NDArray[np.int64], int | None]:
    """Token ids of a text (int64 [T], no special tokens added) and the model's bos id, or None where it uses none.

    `tokenizer` is a Hugging Face tokenizer. bos is None unless the tokenizer itself begins a text with it, whatever the
    model's configuration names. Raises InputError when the tokenizer fails or makes no token of the text.
    """
    ids = tokenize(tokenizer, text, special_tokens=False)
    probe = tokenize(tokenizer, "a", special_tokens=True)
    if not ids:
        raise InputError(f"the tokenizer makes no token of the text ({len(text)} characters); give more text")
    bos = getattr(tokenizer, "bos_token_id", None)
    begins = bos is not None and len(probe) > 0 and probe[0] == bos
    return np.asarray(ids, dtype=np.int64), (int(bos) if begins and bos is not None else None)


def tokenize(tokenizer: Any, text: str, special_tokens: bool) -> list[int]:
    """Ids of a text by a Hugging Face tokenizer, however long. InputError when it fails on the text."""
    try:
        # verbose=False: no warning that the text is longer than the model's context; whoever asks cuts it.
        return [int(i) for i in tokenizer(text, add_special_tokens=special_tokens, verbose=False)["input_ids"]]
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:  # a panic in the Rust tokenizers derives from BaseException, not from Exception
        message = " ".join(str(error).split())[:200] or "no message"
        raise InputError(f"the tokenizer failed on the text ({type(error).__name__}: {message})") from error


def token_windows(
    ids: NDArray[np.int64],
    length: int,
    count: int | None = None,
    bos: int | None = None,
    protocol: str = "paper",
    stride: int | None = None,
) -> Windows:
    """Cut text ids (int64 [T], without special tokens) into windows of `length` tokens by one of PROTOCOLS.

    `count` keeps the first so many windows (None: all). `stride` belongs to the protocol of that name (default
    length // 2). What is left at the end, shorter than a window, is dropped, except by `stride`, whose last window is
    moved back to end with the text. Raises InputError when the text does not fill one window, UsageError on a wrong
    argument.
    """
    if protocol not in PROTOCOLS:
        raise unknown_name("perplexity protocol", protocol, PROTOCOLS)
    if length < 2:
        raise UsageError(f"window of {length} tokens: at least 2 are needed, one to predict the other from")
    if count is not None and count < 1:
        raise UsageError(f"{count} windows asked for; at least 1 is needed")
    if stride is not None and protocol != "stride":
        raise UsageError(f"stride {stride} given with protocol {protocol}; only protocol stride takes one")
    ids = np.asarray(ids, dtype=np.int64).reshape(-1)
    room = length if bos is None or protocol == "llama.cpp" else length - 1  # text tokens in a window
    if protocol == "llama.cpp" and bos is not None:
        ids = np.concatenate([np.array([bos], dtype=np.int64), ids])
    if ids.size < room:
        raise InputError(
            f"the text has {ids.size} tokens, less than one window of {room}; give more text or choose --window smaller"
        )
    if protocol == "stride":
        step = max(1, length // 2) if stride is None else stride
        if not 1 <= step < length:
            raise UsageError(f"stride {step} must lie between 1 and {length - 1} for windows of {length} tokens")
        starts = list(range(0, ids.size - room + 1, step))
        if starts[-1] + room < ids.size:
            starts.append(ids.size - room)
    else:
        step = room
        starts = list(range(0, ids.size - room + 1, room))
    starts = starts[:count]

    body = np.stack([ids[start : start + room] for start in starts])  # [windows, room]
    if bos is not None and protocol == "llama.cpp":
        body[:, 0] = bos
    elif bos is not None:
        body = np.concatenate([np.full((len(starts), 1), bos, dtype=np.int64), body], axis=1)  # [windows, length]

    scored = np.ones(body.shape, dtype=np.bool_)
    scored[:, 0] = False
    if protocol == "llama.cpp":
        scored[:, : length // 2 + 1] = False
        if not scored.any():
            raise UsageError(f"window of {length} tokens: protocol llama.cpp scores the second half, empty here")
    elif protocol == "stride":
        for row, (before, start) in enumerate(itertools.pairwise(starts), 1):
            scored[row, : length - (start - before)] = False  # what the window before has scored
    return Windows(ids=body, scored=scored, protocol=protocol, stride=step, bos=bos)


CALIBRATION_WINDOWS = 128
"""Calibration windows by default; GPTQ's and AWQ's papers use as many."""
CALIBRATION_LENGTH = 2048
"""Tokens of one by default, or the model's context where that is shorter."""


def calibration_windows(
    ids: NDArray[np.int64] | Sequence[NDArray[np.int64]],
    context: int,
    bos: int | None = None,
    count: int = CALIBRATION_WINDOWS,
    length: int | None = None,
    seed: int = 0,
) -> NDArray[np.int64]:
    """int64 [windows, length]: windows side by side, and of more than `count` so many drawn with the seed, in text order.

    `ids`, int64 [T], is one text; of a sequence of them each window lies in one, and what is left over of each is left out.
    Fewer windows where there is no more text. Raises UsageError for a length beyond the context, InputError where no text
    fills a window.
    """
    if length is not None and length > context:
        raise UsageError(f"calibration window of {length} tokens is longer than the model's context of {context}")
    if count < 1:
        raise UsageError(f"{count} calibration windows asked for; at least 1 is needed")
    length = length or min(context, CALIBRATION_LENGTH)
    text = ids if isinstance(ids, np.ndarray) else _whole_windows(ids, length - (bos is not None))
    all_windows = token_windows(text, length, None, bos).ids
    if len(all_windows) <= count:
        return all_windows
    drawn = np.sort(np.random.default_rng(seed).permutation(len(all_windows))[:count])
    picked: NDArray[np.int64] = all_windows[drawn]
    return picked


def _whole_windows(texts: Sequence[NDArray[np.int64]], size: int) -> NDArray[np.int64]:
    """Texts one after the other, of each as many whole windows of `size` tokens as it has."""
    parts = [ids[: len(ids) // size * size] for ids in texts if 0 < size <= len(ids)]
    if not parts:
        most = max((len(ids) for ids in texts), default=0)
        raise InputError(
            f"no document fills a calibration window of {size} tokens, the longest of {len(texts)} has {most}; pack them"
        )
    return np.concatenate(parts)
