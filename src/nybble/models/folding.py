"""Where a scale per channel can be taken out of what makes a tensor and put into what reads it, block by block.

Divide channel j of a norm's gain and bias by s_j, multiply column j of every matrix that reads the norm by s_j, and the
model computes what it did before: that is where AWQ (arXiv 2306.00978, section 3.2) and SmoothQuant (arXiv 2211.10438,
section 4) put their scales. The same holds for two matrices with nothing between them but a product channel by channel:
value and attention output (channels of query heads that share a value head share a scale), up and down of a gated feed-forward
layer, and up and down around a ReLU. All of it is read off an architecture's table; no weights here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nybble.models.arch import Architecture, Decoding


@dataclass(frozen=True)
class Fold:
    """One such place in a block. Names are inside the block, without `.weight`."""

    source: str
    """What makes the tensor: a norm, or a matrix whose rows are the channels."""
    readers: tuple[str, ...]
    """All the matrices that read it: their columns are the channels."""
    norm: bool = True
    part: tuple[int, int] = (0, 1)
    """(i, n): the channels are the i-th of n equal parts of the source's rows (value in one matrix with query and key)."""
    heads: tuple[int, int] = (1, 1)
    """(query heads, of them to a value head): the readers' channels are those of query heads, the source's of value heads."""
    gain_offset: float = 0.0
    """Added to the norm's gain (Gemma: 1)."""
    reason: str = ""
    """Why no scale can be folded here; empty where one can."""


def folds(table: Architecture, config: Any) -> tuple[list[Fold], str]:
    """(places of each block in the order they run, empty) for a table and a transformers config; or (none, the reason)."""
    how = table.decoding
    if how is None:
        return [], f"there is no table that says which norm feeds which matrix in {getattr(config, 'model_type', None)!r}"
    for key, value in how.requires:
        if getattr(config, key, value) != value:
            return [], f"with {key} {getattr(config, key)!r} this model does not run as its table says"
    side_by_side = not how.mlp_norm
    first = (*how.attention_in, *(how.mlp[:-1] if side_by_side else ()))
    found = [Fold(how.attention_norm, first, gain_offset=how.gain_offset), _attention(how, config)]
    if not side_by_side:
        found.append(Fold(how.mlp_norm, how.mlp[:-1], gain_offset=how.gain_offset))
    return [*found, _feed_forward(how, config)], ""


def _attention(how: Decoding, config: Any) -> Fold:
    heads = int(getattr(config, how.heads, None) or 1)
    values = int(getattr(config, "num_key_value_heads", None) or heads)
    reason = f"{heads} query heads do not share {values} value heads evenly" if heads % values else ""
    source, part = (how.attention_in[0], (2, 3)) if len(how.attention_in) == 1 else (how.attention_in[2], (0, 1))
    return Fold(source, (how.attention_out,), norm=False, part=part, heads=(heads, max(1, heads // values)), reason=reason)


def _feed_forward(how: Decoding, config: Any) -> Fold:
    *_, up, down = how.mlp
    activation = next((str(getattr(config, key)) for key in how.activation if getattr(config, key, None)), "")
    commutes = len(how.mlp) == 3 or activation == "relu"  # gated: the activation is the gate's, up comes after it
    reason = "" if commutes else f"the activation {activation} does not commute with a scale"
    return Fold(up, (down,), norm=False, reason=reason)
