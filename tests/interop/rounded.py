"""A torch model that rounds what llama.cpp rounds: the inputs of each matrix, as the matrix's type asks, and GELU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

BLOCK = 32


def eight_bits(x: torch.Tensor) -> torch.Tensor:
    """ggml's Q8_0: blocks of 32 with a float16 scale, the largest magnitude becomes 127. Rows that are no multiple are float16,
    as the matrices are that they meet."""
    if x.shape[-1] % BLOCK:
        return x.half().float()
    blocks = x.reshape(-1, BLOCK)
    top = blocks.abs().amax(1, keepdim=True)
    codes = torch.round(torch.where(top > 0, blocks * (127 / top), 0.0))
    return (codes * (top / 127).half().float()).reshape(x.shape)


def gelu(x: torch.Tensor) -> torch.Tensor:
    """ggml's: looked up in a table of all float16."""
    near = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
    return torch.where(x <= -10, 0.0, torch.where(x >= 10, x, near))


class Rounded:
    """A float model's folder with its weights as a Q8_0 file has them."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.pytorch_utils import Conv1D

        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        for module in self._model.modules():
            if isinstance(module, torch.nn.Linear | Conv1D):
                module.register_forward_pre_hook(lambda _, inputs: (eight_bits(inputs[0]), *inputs[1:]))
            elif "GELU" in type(module).__name__:
                module.forward = gelu

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """float32 [T, vocabulary]."""
        with torch.inference_mode():
            found: NDArray[np.float32] = self._model(input_ids=torch.tensor([list(ids)])).logits[0].numpy()
        return found
