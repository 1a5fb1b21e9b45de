"""PyTorch through transformers' `generate`: the float model in fp32 or bf16, or nybble's packed modules in any format.

Prefill is a plain forward pass. `generate` spends milliseconds of Python on each token; that is part of what its user gets.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from nybble.bench.adapters import Adapter, Runtime
from nybble.bench.adapters.engine import packed_file, write_packed


class TorchAdapter(Adapter):
    """transformers on torch. A format other than fp32 and bf16 is nybble's packed modules."""

    formats = ("fp32", "bf16")
    install = "torch transformers"
    modules = ("torch", "transformers")

    def file_for(self, format: str, float_tag: str) -> str | None:
        return None if format in self.formats else packed_file(format, float_tag)

    def make(self, source: Path, target: Path, format: str, threads: int) -> None:
        write_packed(source, target, format, threads)

    def start(self, threads: int) -> None:
        torch: Any = importlib.import_module("torch")
        transformers: Any = importlib.import_module("transformers")
        _ = transformers.AutoModelForCausalLM  # transformers imports a class when it is first named
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)

    def load(self, path: Path, format: str, threads: int, exact: bool) -> Runtime:
        if format not in self.formats:
            return Packed(path)
        torch: Any = importlib.import_module("torch")
        transformers: Any = importlib.import_module("transformers")
        dtype = torch.bfloat16 if format == "bf16" else torch.float32
        return Generate(transformers.AutoModelForCausalLM.from_pretrained(str(path), dtype=dtype, local_files_only=True).eval())


class Generate(Runtime):
    """A transformers model. Its stored generation settings are set aside: no end token, no sampling."""

    def __init__(self, model: Any) -> None:
        self._torch: Any = importlib.import_module("torch")
        self._settings: Any = importlib.import_module("transformers").GenerationConfig
        self._model = model
        self._model.generation_config = self._settings()

    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        ids = self._torch.tensor(prompts)  # [rows, prompt]
        settings = self._settings(max_new_tokens=new_tokens, do_sample=False, use_cache=True, pad_token_id=0)
        out = self._model.generate(ids, attention_mask=self._torch.ones_like(ids), generation_config=settings)
        return list(out[:, ids.shape[1] :].tolist())

    def prefill(self, ids: list[int]) -> None:
        self._model(self._torch.tensor([ids]), use_cache=True, logits_to_keep=1)

    def facts(self) -> dict[str, Any]:
        held, token_bytes = bytes_of_modules(self._model)
        version = f"{self._torch.__version__}, transformers {importlib.import_module('transformers').__version__}"
        element = self._model.dtype.itemsize
        return {"weight_bytes": held, "token_bytes": token_bytes, "cache_element_bytes": element, "version": version}


class Packed(Generate):
    """nybble's packed modules in a transformers model."""

    def __init__(self, path: Path) -> None:
        import nybble

        super().__init__(nybble.load(path).model())

    def facts(self) -> dict[str, Any]:
        from nybble.evaluate.worker import bytes_per_token
        from nybble.quantized import tensor_bytes

        return {**super().facts(), "weight_bytes": tensor_bytes(self._model), "token_bytes": bytes_per_token(self._model)}


def bytes_of_modules(model: Any) -> tuple[int, int]:
    """(bytes of all parameters, bytes of those that one token reads) of a torch model; shared ones count once.

    Of an embedding table that nothing else uses a token reads one row.
    """
    embedding: Any = importlib.import_module("torch").nn.Embedding
    held: dict[int, int] = {}
    read: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            size = parameter.numel() * parameter.element_size()
            looked_up = isinstance(module, embedding)
            held[id(parameter)] = size
            read[id(parameter)] = max(read.get(id(parameter), 0), size // module.num_embeddings if looked_up else size)
    return sum(held.values()), sum(read.values())


ADAPTER = TorchAdapter()
