"""A layer's inputs rounded to 8-bit integers at run time, as the scheme of its weight says (formats/activations.py).

y = scale * sum over columns of code * weight, the codes less their zero point: whole numbers of at most 8 bits, which the exact
kernel takes as floats. It multiplies them with the decoded weight and adds in float32, so that the result is that of a kernel
that adds integers, to float32 rounding (a reference, not a fast path). On the CPU a token's result is the same to the bit
whatever else is in the batch: the kernel's is, and everything here is decided token by token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nybble.formats.activations import Activations

Multiply = Callable[[Tensor], Tensor]
"""x [..., K], float32 or float64, times the transposed weight: [..., N], same type."""
LARGEST = 127.0
"""Of the codes of a token; -128 is not used, so that a token and its negative have the same codes but for the sign."""


class InputRounding(nn.Module):
    """The scheme of one packed weight. Buffers `scale` (float32 [1]) and `zero` (uint8 [1]) where it is static."""

    _is_hf_initialized = True  # transformers must not fill it with random numbers

    def __init__(self, activations: Activations) -> None:
        super().__init__()
        self.scheme, self.threshold = activations.scheme, activations.threshold
        for suffix, array in activations.stored().items():
            # not from_numpy: on the meta device the buffers must be there, without data
            self.register_buffer(suffix.removeprefix("inputs."), torch.tensor(array.tolist(), dtype=_TYPES[array.dtype.name]))
        self.seen: Seen | None = None
        """What was met since `count_outliers`; None: nothing is counted."""

    def activations(self) -> Activations:
        """The scheme as a plain value. Raises ValueError where a file gave it a scale that is none."""
        if self.scheme == "static":
            return Activations("static", scale=float(self.get_buffer("scale")), zero=int(self.get_buffer("zero")))
        return Activations(self.scheme, self.threshold)

    def product(self, x: Tensor, multiply: Multiply) -> Tensor:
        """x [..., K] rounded, times the transposed weight that `multiply` stands for: [..., N], in the type of x."""
        wide = x if x.dtype == torch.float64 else x.float()
        if not wide.numel():
            return multiply(wide).to(x.dtype)
        if self.scheme == "static":
            codes, scale = static_codes(wide, self.get_buffer("scale"), self.get_buffer("zero"))
            return (multiply(codes) * scale).to(x.dtype)
        if self.scheme == "dynamic":
            codes, scale = token_codes(wide)
            return (multiply(codes) * scale).to(x.dtype)
        outlying = wide.abs() >= self.threshold
        codes, scale = token_codes(wide.masked_fill(outlying, 0))
        y = multiply(codes) * scale
        tokens = outlying.any(-1)
        if tokens.any():
            y[tokens] += multiply(wide.masked_fill(~outlying, 0)[tokens])
        if self.seen is not None:
            self.seen.add(outlying)
        return y.to(x.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> InputRounding:
        """Moves to devices; types stay as stored, as those of the weight do."""
        for name, value in self._buffers.items():
            if value is not None:
                moved = fn(value)
                self._buffers[name] = moved if moved.dtype == value.dtype else value.to(moved.device)
        return self

    def extra_repr(self) -> str:
        return self.scheme


_TYPES = {"float32": torch.float32, "uint8": torch.uint8}


def token_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """(codes [..., K], scale [..., 1]), both in the type of x: whole numbers from -127 to 127, half to even, and what one is
    worth. The scale is the token's largest magnitude / 127; 1 for a token of zeros (LLM.int8, arXiv 2208.07339, section 2).
    """
    scale = x.abs().amax(-1, keepdim=True) / LARGEST
    scale = torch.where(scale == 0, 1.0, scale)  # also where the quotient is below the smallest number there is
    return (x / scale).round_().clamp_(-LARGEST, LARGEST), scale


def static_codes(x: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    """(codes less the zero point [..., K], scale [1]), in the type of x: whole numbers from -zero to 255 - zero, half to
    even. What other kernels fold into the bias, zero * sum of a weight's row, is thereby taken off before the product."""
    scale = scale.to(x.dtype)
    low = -zero.to(x.dtype)
    return torch.clamp((x / scale).round_(), low, low + 255), scale


class Seen:
    """Counts of outliers among a layer's inputs."""

    def __init__(self) -> None:
        self.tokens = self.elements = self.outliers = 0
        self.columns: Tensor | None = None
        """bool [K]: which columns ever held one."""

    def add(self, outlying: Tensor) -> None:
        """Count bool [..., K]."""
        flat = outlying.reshape(-1, outlying.shape[-1])
        columns = flat.any(0)
        self.columns = columns if self.columns is None else self.columns | columns
        self.tokens += flat.shape[0]
        self.elements += flat.numel()
        self.outliers += int(flat.sum())


def count_outliers(model: nn.Module) -> Callable[[], dict[str, Any] | None]:
    """Begin to count outliers in every layer that lets some through as floats. What it returns gives the counts so far:
    `share` of all elements, `columns` that ever held one, of `columns_in_all`, over the layers; None where no layer counts
    or nothing was met."""
    layers = [module for module in model.modules() if isinstance(module, InputRounding) and module.scheme == "outliers"]
    for layer in layers:
        layer.seen = Seen()

    def counts() -> dict[str, Any] | None:
        met = [layer.seen for layer in layers if layer.seen is not None and layer.seen.columns is not None]
        if not met:
            return None
        return {
            "share": sum(seen.outliers for seen in met) / sum(seen.elements for seen in met),
            "columns": sum(int(seen.columns.sum()) for seen in met if seen.columns is not None),
            "columns_in_all": sum(len(seen.columns) for seen in met if seen.columns is not None),
        }

    return counts


def outlier_note(counts: dict[str, Any] | None) -> str | None:
    """The sentence for a reader of the results."""
    if counts is None:
        return None
    return (
        f"outliers: {counts['share']:.3%} of the layers' inputs went through in float; "
        f"{counts['columns']} of {counts['columns_in_all']} columns ever held one"
    )
