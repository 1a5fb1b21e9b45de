"""Containers of quantized models: one a module, found by itself; each turns a path into `Contents` and back.

A container module has

    NAME          its name on the command line: "gguf"
    FOLDER        True: a Hugging Face folder, False: one file
    HOLDS         for a person: the formats it can hold, in words
    OPTIONS       option name -> (allowed values, what it does); the first value is the default
    recognizes    (path) -> bool: whether a path says of itself that it is one; cheap, raises nothing
    read          (path) -> Contents; raises InputError and FileFormatError only
    candidates    (format, shape, kind) -> specs of the formats in which it may hold what `format` holds, the smallest exact
                  one first; empty: it cannot. `kind` is linear, head, embedding or positions. A floating spec (fp32, fp16,
                  bf16) means that the tensor stands there as plain floats
    write         (path, contents, options) -> None: into an empty folder, or to a file; every packed tensor is in a format
                  that `candidates` named. The caller makes it appear under its final name only when it reads back equal

`files/` knows the syntax of single files; here is what stands in them. No torch, no kernel layout, no method.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from pathlib import Path
from typing import Any

from nybble.containers.contents import Contents
from nybble.errors import InputError, unknown_name

__all__ = ["Contents", "container_names", "find_container", "open_contents"]


@cache
def _modules() -> dict[str, Any]:
    found = {}
    for module in pkgutil.iter_modules(__path__):
        loaded = importlib.import_module(f"{__name__}.{module.name}")
        if hasattr(loaded, "NAME"):
            found[loaded.NAME] = loaded
    return found


def container_names() -> list[str]:
    """All containers there are."""
    return sorted(_modules())


def find_container(name: str) -> Any:
    """The module of a container. Raises UsageError for an unknown name."""
    if name not in _modules():
        raise unknown_name("container in --file", name, _modules())
    return _modules()[name]


def open_contents(path: str | Path) -> Contents:
    """What a model file or folder holds. Raises InputError when there is nothing that any container knows, FileFormatError when
    it is broken."""
    path = Path(path)
    if not path.exists():
        raise InputError(f"no model {path}; give a folder with config.json and *.safetensors, or a .gguf file")
    for module in _modules().values():
        if module.recognizes(path):
            contents: Contents = module.read(path)
            return contents
    raise InputError(f"{path} is no model that nybble reads ({', '.join(container_names())})")
