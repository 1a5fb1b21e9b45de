"""Every error that nybble raises on purpose, in one small tree.

    NybbleError            one clear line: the value, the limit, what to do
    ├── UsageError         a wrong argument: unknown name, malformed spec, impossible combination (exit code 2)
    ├── InputError         the model, text or prompt given cannot be used as asked
    │   └── FileFormatError    a file whose bytes are not what its format promises (truncated, overlapping, hostile)
    ├── NumericError       weights or scales that are not finite, or do not fit their storage type
    ├── OutputError        the result cannot be written where it was asked for
    └── MeasureError       a measuring process died or gave no result

The command line prints the message of any NybbleError in one line and exits with its `exit_code`; any other exception is
a bug and shows its traceback. Nothing else in the package prints or exits.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class NybbleError(Exception):
    """Base of all errors raised on purpose; `str(error)` is one line for a person."""

    exit_code = 1


class UsageError(NybbleError, ValueError):
    """A wrong argument: an unknown name, a malformed spec, a combination that makes no sense."""

    exit_code = 2


class InputError(NybbleError, ValueError):
    """The model, text or prompt cannot be used as asked."""


class FileFormatError(InputError):
    """A file's bytes are not what its format promises."""


class NumericError(NybbleError, ValueError):
    """Weights or parameters that are not finite or do not fit their storage type."""


class BlocksError(InputError):
    """A model is no row of blocks that run once each, in order."""


class OutputError(NybbleError, OSError):
    """The result cannot be written where it was asked for."""


class MeasureError(NybbleError, RuntimeError):
    """A measuring process died or gave no result."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was asked for and not given, by numpy, torch or the system: torch has no exception of its own for it."""
    said = "can't allocate memory", "out of memory", "bad allocation"
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(each in str(error) for each in said))


def shown(value: object, most: int = 80) -> str:
    """What a file says, for a message: `repr` of a text or number, cut after `most` characters, with no line break, no control
    character and nothing that turns the direction of a line, whatever stands in it."""
    if isinstance(value, int) and not -(10**most) < value < 10**most:
        return f"a number of more than {most} digits"  # repr of one with thousands of digits raises ValueError
    text = repr(value[: most + 1] if isinstance(value, str | bytes) else value)
    text = "".join(c if c.isprintable() else " " for c in text)
    return text if len(text) <= most + 2 else f"{text[:most]}..."


MOST_NAMES = 20
"""An error lists so many known names at most: the weights of a model are hundreds."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UsageError:
    """The error for a name that is not known: says what was given, the nearest names, and what there is."""
    names = sorted(known)
    near = difflib.get_close_matches(name[:100], names, n=3, cutoff=0.5)  # takes time with the length, and files name formats too
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return UsageError(f"unknown {kind} {shown(name)}{hint} (known: {', '.join(names[:MOST_NAMES])}{more})")
