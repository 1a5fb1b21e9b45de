"""GPT-2 (`model_type` gpt2): learned positions, Conv1D matrices stored [in, out], head tied to the token table."""

from nybble.models.arch import Architecture

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
)
