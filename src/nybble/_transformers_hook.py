"""Registers nybble's quantizer with transformers, without importing transformers.

transformers looks quantizers up in `transformers.quantizers.auto`. If that module is loaded, the quantizer is registered at
once; if not, an import hook does so right after the module is first imported.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # importing it takes 25 ms, a tenth of what `nybble generate` needs to start
    from importlib.abc import Loader

TARGET = "transformers.quantizers.auto"


class _Loader:
    """Runs the real loader, then registers."""

    def __init__(self, real: Loader) -> None:
        self._real = real

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._real.exec_module(module)
        _register()


class _Finder:
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != TARGET:
            return None
        sys.meta_path.remove(self)  # the others find the real module
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)  # type: ignore[assignment]
        return spec


def install() -> None:
    """Register now or when transformers' quantizers are first imported; doing it twice is harmless."""
    if TARGET in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    importlib.import_module("nybble.models.hf_quantizer")  # registers on import
