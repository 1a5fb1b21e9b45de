"""Qwen3: Llama's block with an RMS norm of every query and key head."""

from dataclasses import replace

from nybble.models.arch import Architecture
from nybble.models.arch.llama import DECODING, LINEARS, OTHERS

TABLE = Architecture(
    model_types=("qwen3",),
    block="model.layers.{i}",
    linears=LINEARS,
    others=OTHERS,
    tied=("lm_head", "model.embed_tokens"),
    decoding=replace(DECODING, query_norm="self_attn.q_norm", key_norm="self_attn.k_norm"),
)
