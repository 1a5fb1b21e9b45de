"""GPT-2 (`model_type` gpt2): learned positions, Conv1D matrices stored [in, out], head tied to the token table."""

from nybble.models.arch import Architecture, Decoding, Gguf

TABLE = Architecture(
    model_types=("gpt2",),
    block="transformer.h.{i}",
    linears={
        "attn.c_attn": "query, key and value",
        "attn.c_proj": "attention output",
        "mlp.c_fc": "mlp up",
        "mlp.c_proj": "mlp down",
    },
    transposed=frozenset({"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}),
    others={"transformer.wte": "token table", "transformer.wpe": "position table", "lm_head": "head"},
    tied=("lm_head", "transformer.wte"),
    ties_by_default=True,
    decoding=Decoding(
        attention_norm="ln_1",
        attention_in=("attn.c_attn",),
        attention_out="attn.c_proj",
        mlp_norm="ln_2",
        mlp=("mlp.c_fc", "mlp.c_proj"),
        final_norm="transformer.ln_f",
        centred=True,
        eps="layer_norm_epsilon",
        activation=("activation_function",),
        width="n_embd",
        layers="n_layer",
        heads="n_head",
        context="n_positions",
        positions="transformer.wpe",
        requires=(("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False), ("add_cross_attention", False)),
    ),
    gguf=Gguf(
        architecture="gpt2",
        classes={"gpt2": "GPT2LMHeadModel"},
        inside={
            "ln_1": "attn_norm",
            "attn.c_attn": "attn_qkv",
            "attn.c_proj": "attn_output",
            "ln_2": "ffn_norm",
            "mlp.c_fc": "ffn_up",
            "mlp.c_proj": "ffn_down",
        },
        before={"transformer.wte": "token_embd", "transformer.wpe": "position_embd"},
        after={"transformer.ln_f": "output_norm", "lm_head": "output"},
        inner="n_inner",
        activations=("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),
    ),
)
