"""Phi 1, 1.5 and 2: attention and feed-forward side by side on one LayerNorm, part of each head rotated, biases everywhere."""

from nybble.models.arch import Architecture, Decoding, Gguf

TABLE = Architecture(
    model_types=("phi",),
    block="model.layers.{i}",
    linears={
        "self_attn.q_proj": "query",
        "self_attn.k_proj": "key",
        "self_attn.v_proj": "value",
        "self_attn.dense": "attention output",
        "mlp.fc1": "mlp up",
        "mlp.fc2": "mlp down",
    },
    others={"model.embed_tokens": "token table", "lm_head": "head"},
    tied=("lm_head", "model.embed_tokens"),
    decoding=Decoding(
        attention_norm="input_layernorm",
        attention_in=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        attention_out="self_attn.dense",
        mlp_norm="",
        mlp=("mlp.fc1", "mlp.fc2"),
        final_norm="model.final_layernorm",
        centred=True,
        eps="layer_norm_eps",
        activation=("hidden_act",),
        requires=(("qk_layernorm", False),),
    ),
    gguf=Gguf(
        architecture="phi2",
        classes={"phi": "PhiForCausalLM"},
        inside={
            "input_layernorm": "attn_norm",
            "self_attn.q_proj": "attn_q",
            "self_attn.k_proj": "attn_k",
            "self_attn.v_proj": "attn_v",
            "self_attn.dense": "attn_output",
            "mlp.fc1": "ffn_up",
            "mlp.fc2": "ffn_down",
        },
        before={"model.embed_tokens": "token_embd"},
        after={"model.final_layernorm": "output_norm", "lm_head": "output"},
        inner="intermediate_size",
        activations=("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),
    ),
)
