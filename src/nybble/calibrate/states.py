"""Hidden states of all calibration windows: in memory, or in a file where they are more than that should hold."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nybble.files.unnamed import UnnamedFile


class States(Protocol):
    """One tensor for each window, all of one shape and type. Threads may read and replace different ones."""

    def __len__(self) -> int: ...

    def __getitem__(self, window: int, /) -> Tensor: ...

    def __setitem__(self, window: int, state: Tensor, /) -> None: ...

    def __iter__(self) -> Iterator[Tensor]: ...


class FileStates:
    """Hidden states in a file without a name."""

    def __init__(self, folder: Path, count: int, like: Tensor) -> None:
        """`count` tensors like one. Raises OutputError where the folder has no room, then and when one is put."""
        self._count, self._shape, self._dtype = count, like.shape, like.dtype
        self._bytes = like.numel() * like.element_size()
        advice = "make room, or give fewer or shorter windows"
        self._file = UnnamedFile(folder, "hidden states", count * self._bytes, advice)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Tensor]:
        return (self[window] for window in range(self._count))

    def __getitem__(self, window: int) -> Tensor:
        state = torch.empty(self._shape, dtype=self._dtype)
        self._file.read(_bytes(state), self._start(window))
        return state

    def __setitem__(self, window: int, state: Tensor) -> None:
        assert (state.shape, state.dtype) == (self._shape, self._dtype), f"{state.dtype} {state.shape}"
        self._file.write(_bytes(state.contiguous()), self._start(window))

    def _start(self, window: int) -> int:
        if not 0 <= window < self._count:
            raise IndexError(window)
        return window * self._bytes


def _bytes(state: Tensor) -> memoryview:
    values: NDArray[np.uint8] = state.view(torch.uint8).numpy().reshape(-1)
    return values.data


def new_states(folder: Path | None, count: int, first: Tensor) -> States:
    """Room for `count` hidden states like the first, which is in it already: in memory, or in a folder."""
    if folder is None:
        return [first] * count
    states = FileStates(folder, count, first)
    states[0] = first
    return states


def copied(states: States, folder: Path | None) -> States:
    """The same hidden states once more."""
    found = new_states(folder, len(states), states[0].clone())
    for window in range(1, len(states)):
        found[window] = states[window].clone()
    return found
