"""Methods: which of the values that a format can hold each weight gets.

One method a file; the file's name is the method's name. A method module has

    SETTINGS     which steps it takes, and how (see steps/settings.py): all the arithmetic is there, shared
    ALIASES      optional: words that may follow its name and the settings they stand for (`rtn:mse`)

and a docstring that says what it is, whose it is, and when to use it. Methods add up (`awq+gptq`), and every setting can
be changed by an option after a colon (`gptq:damp=0.001:order=activation`). A method knows a format and statistics; it
never sees a file, a model or a layer.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from nybble.errors import UsageError, unknown_name
from nybble.formats import Format, QTensor
from nybble.methods.steps.fitting import fit_params
from nybble.methods.steps.settings import PLAIN, Settings, change


@dataclass(frozen=True)
class Method:
    """A method with its options, as a spec string names it: `rtn`, `rtn:mse`, `gptq:refine=3`."""

    name: str
    options: tuple[str, ...]
    settings: Settings

    @property
    def uses_calibration(self) -> bool:
        """Whether calibration text changes what it does; `settings.calibrated` says whether it must have some."""
        return self.settings.calibrated or self.settings.scales == "search"

    @property
    def by_rows(self) -> bool:
        """Whether what it makes of a row, without calibration, does not depend on other rows."""
        return not self.settings.prunes and self.settings.scales in ("range", "search")

    def lacks_calibration(self) -> UsageError:
        """The error for a method that must have calibration text and is given none: says what to do."""
        instead = "dynamic" if self.settings.activations == "static" and not self.settings.blockwise else "rtn:mse"
        return UsageError(
            f"method {self} reads calibration text; give some, other than the text that scores (--calibrate FILE), "
            f"let the model write it (--calibrate self), or use {instead}, which needs none"
        )

    def quantize(
        self, weight: np.ndarray[Any, Any], fmt: Format, importance: np.ndarray[Any, Any] | None = None, prune: bool = False
    ) -> QTensor:
        """QTensor of a float32 weight [N, K], rounded to nearest: what a method does where no Hessian is known.
        `importance`, float32 [K], weighs the columns in a search; with `prune` weights become zero by their magnitude, if the
        method has any become so. Raises NumericError as the format does."""
        if prune and self.settings.prunes:
            import torch  # not for names and settings

            from nybble.methods.steps.masks import check_zero, kept_in_matrix

            check_zero(fmt)
            weight = np.where(kept_in_matrix(torch.from_numpy(np.abs(weight)), self.settings).numpy(), weight, np.float32(0))
        if self.settings.scales == "range" and importance is None:
            return QTensor(fmt, *fmt.round(weight))
        params = fit_params(fmt, weight, self.settings.scales, importance)
        return QTensor(fmt, fmt.encode(weight, params), params)

    def __str__(self) -> str:
        return ":".join([self.name, *self.options])


def method_names() -> list[str]:
    """All methods there are."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.ispkg)


def parse_method(spec: str) -> Method:
    """The method of a spec string `NAME[+NAME...][:option...]`. Raises UsageError for an unknown name or option."""
    name, *options = spec.strip().split(":")
    settings = PLAIN
    aliases: dict[str, Any] = {}
    for part in name.split("+"):
        if part not in method_names():
            raise unknown_name("method", part, method_names())
        module = _module(part)
        own: Settings = module.SETTINGS
        if own.edit != "none" and settings.edit not in ("none", own.edit):
            raise UsageError(f"method {name!r}: {settings.edit} and {own.edit} fold scales into the same places; use one of them")
        fields = [field.name for field in dataclasses.fields(Settings)]
        changed = {key: getattr(own, key) for key in fields if getattr(own, key) != getattr(PLAIN, key)}
        if settings.activations != "float" and "activations" in changed:
            raise UsageError(f"method {spec!r}: {settings.activations} and {own.activations} activations exclude each other")
        settings = dataclasses.replace(settings, **changed)
        aliases.update(getattr(module, "ALIASES", {}))
    for option in options:
        if option in aliases:
            settings = dataclasses.replace(settings, **aliases[option])
        else:
            settings = change(settings, name, option, aliases)
    if len(set(options)) != len(options):
        raise UsageError(f"method {spec!r}: an option is given twice")
    return Method(name, tuple(sorted(options)), settings)


def describe_method(name: str) -> str:
    """The first line of a method's docstring."""
    return (_module(name).__doc__ or "").strip().splitlines()[0]


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"nybble.methods.{name}")
