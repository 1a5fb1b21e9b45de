"""Llama, and Mistral, which runs the same block with a sliding window."""

from nybble.models.arch import Architecture, Decoding, Gguf

LINEARS = {
    "self_attn.q_proj": "query",
    "self_attn.k_proj": "key",
    "self_attn.v_proj": "value",
    "self_attn.o_proj": "attention output",
    "mlp.gate_proj": "mlp gate",
    "mlp.up_proj": "mlp up",
    "mlp.down_proj": "mlp down",
}
OTHERS = {"model.embed_tokens": "token table", "lm_head": "head"}
DECODING = Decoding(
    attention_norm="input_layernorm",
    attention_in=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    attention_out="self_attn.o_proj",
    mlp_norm="post_attention_layernorm",
    mlp=("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    final_norm="model.norm",
    centred=False,
    eps="rms_norm_eps",
    activation=("hidden_act",),
    window_always=True,
)
INSIDE = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GGUF = Gguf(
    architecture="llama",
    classes={"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"},
    inside=INSIDE,
    before={"model.embed_tokens": "token_embd"},
    after={"model.norm": "output_norm", "lm_head": "output"},
    inner="intermediate_size",
    activations=("silu", "swish"),
    shared_heads=True,
    rotated=frozenset({"self_attn.q_proj", "self_attn.k_proj"}),
    window="unused",
)

TABLE = Architecture(
    model_types=("llama", "mistral"),
    block="model.layers.{i}",
    linears=LINEARS,
    others=OTHERS,
    tied=("lm_head", "model.embed_tokens"),
    decoding=DECODING,
    gguf=GGUF,
)
