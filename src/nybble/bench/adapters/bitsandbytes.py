"""bitsandbytes on the CPU through transformers' `generate`: LLM.int8(), and NF4 computing in bfloat16.

It quantizes the float folder when it loads it, leaving embeddings and the head in float; both are part of its figures.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from nybble.bench.adapters import Adapter, Runtime
from nybble.bench.adapters.torch import ADAPTER as TORCH
from nybble.bench.adapters.torch import Generate


class BitsAndBytesAdapter(Adapter):
    """bitsandbytes' layers in a transformers model."""

    formats = ("int8", "nf4")
    install = "torch transformers accelerate bitsandbytes"
    modules = ("torch", "transformers", "accelerate", "bitsandbytes")

    def start(self, threads: int) -> None:
        TORCH.start(threads)
        importlib.import_module("bitsandbytes")

    def load(self, path: Path, format: str, threads: int, exact: bool) -> Runtime:
        torch: Any = importlib.import_module("torch")
        transformers: Any = importlib.import_module("transformers")
        nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
        config = transformers.BitsAndBytesConfig(**({"load_in_8bit": True} if format == "int8" else nf4))
        load = transformers.AutoModelForCausalLM.from_pretrained
        return BitsAndBytes(load(str(path), quantization_config=config, device_map="cpu", local_files_only=True).eval())


class BitsAndBytes(Generate):
    """A transformers model whose linear layers are bitsandbytes'."""

    def facts(self) -> dict[str, Any]:
        found = super().facts()
        scales = sum(_scale_bytes(parameter) for parameter in self._model.parameters())
        sizes = {key: found[key] + scales for key in ("weight_bytes", "token_bytes")}
        version = f"{importlib.import_module('bitsandbytes').__version__}, torch {found['version']}"
        return {**found, **sizes, "version": version}


def _scale_bytes(parameter: Any) -> int:
    """Bytes of the scales that a quantized parameter carries beside its codes."""
    state = getattr(parameter, "quant_state", None)
    arrays = [getattr(state, "absmax", None), getattr(parameter, "SCB", None)]
    return sum(array.numel() * array.element_size() for array in arrays if array is not None)


ADAPTER = BitsAndBytesAdapter()
