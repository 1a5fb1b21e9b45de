"""How a figure is written: the same everywhere, in the table, the sentences, the plots and the terminal.

1 MB is 10^6 bytes. A value that was not measured, or is not finite, is written as an en dash.
"""

from __future__ import annotations

import math

MISSING = "–"
MB = 1e6


def number(value: float | None) -> float | None:
    """The value when it is a finite number, else None: a figure that may be formatted, compared and drawn."""
    return value if value is not None and math.isfinite(value) else None


def format_significant(value: float | None, digits: int = 3) -> str:
    """`digits` significant digits without an exponent from 0.001 on: 0.0123, 3.12, 31.2, 1,234; below that 3.1e-5."""
    value = number(value)
    if value is None:
        return MISSING
    if value == 0:
        return "0"
    if abs(value) < 1e-3:
        mantissa, exponent = f"{value:.{max(digits - 2, 0)}e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    whole = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    if whole:
        return f"{value:,.{max(digits - whole, 0)}f}"
    leading = 0  # zeros after the decimal point
    while abs(value) * 10 ** (leading + 1) < 1:
        leading += 1
    return f"{value:.{digits + leading}f}"


def format_megabytes(value: float | None) -> str:
    """Bytes as MB (10^6 bytes), two decimals below 10, one below 1000, none above."""
    value = number(value)
    if value is None:
        return MISSING
    amount = value / MB
    return f"{amount:,.2f}" if abs(amount) < 9.995 else f"{amount:,.1f}" if abs(amount) < 999.95 else f"{amount:,.0f}"


def format_percent(value: float | None, digits: int = 1) -> str:
    """A fraction as a percentage without its sign: 0.265 gives 26.5."""
    value = number(value)
    return MISSING if value is None else f"{value * 100:,.{digits}f}"


def format_difference(value: float | None) -> str:
    """A fraction as a signed percentage: 0.0213 gives +2.1; plain 0 for what rounds to nothing."""
    value = number(value)
    if value is None:
        return MISSING
    text = f"{value * 100:+,.2f}" if abs(value) < 0.1 else f"{value * 100:+,.1f}" if abs(value) < 10 else f"{value * 100:+,.0f}"
    return text.replace("-", "−") if float(text.replace(",", "")) else "0"


def format_perplexity(value: float | None) -> str:
    """Three decimals below 100, then four significant digits."""
    value = number(value)
    return MISSING if value is None else f"{value:.3f}" if value < 100 else format_significant(value, 4)
