"""Gemma 2: Gemma with norms behind attention and feed-forward, soft caps, and a sliding window in every other layer."""

from dataclasses import replace

from nybble.models.arch import Architecture
from nybble.models.arch.gemma import GEMMA, GEMMA_GGUF
from nybble.models.arch.llama import INSIDE, LINEARS, OTHERS

TABLE = Architecture(
    model_types=("gemma2",),
    block="model.layers.{i}",
    linears=LINEARS,
    others=OTHERS,
    tied=("lm_head", "model.embed_tokens"),
    ties_by_default=True,
    decoding=replace(
        GEMMA,
        mlp_norm="pre_feedforward_layernorm",
        attention_after="post_attention_layernorm",
        mlp_after="post_feedforward_layernorm",
        query_scale="query_pre_attn_scalar",
        score_cap="attn_logit_softcapping",
        logit_cap="final_logit_softcapping",
        window_alternates=True,
    ),
    gguf=replace(
        GEMMA_GGUF,
        architecture="gemma2",
        classes={"gemma2": "Gemma2ForCausalLM"},
        inside={
            **INSIDE,
            "post_attention_layernorm": "post_attention_norm",
            "pre_feedforward_layernorm": "ffn_norm",
            "post_feedforward_layernorm": "post_ffw_norm",
        },
        keys={"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"},
        window="used",
        widths_over_heads=46,  # the 27B model, whose keys do not tell
    ),
)
