"""Named files that mean harm or are merely broken, each with the error that it must give: what nybble is tested with, and what
peers.py tries on other readers.

A case is a function that makes one file, or one folder, where it is told. What must come is an error of ours of one class and
one message; never another exception, never a crash or a hang, and never much memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nybble.containers import open_contents
from nybble.errors import FileFormatError, InputError
from nybble.files.gguf import GgufFile
from nybble.files.pickled import read_tensors
from nybble.files.safetensors import SafetensorsFile

KINDS = ("gguf", "safetensors", "index", "config", "pickle")
FILES = {"gguf": "model.gguf", "safetensors": "model.safetensors", "pickle": "pytorch_model.bin"}
"""What the file of a kind is called; index and config are of folders."""

Build = Callable[[Path], Any]
"""Makes the files of a case in an empty folder."""


@dataclass(frozen=True)
class Case:
    """One bad file."""

    kind: str
    build: Build
    match: str
    """Pattern of the message."""
    error: type[Exception] = FileFormatError

    def make(self, folder: Path) -> Path:
        """Make it in an empty folder; the path to open."""
        made = self.build(folder)
        name = FILES.get(self.kind)
        if isinstance(made, bytes):
            assert name is not None
            (folder / name).write_bytes(made)
        return folder / name if name else folder


def of_bytes(make: Callable[[], bytes]) -> Build:
    """A case that is one file of these bytes."""
    return lambda folder: make()


def refused_for_a_link(kind: str, build: Build) -> Case:
    """A case of a link that leaves its folder."""
    return Case(kind, build, "is a link that leaves its folder", InputError)


def read_all(path: Path) -> None:
    """Open a model and read every tensor of it."""
    found = open_contents(path)
    for name in found.packed:
        found.read_packed(name)
    for name in found.floats:
        found.read_float(name)
    for name in found.extras:
        assert found.extras[name] is not None  # made when it is asked for


def _read_safetensors(path: Path) -> None:
    file = SafetensorsFile(path)
    for name in file.entries:
        file.read(name)


def _read_gguf(path: Path) -> None:
    file = GgufFile(path)
    for name in file.tensors:
        file.raw(name)
    read_all(path)


# pickles are read in this process here: what runs in one of its own is the same function (tests/files/test_pickled.py)
READERS: Mapping[str, Callable[[Path], object]] = {
    "gguf": _read_gguf,
    "safetensors": _read_safetensors,
    "index": read_all,
    "config": read_all,
    "pickle": lambda path: len(read_tensors(path)),
}


def catalogue() -> dict[str, Case]:
    """Every case by name, `KIND: what is wrong`."""
    import bad_config
    import bad_containers
    import bad_gguf
    import bad_gguf_models
    import bad_index
    import bad_pickles
    import bad_safetensors

    modules = (bad_gguf, bad_gguf_models, bad_safetensors, bad_index, bad_config, bad_containers, bad_pickles)
    found: dict[str, Case] = {}
    for module in modules:
        for name, case in module.CASES.items():
            assert f"{case.kind}: {name}" not in found, name
            found[f"{case.kind}: {name}"] = case
    return found
