"""OPT: learned positions that begin at row 2, ReLU, LayerNorm before each part."""

from nybble.models.arch import Architecture, Decoding

TABLE = Architecture(
    model_types=("opt",),
    block="model.decoder.layers.{i}",
    linears={
        "self_attn.q_proj": "query",
        "self_attn.k_proj": "key",
        "self_attn.v_proj": "value",
        "self_attn.out_proj": "attention output",
        "fc1": "mlp up",
        "fc2": "mlp down",
    },
    others={
        "model.decoder.embed_tokens": "token table",
        "model.decoder.embed_positions": "position table",
        "model.decoder.project_in": "projection of the token table",  # where embeddings are narrower than the model
        "model.decoder.project_out": "projection to the token table",
        "lm_head": "head",
    },
    tied=("lm_head", "model.decoder.embed_tokens"),
    ties_by_default=True,
    decoding=Decoding(
        attention_norm="self_attn_layer_norm",
        attention_in=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        attention_out="self_attn.out_proj",
        mlp_norm="final_layer_norm",
        mlp=("fc1", "fc2"),
        final_norm="model.decoder.final_layer_norm",
        centred=True,
        eps="",
        activation=("activation_function",),
        positions="model.decoder.embed_positions",
        position_offset=2,
        requires=(("do_layer_norm_before", True), ("_remove_final_layer_norm", False)),
    ),
)
