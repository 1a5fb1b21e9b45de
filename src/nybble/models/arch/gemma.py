"""Gemma: Llama's block with gains stored less one, scaled embeddings and a GELU gate."""

from dataclasses import replace

from nybble.models.arch import Architecture
from nybble.models.arch.llama import DECODING, LINEARS, OTHERS

GEMMA = replace(
    DECODING,
    gain_offset=1.0,
    scaled_embedding=True,
    activation=("hidden_activation", "hidden_act"),
    window_always=False,
)

TABLE = Architecture(
    model_types=("gemma",),
    block="model.layers.{i}",
    linears=LINEARS,
    others=OTHERS,
    tied=("lm_head", "model.embed_tokens"),
    ties_by_default=True,
    decoding=GEMMA,
)
