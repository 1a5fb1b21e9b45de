"""Mixed precision: products and activations in 16 bits, weights and the optimizer in 32 (Micikevicius et al. 2018).

bfloat16 has float32's range and needs nothing else. float16 ends at 65504 and loses what is below 6e-8, so the loss is multiplied
by a scale before gradients are taken: halved when a gradient overflows, and that step is skipped, doubled after so many steps
without.

Processors without instructions for float16 multiply it ten times as slowly as float32 (torch 2.13; a GPT-2 of 6 M parameters,
1,024 tokens: 8.3 s a step against 0.76). There products are taken in float32, of numbers rounded to 16 bits as before, and sums
are rounded once: what the instructions would do.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
FIRST_SCALE = 65536.0
GROWS_AFTER = 200
"""Steps; torch's default of 2,000 suits longer runs than those on a CPU."""


def computing(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """The context in which a model computes: autocast, or nothing for fp32."""
    return torch.autocast(device.type, TYPES[precision]) if precision in TYPES else nullcontext()


def multiplying(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """The context of forward and backward passes: products as fast as the device has them."""
    slow = precision == "fp16" and device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return _WideProducts() if slow else nullcontext()


class _WideProducts(TorchDispatchMode):
    """Products of float16 matrices in float32."""

    PRODUCTS = frozenset(getattr(torch.ops.aten, name).default for name in ("mm", "addmm", "bmm", "baddbmm"))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.PRODUCTS and args[0].dtype is torch.float16:
            wide = (arg.float() if isinstance(arg, torch.Tensor) else arg for arg in args)
            return func(*wide, **(kwargs or {})).half()
        return func(*args, **(kwargs or {}))


def scaler_of(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """The loss's scaler; one that does nothing unless in fp16."""
    used = precision == "fp16"
    return torch.amp.GradScaler(device.type, init_scale=FIRST_SCALE, growth_interval=GROWS_AFTER, enabled=used)
