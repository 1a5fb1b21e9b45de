"""What is known of one tensor of a model before anything is decided: the input of a plan. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a model, before any decision."""

    name: str
    """Hugging Face parameter name; for a tied tensor the first one."""
    aliases: tuple[str, ...]
    """Its other names, when tied."""
    kind: str
    """`linear`, `conv1d`, `embedding`, or `float` for what no format can hold."""
    shape: tuple[int, ...]
    """[out, in] for packable weights, whatever the layer stores."""
    dtype: str
    """As in the checkpoint: F32, F16, BF16, ..."""
    block: int | None
    role: str
    """`mlp up`, ...; empty when the architecture has no table."""
    reason: str
    """Why it cannot be packed, for kind `float`."""

    @property
    def weights(self) -> int:
        return math.prod(self.shape)
