"""OpenVINO: exported by optimum-intel, weights compressed by NNCF without data, run by openvino_genai's LLMPipeline.

int4 is NNCF's default, groups of 128 with offsets, embedding and head in 8 bits; int8 is per channel with offsets. The
pipeline runs on the stateful model (back end SDPA), which is quicker for one small model than paged attention and has no
prefix cache, which would make a repeated text look free. Other hints are OpenVINO's own choice for the machine.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from nybble.bench.adapters import Adapter, Runtime

OPTIONS: dict[str, dict[str, Any]] = {
    "int8": {"bits": 8, "sym": False},
    "int4": {"bits": 4, "sym": False, "group_size": 128, "ratio": 1.0},
}
CACHE_BYTES = 1  # its cache holds 8-bit codes by default; their scales are not counted
PASSED = ("Convert", "Subtract", "Multiply", "Reshape", "Transpose")
"""Operations between a stored weight and its use."""


class OpenVinoAdapter(Adapter):
    """openvino_genai on an exported folder."""

    formats = tuple(OPTIONS)
    install = "openvino openvino-genai openvino-tokenizers nncf torch transformers optimum-intel"
    modules = ("openvino", "openvino_genai", "nncf", "optimum", "optimum.intel")

    def file_for(self, format: str, float_tag: str) -> str | None:
        return f"openvino-{format}"

    def make(self, source: Path, target: Path, format: str, threads: int) -> None:
        intel: Any = importlib.import_module("optimum.intel")
        config = intel.OVWeightQuantizationConfig(**OPTIONS[format])
        load = intel.OVModelForCausalLM.from_pretrained
        model = load(str(source), export=True, compile=False, load_in_8bit=False, quantization_config=config)
        model.save_pretrained(target)

    def start(self, threads: int) -> None:
        importlib.import_module("openvino_genai")

    def load(self, path: Path, format: str, threads: int, exact: bool) -> Runtime:
        return OpenVino(path, threads)


class OpenVino(Runtime):
    """An LLMPipeline that is given token ids, and needs no tokenizer for that."""

    def __init__(self, path: Path, threads: int) -> None:
        self._numpy: Any = importlib.import_module("numpy")
        self._openvino: Any = importlib.import_module("openvino")
        self._genai: Any = importlib.import_module("openvino_genai")
        self._path = path
        options = {"INFERENCE_NUM_THREADS": threads, "ATTENTION_BACKEND": "SDPA"}
        self._pipeline = self._genai.LLMPipeline(str(path), "CPU", **options)

    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        ids = self._numpy.array(prompts, dtype=self._numpy.int64)  # [rows, prompt]
        tensor = self._openvino.Tensor
        inputs = self._genai.TokenizedInputs(tensor(ids), tensor(self._numpy.ones_like(ids)))
        settings = self._genai.GenerationConfig(max_new_tokens=new_tokens, ignore_eos=True, do_sample=False)
        return [list(row) for row in self._pipeline.generate(inputs, settings).tokens]

    def prefill(self, ids: list[int]) -> None:
        self.generate([ids], 1)

    def facts(self) -> dict[str, Any]:
        model = self._openvino.Core().read_model(self._path / "openvino_model.xml")
        token_bytes = 0
        for constant in (op for op in model.get_ops() if op.get_type_name() == "Constant"):
            size = int(constant.get_byte_size())
            looked_up = _uses(constant) == {"Gather"} and len(constant.get_shape()) > 1
            token_bytes += size // int(constant.get_shape()[0]) if looked_up else size
        return {
            "weight_bytes": (self._path / "openvino_model.bin").stat().st_size,
            "token_bytes": token_bytes,
            "cache_element_bytes": CACHE_BYTES,
            "version": self._genai.__version__,
        }


def _uses(node: Any) -> set[str]:
    """Types of the operations that a stored weight ends in, once it is decoded."""
    found: set[str] = set()
    for output in node.outputs():
        for target in output.get_target_inputs():
            user = target.get_node()
            found |= _uses(user) if user.get_type_name() in PASSED else {user.get_type_name()}
    return found


ADAPTER = OpenVinoAdapter()
