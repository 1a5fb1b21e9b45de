"""Floating-point numbers by their layout: IEEE 754, the 8-bit floats E4M3 and E5M2 (OCP 8-bit Floating Point Specification 1.0)
and E2M1 (OCP Microscaling Formats 1.0). Figures are exact, whatever types numpy has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Floating:
    """A floating-point number: sign, exponent of bias 2^(bits-1) - 1, mantissa; subnormals at exponent 0."""

    exponent_bits: int
    mantissa_bits: int
    taken: int | None = None
    """Codes of each sign that stand for infinity or NaN: None: the largest exponent's all (IEEE 754); E4M3 1, E2M1 0."""

    @property
    def bits(self) -> int:
        """Of one number, the sign included."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def lowest_exponent(self) -> int:
        """Of the smallest normal number, and of all subnormal ones."""
        return 2 - 2 ** (self.exponent_bits - 1)

    @property
    def positive(self) -> int:
        """How many finite numbers are above zero."""
        taken = 2**self.mantissa_bits if self.taken is None else self.taken
        return int(2 ** (self.bits - 1) - taken - 1)

    def value(self, code: int) -> float:
        """The number of a code from 0 (zero) to `positive` (the largest finite one); exact up to float64."""
        exponent, mantissa = divmod(code, 2**self.mantissa_bits)
        whole = mantissa + (2**self.mantissa_bits if exponent else 0)
        return math.ldexp(whole, max(exponent, 1) - 1 + self.lowest_exponent - self.mantissa_bits)

    @property
    def largest(self) -> float:
        """The largest finite number."""
        return self.value(self.positive)

    @property
    def smallest_normal(self) -> float:
        """The smallest number with all its mantissa bits."""
        return math.ldexp(1.0, self.lowest_exponent)

    @property
    def smallest(self) -> float:
        """The smallest number above zero, which is subnormal; the step from zero to `smallest_normal`."""
        return self.value(1)

    @property
    def epsilon(self) -> float:
        """The step from 1 to the next number (machine epsilon)."""
        return math.ldexp(1.0, -self.mantissa_bits)

    def count_to(self, bound: float) -> int:
        """How many numbers are above zero and at most `bound`, which is 0 or more and not over the largest."""
        if bound < self.smallest:
            return 0
        exponent = max(math.frexp(bound)[1] - 1, self.lowest_exponent)
        steps = int(math.ldexp(bound, self.mantissa_bits - exponent))  # mantissa with its leading one
        return (exponent - self.lowest_exponent) * 2**self.mantissa_bits + steps


OTHERS = {
    "fp64": (Floating(11, 52), "reference results"),
    "fp8_e4m3": (Floating(4, 3, 1), "weights, inputs on newer GPUs"),
    "fp8_e5m2": (Floating(5, 2), "gradients on newer GPUs"),
    "fp4_e2m1": (Floating(2, 1, 0), "element of MXFP4 and NVFP4"),
}
"""Floats that are no formats of ours, and where they are met."""
