"""Llama and the families that share its module names: Mistral, Qwen2, Qwen3, Gemma."""

from nybble.models.arch import Architecture

TABLE = Architecture(
    model_types=("llama", "mistral", "qwen2", "qwen3", "gemma"),
    block="model.layers.{i}",
    linears={
        "self_attn.q_proj": "query",
        "self_attn.k_proj": "key",
        "self_attn.v_proj": "value",
        "self_attn.o_proj": "attention output",
        "mlp.gate_proj": "mlp gate",
        "mlp.up_proj": "mlp up",
        "mlp.down_proj": "mlp down",
    },
    others={"model.embed_tokens": "token table", "lm_head": "head"},
    tied=("lm_head", "model.embed_tokens"),
)
