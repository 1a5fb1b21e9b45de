"""Text to token windows, and which windows a step sees: a function of the seed and the step, so that a run which goes on sees
what it would have seen."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nybble.calibrate.windows import read_documents, tokenize
from nybble.errors import InputError

HELD_BACK = 20
"""One part in so many is held back where no text is given to measure on."""


def read_text_tree(path: str | Path) -> list[str]:
    """The documents of a file (`read_documents`), or of all files of a folder in the order of their names; those that are not
    UTF-8 text, empty or hidden are left out. Raises InputError when there is none."""
    path = Path(path)
    if not path.is_dir():
        return read_documents(path)
    documents: list[str] = []
    for file in sorted(path.rglob("*")):
        if any(part.startswith(".") for part in file.relative_to(path).parts) or not file.is_file():
            continue
        try:
            documents += read_documents(file)
        except InputError:
            continue
    if not documents:
        raise InputError(f"folder {path} holds no text: no file of it is UTF-8 with something in it")
    return documents


def hold_back(documents: Sequence[str]) -> tuple[list[str], list[str]]:
    """(documents to learn from, documents held back): every twentieth, or of fewer documents the last twentieth of each."""
    if len(documents) >= HELD_BACK:
        held = [document for i, document in enumerate(documents) if i % HELD_BACK == HELD_BACK - 1]
        return [document for i, document in enumerate(documents) if i % HELD_BACK != HELD_BACK - 1], held
    kept, held = [], []
    for document in documents:
        cut = len(document) - len(document) // HELD_BACK
        cut = document.rfind("\n", 0, cut) + 1 or cut
        kept.append(document[:cut])
        held.append(document[cut:])
    return [document for document in kept if document], [document for document in held if document]


def join_tokens(tokenizer: Any, documents: Sequence[str], end: int | None) -> NDArray[np.int32]:
    """Ids int32 [T] of all documents, the end token (where there is one) before each: how GPT-2's texts begin and end."""
    pieces = []
    for document in documents:
        ids = tokenize(tokenizer, document, special_tokens=False)
        pieces.append(np.array(ids if end is None else [end, *ids], dtype=np.int32))
    if not pieces or not sum(map(len, pieces)):
        raise InputError("the text has no tokens; give more text")
    return np.concatenate(pieces)


@dataclass(frozen=True)
class Text:
    """Token ids to learn from, cut into windows anew in every epoch: another first token, another order."""

    ids: NDArray[np.int32]
    """[T]"""
    window: int
    seed: int

    def __post_init__(self) -> None:
        if len(self.ids) < self.window:
            raise InputError(f"the text has {len(self.ids)} tokens, less than one window of {self.window}")

    @property
    def windows(self) -> int:
        """Windows of an epoch."""
        return max(1, len(self.ids) // self.window - 1)

    @property
    def sha256(self) -> str:
        """Of the ids."""
        return hashlib.sha256(np.ascontiguousarray(self.ids, dtype="<i4").tobytes()).hexdigest()

    def batch(self, step: int, size: int) -> NDArray[np.int64]:
        """The windows of a step [size, window]."""
        return np.stack([self._window(number) for number in range(step * size, (step + 1) * size)]).astype(np.int64)

    def _window(self, number: int) -> NDArray[np.int32]:
        epoch, place = divmod(number, self.windows)
        first, order = _order(self.seed, epoch, len(self.ids), self.window, self.windows)
        start = first + int(order[place]) * self.window
        return self.ids[start : start + self.window]


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, tokens: int, window: int, windows: int) -> tuple[int, NDArray[np.int64]]:
    """The first token of an epoch's windows, and which of them comes when."""
    draw = np.random.default_rng([seed, epoch])
    return int(draw.integers(0, tokens - windows * window + 1)), draw.permutation(windows)
