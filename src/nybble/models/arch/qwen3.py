"""Qwen3: Llama's block with an RMS norm of every query and key head."""

from dataclasses import replace

from nybble.models.arch import Architecture
from nybble.models.arch.llama import DECODING, LINEARS, OTHERS
from nybble.models.arch.qwen2 import QWEN2_GGUF

TABLE = Architecture(
    model_types=("qwen3",),
    block="model.layers.{i}",
    linears=LINEARS,
    others=OTHERS,
    tied=("lm_head", "model.embed_tokens"),
    decoding=replace(DECODING, query_norm="self_attn.q_norm", key_norm="self_attn.k_norm"),
    gguf=replace(
        QWEN2_GGUF,
        architecture="qwen3",
        classes={"qwen3": "Qwen3ForCausalLM"},
        inside={**QWEN2_GGUF.inside, "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"},
    ),
)
