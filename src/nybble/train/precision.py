"""Mixed precision: products and activations in 16 bits, weights and the optimizer in 32 (Micikevicius et al. 2018).

bfloat16 has float32's range and needs nothing else. float16 ends at 65504 and loses what is below 6e-8, so the loss is multiplied
by a scale before gradients are taken: halved when a gradient overflows, and that step is skipped, doubled after so many steps
without.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
FIRST_SCALE = 65536.0
GROWS_AFTER = 200
"""Steps; torch's default of 2,000 suits longer runs than those on a CPU."""


def computing(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """The context in which a model computes: autocast, or nothing for fp32."""
    return torch.autocast(device.type, TYPES[precision]) if precision in TYPES else nullcontext()


def scaler_of(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """The loss's scaler; one that does nothing unless in fp16."""
    used = precision == "fp16"
    return torch.amp.GradScaler(device.type, init_scale=FIRST_SCALE, growth_interval=GROWS_AFTER, enabled=used)
