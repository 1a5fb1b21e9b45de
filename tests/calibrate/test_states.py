"""Hidden states in a file: what is put is got, a copy is another, and a full disk is told in one line."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from nybble.calibrate.states import FileStates, copied, new_states
from nybble.errors import OutputError


@pytest.mark.parametrize("on_disk", [False, True])
def test_what_is_put_is_got(on_disk: bool, tmp_path: Path) -> None:
    folder = tmp_path if on_disk else None
    values = [torch.randn(1, 5, 7) for _ in range(3)]
    states = new_states(folder, 3, values[0])
    for window, value in enumerate(values):
        states[window] = value
    again = copied(states, folder)
    states[1] = values[2]
    assert isinstance(states, FileStates) == on_disk
    assert [torch.equal(a, b) for a, b in zip(again, values, strict=True)] == [True] * 3
    assert torch.equal(states[1], values[2])
    assert list(tmp_path.iterdir()) == [], "the file has no name"
    with pytest.raises(IndexError):
        states[3]


def test_a_full_disk_is_told_with_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = FileStates(tmp_path, 2, torch.zeros(1, 4, 4))

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OutputError, match=r"128 bytes.*No space left"):
        states[0] = torch.ones(1, 4, 4)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OutputError, match="give fewer or shorter windows"):
        FileStates(tmp_path, 2, torch.zeros(1, 4, 4))


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="nowhere"):
        FileStates(tmp_path / "nowhere", 2, torch.zeros(2))
