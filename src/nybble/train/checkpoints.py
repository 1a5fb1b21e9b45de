"""Where a run stands, on disk: enough to go on as if it had never stopped.

A checkpoint is a folder `step-000500` that appears whole or not at all:

    state.safetensors   weights and the optimizer's states
    state.json          step, settings, model and text, the optimizer's groups, the scaler; checksums of both files

Nothing in it is pickled. The newest `KEPT` stay.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nybble.errors import FileFormatError, InputError, OutputError, UsageError
from nybble.files.job import new_folder, sweep
from nybble.files.journal import check_same
from nybble.files.json_strict import read_object
from nybble.files.safetensors import SafetensorsFile, file_sha256, write
from nybble.forecast import size_text

KEPT = 2
STATES = {"adamw": 8.0, "adamw8bit": 2.1, "adamw4bit": 1.1}
"""Bytes of an optimizer's states for a parameter, scales included."""
NAME = re.compile(r"step-([0-9]{6,12})")
TENSORS, FACTS = "state.safetensors", "state.json"
MODEL, OPTIMIZER = "model.", "optimizer."


@dataclass(frozen=True)
class Standing:
    """What a run needs to go on."""

    step: int
    """Steps that are done."""
    model: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    """`state_dict` of the optimizer."""
    scaler: dict[str, Any]


def newest(folder: Path) -> Path | None:
    """The checkpoint of the highest step in a folder, or None."""
    found = [(int(match[1]), path) for path in folder.glob("step-*") if (match := NAME.fullmatch(path.name)) and path.is_dir()]
    return max(found)[1] if found else None


def check_room(folder: Path, parameters: int, optimizer: str) -> None:
    """Raise OutputError, with the figures, where a disk has no room for the checkpoints of a run: those that stay, one that is
    being written, and the model. What an earlier run left in the folder counts as room."""
    need = int(parameters * ((KEPT + 1) * (4 + STATES[optimizer]) + 4))
    there = sum(file.stat().st_blocks * 512 for file in folder.rglob("*") if file.is_file())
    free = there + shutil.disk_usage(next(path for path in folder.absolute().parents if path.exists())).free
    if free < need:
        raise OutputError(
            f"checkpoints and model take about {size_text(need)} in {folder.parent.parent}, {size_text(free)} are free; "
            "make room, write somewhere else (-o), or train with --optimizer adamw8bit"
        )


def save(folder: Path, standing: Standing, facts: Mapping[str, Any]) -> Path:
    """Write a checkpoint and drop those that are too old. Raises OutputError with nothing half-written."""
    arrays: dict[str, Any] = {}
    tags: dict[str, str] = {}

    def put(name: str, tensor: torch.Tensor) -> None:
        tensor = tensor.detach().cpu().contiguous()
        if tensor.dtype is torch.bfloat16:
            tags[name] = "BF16"
            tensor = tensor.view(torch.uint16)
        arrays[name] = tensor.numpy()

    for name, tensor in standing.model.items():
        put(MODEL + name, tensor)
    scalars: dict[str, dict[str, Any]] = {}
    for number, states in standing.optimizer["state"].items():
        for name, value in states.items():
            if isinstance(value, torch.Tensor):
                put(f"{OPTIMIZER}{number}.{name}", value)
            else:
                scalars.setdefault(str(number), {})[name] = value
    groups = standing.optimizer["param_groups"]
    path = folder / f"step-{standing.step:06}"
    with new_folder(path, force=True, marker=FACTS) as work:
        write(work / TENSORS, arrays, {}, tags)
        state = {
            "step": standing.step,
            "groups": groups,
            "scalars": scalars,
            "scaler": standing.scaler,
            "facts": dict(facts),
            "tensors": file_sha256(work / TENSORS),
        }
        said = {"state": state, "sha256": _digest(state)}
        (work / FACTS).write_text(json.dumps(said, indent=1, sort_keys=True), encoding="utf-8")
    tidy(folder)
    return path


def tidy(folder: Path) -> None:
    """Drop checkpoints that are too old, and what a run left that was killed when it had written one."""
    for left in folder.glob("step-*.part"):
        sweep(left.with_suffix(""))
    old = sorted((p for p in folder.glob("step-*") if NAME.fullmatch(p.name)), key=lambda p: int(p.name[5:]))
    for each in old[:-KEPT]:
        shutil.rmtree(each, ignore_errors=True)


def load(path: Path, facts: Mapping[str, Any]) -> Standing:
    """Read a checkpoint. Raises FileFormatError for one that is not as it was written; UsageError, naming what differs, for one
    of another run."""
    said = read_object(path / FACTS)
    try:
        state, tensors_sha256 = said["state"], file_sha256(path / TENSORS)
        for name, was, now in ((FACTS, said["sha256"], _digest(state)), (TENSORS, state["tensors"], tensors_sha256)):
            if was != now:
                raise FileFormatError(f"{path / name} is not what was written (its checksum differs); remove {path}")
        check_same(path.parent.parent, _named(state["facts"]), _named(facts))
        file = SafetensorsFile(path / TENSORS)
        tensors = {name: _tensor(file, name) for name in file.entries}
        moments: dict[int, dict[str, Any]] = {}
        for number, values in state["scalars"].items():
            moments.setdefault(int(number), {}).update(values)
        for name in tensors:
            if name.startswith(OPTIMIZER):
                number, _, part = name.removeprefix(OPTIMIZER).partition(".")
                moments.setdefault(int(number), {})[part] = tensors[name]
        model = {name.removeprefix(MODEL): tensor for name, tensor in tensors.items() if name.startswith(MODEL)}
        optimizer = {"state": dict(sorted(moments.items())), "param_groups": state["groups"]}
        return Standing(int(state["step"]), model, optimizer, dict(state["scaler"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, InputError | UsageError):
            raise
        raise FileFormatError(f"{path} is no checkpoint of nybble ({type(error).__name__}: {error}); remove it") from error


def _digest(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _tensor(file: SafetensorsFile, name: str) -> torch.Tensor:
    array = np.array(file.read(name))
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if file.entries[name].dtype == "BF16" else tensor


def _named(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts under names that a person reads, in order."""
    return {name.replace("_", " "): facts[name] for name in sorted(facts)}
