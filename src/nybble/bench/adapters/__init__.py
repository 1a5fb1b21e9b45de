"""How each runtime is fed and driven: one file a runtime, with its `Adapter` under the name ADAPTER.

An adapter's libraries are imported inside its methods, which only a measuring process calls: the adapter itself can be
imported, and asked what is missing, where none of them is installed.
"""

from __future__ import annotations

import importlib
import importlib.util
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

FILES = {
    "nybble": "engine",
    "torch": "torch",
    "llama.cpp": "llamacpp",
    "openvino": "openvino",
    "bitsandbytes": "bitsandbytes",
}
"""Runtime -> its module in this folder."""
OURS = "nybble"


class Runtime(ABC):
    """A loaded model that is ready to work. All prompts of one call have the same length."""

    @abstractmethod
    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        """The `new_tokens` greedily chosen ids after each prompt, whatever they are."""

    @abstractmethod
    def prefill(self, ids: list[int]) -> None:
        """One pass over the ids, up to the logits of the last one."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """`weight_bytes` held, `token_bytes` of weights that a token reads, `cache_element_bytes` of one cached number,
        and `version` of the library. Asked last, since finding out may cost time and memory."""


class Adapter(ABC):
    """What a module of this folder offers."""

    formats: ClassVar[tuple[str, ...]]
    """Formats that race when none is named."""
    install: ClassVar[str]
    """What a person installs to get the runtime."""
    modules: ClassVar[tuple[str, ...]]
    """The modules that it needs."""
    half: ClassVar[str | None] = None
    """Name of a file in float16 that nybble writes for it (its ending says in which container), and `make` reads in the place of
    the float folder."""

    def missing(self) -> str | None:
        """Names of the modules that this Python lacks for it; None when nothing is missing. Imports none of them."""
        return ", ".join(name for name in self.modules if not _is_here(name)) or None

    def file_for(self, format: str, float_tag: str) -> str | None:
        """Name of the file or folder made for a format; None when the runtime reads the float folder itself.

        `float_tag` is the type that the float folder stores its tensors in: F32, F16 or BF16.
        """
        return None

    def make(self, source: Path, target: Path, format: str, threads: int) -> None:
        """Write `target`, which `file_for` named, from the float folder `source`. InputError when it cannot hold the model."""
        raise NotImplementedError

    @abstractmethod
    def start(self, threads: int) -> None:
        """Import the library and set its threads."""

    @abstractmethod
    def load(self, path: Path, format: str, threads: int, exact: bool) -> Runtime:
        """The model at `path`, after `start`. `exact` asks nybble's engine for float activations; peers have their own way."""


def adapter_of(runtime: str) -> Adapter:
    """The adapter of a runtime named in FILES."""
    adapter: Adapter = importlib.import_module(f"{__name__}.{FILES[runtime]}").ADAPTER
    return adapter


def _is_here(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package that it is part of
        return False
