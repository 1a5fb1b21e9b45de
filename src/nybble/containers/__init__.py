"""Containers of quantized models: one a module, whose name is the container's; each turns a path into `Contents` and back.

A container module has

    NAME          its name on the command line: "gguf", "compressed-tensors" (the module's, with - for _)
    FOLDER        True: a Hugging Face folder, False: one file
    HOLDS         for a person: the formats it can hold, in words
    OPTIONS       option name -> (allowed values, what it does); the first value is the default
    recognizes    (path) -> bool: whether a path says of itself that it is one; cheap, raises nothing
    read          (path) -> Contents; raises InputError and FileFormatError only
    candidates    (format, shape, kind) -> specs of the formats in which it may hold what `format` holds, the smallest exact
                  one first; empty: it cannot. `kind` is one of KINDS. A floating spec (fp32, fp16, bf16) means that the
                  tensor stands there as plain floats
    settle        optional: (tensor) -> the tensor with params as the container stores them, where that is coarser than the
                  format (scales in float16); itself where nothing changes
    write         (path, contents, options) -> None: into an empty folder, or to a file; every packed tensor is in a format
                  that `candidates` named. The caller makes it appear under its final name only when it reads back equal

`files/` knows the syntax of single files; here is what stands in them. No torch, no kernel layout, no method.
"""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import Any

from nybble.containers.contents import Contents
from nybble.errors import InputError, shown, unknown_name
from nybble.files.json_strict import read_object

__all__ = ["KINDS", "Contents", "container_names", "find_container", "open_contents"]

KINDS = ("linear", "head", "embedding", "positions")
"""What a matrix is to a container: a layer, the layer that gives logits, the table of tokens (tied to the head or not), or
that of positions."""


def container_names() -> list[str]:
    """All containers there are, nybble's own first."""
    names = [module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__) if hasattr(_module(module.name), "NAME")]
    return sorted(names, key=lambda name: (name != "nybble", name))


def find_container(name: str) -> Any:
    """The module of a container. Raises UsageError for an unknown name."""
    module = _find(name)
    if module is None:
        raise unknown_name("container in --file", name, container_names())
    return module


def open_contents(path: str | Path) -> Contents:
    """What a model file or folder holds. Raises InputError when there is nothing that any container knows, FileFormatError when
    it is broken."""
    path = Path(path)
    if not path.exists():
        raise InputError(f"no model {path}; give a folder with config.json and *.safetensors, or a .gguf file")
    # a folder names its container, so that no other module has to be imported to read it
    stated = _stated(path) if path.is_dir() else None
    contents: Contents
    for name in [stated] if stated else container_names():
        if stated or _module(name).recognizes(path):
            contents = _module(name).read(path)
            return contents
    raise InputError(f"{path} is no model that nybble reads; give a folder with config.json and *.safetensors, or a .gguf file")


def _module(name: str) -> Any:
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}")


def _find(name: str) -> Any | None:
    """The module of a container, no other imported; None for a name that is none."""
    if name.replace("-", "_") not in (module.name for module in pkgutil.iter_modules(__path__)):
        return None
    module = _module(name)
    return module if getattr(module, "NAME", None) == name else None


def _stated(folder: Path) -> str | None:
    """The container that a folder's config.json names; `float` where it names none. What is wrong with that file is said by the
    container that reads it."""
    try:
        entry = read_object(folder / "config.json").get("quantization_config")
    except InputError:
        return "float"
    if entry is None:
        return "float"
    method = entry.get("quant_method") if isinstance(entry, dict) else None
    if not isinstance(method, str) or _find(method) is None:
        raise InputError(f"{folder}: quant_method {shown(method)} of config.json is none of {', '.join(container_names())}")
    return method
