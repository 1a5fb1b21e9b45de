"""Llama and the families that run the same block: Mistral (sliding window), Qwen2 (biases on query, key and value)."""

from nybble.models.arch import Architecture, Decoding

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

TABLE = Architecture(
    model_types=("llama", "mistral", "qwen2"),
    block="model.layers.{i}",
    linears=LINEARS,
    others=OTHERS,
    tied=("lm_head", "model.embed_tokens"),
    decoding=DECODING,
)
