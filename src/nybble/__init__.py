"""nybble: make a trained language model small and fast on the machine you have, and prove what that cost.

    import nybble
    small = nybble.quantize("path/to/model", "int4:g64")
    small.save("model-int4");  nybble.load("model-int4").generate(...)
    records = nybble.compare("path/to/model", text="text.txt")

Importing nybble takes milliseconds: torch and transformers are imported by the functions that need them. It also lets
transformers know of nybble's folders, so that `AutoModelForCausalLM.from_pretrained("model-int4")` works.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from nybble import _transformers_hook
from nybble.version import __version__

if TYPE_CHECKING:
    from nybble.evaluate.compare import compare
    from nybble.formats import QTensor, format_names, parse_format
    from nybble.methods import method_names
    from nybble.quantized import Quantized, load
    from nybble.run import quantize

_HOME = {
    "QTensor": "nybble.formats",
    "Quantized": "nybble.quantized",
    "compare": "nybble.evaluate.compare",
    "format_names": "nybble.formats",
    "load": "nybble.quantized",
    "method_names": "nybble.methods",
    "parse_format": "nybble.formats",
    "quantize": "nybble.run",
}

__all__ = [
    "QTensor",
    "Quantized",
    "__version__",
    "compare",
    "format_names",
    "load",
    "method_names",
    "parse_format",
    "quantize",
]

_transformers_hook.install()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'nybble' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
