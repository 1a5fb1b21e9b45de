"""Methods: which of the values that a format can hold each weight gets.

One algorithm a file; the file's name is the method's name. A method module has

    OPTIONS: frozenset[str]        what may follow the name: `rtn:mse`
    uses_importance(options)       whether calibration statistics change what it does
    quantize(weight, fmt, options, importance) -> QTensor

where weight is float32 [N, K] and importance None or float32 [K], the mean square of each input column. A method knows
a format and statistics; it never sees a file, a model or a layer.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from nybble.errors import UsageError, unknown_name
from nybble.formats import Format, QTensor


@dataclass(frozen=True)
class Method:
    """A method with its options, as a spec string names it: `rtn`, `rtn:mse`."""

    name: str
    options: frozenset[str]

    @property
    def _module(self) -> ModuleType:
        return importlib.import_module(f"nybble.methods.{self.name}")

    @property
    def uses_importance(self) -> bool:
        """Whether calibration statistics change what it does."""
        return bool(self._module.uses_importance(self.options))

    def quantize(self, weight: np.ndarray[Any, Any], fmt: Format, importance: np.ndarray[Any, Any] | None) -> QTensor:
        """Codes and params for a float32 weight [N, K]. Raises NumericError for weights that cannot be represented."""
        result: QTensor = self._module.quantize(weight, fmt, self.options, importance)
        return result

    def __str__(self) -> str:
        return ":".join([self.name, *sorted(self.options)])


def method_names() -> list[str]:
    """All methods there are."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def parse_method(spec: str) -> Method:
    """The method of a spec string `NAME[:option...]`. Raises UsageError for an unknown name or option."""
    name, *options = spec.strip().split(":")
    if name not in method_names():
        raise unknown_name("method", name, method_names())
    known = importlib.import_module(f"nybble.methods.{name}").OPTIONS
    for option in options:
        if option not in known:
            raise UsageError(f"method {name}: unknown option {option!r}; it has {', '.join(sorted(known)) or 'none'}")
    return Method(name, frozenset(options))
