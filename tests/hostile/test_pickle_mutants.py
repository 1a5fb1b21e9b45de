"""Seeded damage to pickled checkpoints: to the pickle, to the zip file around it, to both; only our own error or tensors."""

from __future__ import annotations

import zipfile
from io import BytesIO
from pathlib import Path
from random import Random

import mutate
import pytest
from bad_pickles import archive
from fuzz import check_message

from nybble.errors import FileFormatError
from nybble.files.pickle_machine import Tensor, read_pickle
from nybble.files.pickled import read_tensors

torch = pytest.importorskip("torch")


def saved() -> bytes:
    weight = torch.arange(6.0).view(2, 3)
    state = torch.nn.BatchNorm1d(2).state_dict()
    state |= {"a": weight, "b": weight.T, "c": torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16)), "d": torch.tensor(3)}
    out = BytesIO()
    torch.save(state, out)
    return out.getvalue()


def test_damaged_pickles() -> None:
    file = zipfile.ZipFile(BytesIO(saved()))
    program = file.read("archive/data.pkl")
    assert len(read_pickle(program)) == 9
    accepted = 0
    for i in range(20_000):
        try:
            found = read_pickle(mutate.damage(program, Random(f"pickle {i}"), len(program)))
        except ValueError:
            continue
        accepted += 1
        assert all(isinstance(tensor, Tensor) for tensor in found.values())
    assert 100 < accepted < 19_000


def test_damaged_files(tmp_path: Path) -> None:
    whole = saved()
    file = zipfile.ZipFile(BytesIO(whole))
    program = file.read("archive/data.pkl")
    storages = {name.rpartition("/")[2]: file.read(name) for name in file.namelist() if "/data/" in name}
    path = tmp_path / "x.bin"
    accepted = 0
    for i in range(3000):
        random = Random(f"file {i}")
        if i % 2:
            data = mutate.damage(whole, random, len(whole))
        else:
            data = archive(mutate.damage(program, random, len(program)), storages)
        path.unlink(missing_ok=True)
        path.write_bytes(data)
        try:
            found = read_tensors(path)
        except FileFormatError as error:
            check_message(str(error), len(str(path)))
            continue
        accepted += 1
        assert sum(array.nbytes for _, array in found.values()) <= 4 * len(data)
        for _, array in found.values():
            array.sum()  # every element lies in the file
    assert 20 < accepted < 2900
