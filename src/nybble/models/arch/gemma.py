"""Gemma: Llama's block with gains stored less one, scaled embeddings and a GELU gate."""

from dataclasses import replace

from nybble.models.arch import Architecture
from nybble.models.arch.llama import DECODING, GGUF, LINEARS, OTHERS

GEMMA = replace(
    DECODING,
    gain_offset=1.0,
    scaled_embedding=True,
    activation=("hidden_activation", "hidden_act"),
    window_always=False,
)
GEMMA_GGUF = replace(
    GGUF,
    architecture="gemma",
    classes={"gemma": "GemmaForCausalLM"},
    activations=("gelu_pytorch_tanh", "gelu"),  # gelu here: what Gemma's first configurations call the tanh form
    rotated=frozenset(),
    window="",
    requires=(("tie_word_embeddings", True),),
)

TABLE = Architecture(
    model_types=("gemma",),
    block="model.layers.{i}",
    linears=LINEARS,
    others=OTHERS,
    tied=("lm_head", "model.embed_tokens"),
    ties_by_default=True,
    decoding=GEMMA,
    gguf=GEMMA_GGUF,
)
