"""What a long job is done with, kept on disk: blocks of a calibrated method, tensors of a container that is written at once. A
run that was stopped takes them up.

A block is a safetensors file in the job's folder, with a line of the journal that holds its SHA-256 and the accounts; so are the
edits that are made before (edits.py), and how far a tuning is that comes after (tuner.py). What came of a block depends on the
model, the text and the blocks before it alone, so that the rest comes out as it would have.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nybble.errors import InputError
from nybble.files.journal import Journal, sync_folder
from nybble.files.safetensors import SafetensorsFile, file_sha256, write
from nybble.formats import QTensor, parse_format

if TYPE_CHECKING:  # it brings torch along
    from nybble.methods.steps.choose import Account

KIND = "kept"
BLOCK = "block"
MOVED, EDITED, POSITIONS = "moved.", "edited.", "positions."


@dataclass(frozen=True)
class Block:
    """What became of one block."""

    tensors: Mapping[str, QTensor]
    """Name of a weight -> its codes, in the order they were decided."""
    accounts: Mapping[str, Account] = field(default_factory=dict)
    moved: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    """Name -> what a bias or a norm's gain became."""
    edited: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    """Name -> what an edit made of a tensor that stays in float, as it lies in a checkpoint."""
    positions: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    """Name of a weight -> where its codes' positions begin, [N, K], if it is to be tuned (latent.py)."""
    note: Any = None
    """What else is to be known of it, as JSON has it."""


class FinishedBlocks:
    """The finished blocks of a job, and what else of it is kept: numbered files of a kind, each with a line of the journal."""

    def __init__(self, folder: Path, journal: Journal) -> None:
        self.folder, self.journal = folder, journal
        for cut_off in folder.glob(".*.part"):  # files that a killed process was writing
            cut_off.unlink()
        self.taken = self.damaged = 0
        self._records = {(record[KIND], record["number"]): record for record in journal.records if KIND in record}
        self._places: dict[str, int] = {}

    def find(self, index: int) -> Block | None:
        """A block, or None where it is not finished, or not what was written."""
        found = self.find_arrays(BLOCK, index)
        if found is None:
            return None
        block = _read(*found)
        self.taken += 1
        self._places.update(dict.fromkeys(block.tensors, index))
        return block

    def __contains__(self, name: str) -> bool:
        """Whether a weight was found or kept."""
        return name in self._places

    def read(self, name: str) -> QTensor:
        """A weight that was found or kept. Raises InputError where its file is gone."""
        index = self._places[name]
        return _tensor(SafetensorsFile(self.path(BLOCK, index)), self._records[BLOCK, index]["note"], name)

    def keep(self, index: int, block: Block) -> None:
        """Have a block on disk. Raises OutputError."""
        floats = {MOVED: block.moved, EDITED: block.edited, POSITIONS: block.positions}
        arrays: dict[str, NDArray[Any]] = {kind + name: value for kind, all_ in floats.items() for name, value in all_.items()}
        for name, tensor in block.tensors.items():
            arrays.update({f"{name}.{suffix}": array for suffix, array in tensor.stored().items()})
        note = {
            "formats": {name: [str(tensor.format), *tensor.shape] for name, tensor in block.tensors.items()},
            "order": list(block.tensors),
            "accounts": {name: dataclasses.astuple(account) for name, account in block.accounts.items()},
            "note": block.note,
        }
        self.keep_arrays(BLOCK, index, arrays, note)
        self._places.update(dict.fromkeys(block.tensors, index))

    def numbers(self, kind: str) -> list[int]:
        """What is kept of a kind, in the order it was, removed files too."""
        return [number for each, number in self._records if each == kind]

    def find_arrays(self, kind: str, number: int) -> tuple[Any, SafetensorsFile] | None:
        """(note, arrays) that were kept, or None where there are none, or not what was written."""
        record = self._records.get((kind, number))
        if record is None:
            return None
        try:
            path = self.path(kind, number)
            if file_sha256(path) != record["sha256"]:
                raise InputError(f"{path} is not what was written")
            return record["note"], SafetensorsFile(path)
        except InputError:
            self.damaged += 1
            return None

    def keep_arrays(self, kind: str, number: int, arrays: Mapping[str, NDArray[Any]], note: Any) -> None:
        """Have arrays on disk, and a note as JSON has it. Raises OutputError."""
        path = self.path(kind, number)
        path.parent.mkdir(exist_ok=True)
        write(path, arrays, {})
        sync_folder(path.parent)
        record = {KIND: kind, "number": number, "sha256": file_sha256(path), "note": note}
        self.journal.append(record)
        self._records[kind, number] = record

    def path(self, kind: str, number: int) -> Path:
        """Where arrays are kept."""
        return self.folder / f"{kind}-{number:05}.safetensors"


def notes_of(journal: Journal) -> Iterator[tuple[str, Any]]:
    """(name of a weight, note) of every block that holds one weight, and has a note."""
    for record in journal.records:
        if record.get(KIND) == BLOCK and record["note"]["note"] is not None:
            yield record["note"]["order"][0], record["note"]["note"]


def _read(record: Mapping[str, Any], file: SafetensorsFile) -> Block:
    tensors = {name: _tensor(file, record, name) for name in record["order"]}
    moved, edited, positions = (_floats(file, kind) for kind in (MOVED, EDITED, POSITIONS))
    return Block(tensors, _accounts(record["accounts"]), moved, edited, positions, record["note"])


def _accounts(found: Mapping[str, Any]) -> dict[str, Account]:
    if not found:
        return {}
    from nybble.methods.steps.choose import Account

    return {name: Account(*values) for name, values in found.items()}


def _tensor(file: SafetensorsFile, record: Mapping[str, Any], name: str) -> QTensor:
    spec, rows, columns = record["formats"][name]
    fmt = parse_format(spec)
    stored: dict[str, NDArray[Any]] = {suffix: np.array(file.read(f"{name}.{suffix}")) for suffix in fmt.storage((rows, columns))}
    return QTensor.from_stored(fmt, stored, (rows, columns))


def _floats(file: SafetensorsFile, prefix: str) -> dict[str, NDArray[np.float32]]:
    return {name.removeprefix(prefix): np.array(file.read(name)) for name in file.entries if name.startswith(prefix)}
