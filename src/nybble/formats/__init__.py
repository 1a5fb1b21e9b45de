"""Number formats: which values a block of weights can hold, and what is stored for it.

One family a file; a module of this folder that defines `NAMES` is found by itself (see `spec.py`). Formats know numpy
arrays and nothing else: no method, no file, no torch.
"""

from nybble.formats.base import Format, Params
from nybble.formats.qtensor import QTensor
from nybble.formats.spec import format_names, parse_format

__all__ = ["Format", "Params", "QTensor", "format_names", "parse_format"]
