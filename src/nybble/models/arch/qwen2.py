"""Qwen2: Llama's block with biases on query, key and value."""

from dataclasses import replace

from nybble.models.arch import Architecture
from nybble.models.arch.llama import DECODING, GGUF, LINEARS, OTHERS

QWEN2_GGUF = replace(GGUF, architecture="qwen2", classes={"qwen2": "Qwen2ForCausalLM"}, rotated=frozenset(), window="")

TABLE = Architecture(
    model_types=("qwen2",),
    block="model.layers.{i}",
    linears=LINEARS,
    others=OTHERS,
    tied=("lm_head", "model.embed_tokens"),
    decoding=DECODING,
    gguf=QWEN2_GGUF,
)
