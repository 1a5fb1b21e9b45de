"""The mixes of ggml's formats that people know by name (q4_k_m, q3_k_s, ...): which weight of a model gets which, as data.

They are llama.cpp's: most weights in one format, those that cost most when they are rounded in finer ones (the head, values,
the way out of the feed-forward layer), some of these only in some layers. A mix whose name is also a format's (q4_0: every
weight in it) is written `mix:q4_0`. Checked against what llama.cpp's quantizer gives (tests/interop). Tables of positions stay
in float, as there. What llama.cpp chooses by model size (70B) or for mixtures of experts is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nybble.formats import format_names
from nybble.models.info import TensorInfo

Layers = Callable[[int, int], bool]
"""(index of a layer, how many there are) -> whether a rule holds for it."""
PREFIX = "mix:"
GROUPED = 4
"""Query heads that share a value head, from which on values are few and dear."""


def every(_: int, __: int) -> bool:
    """All layers."""
    return True


def more(i: int, n: int) -> bool:
    """The first and last eighth, and every third between them."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def first(count: int) -> Layers:
    """The first `count` layers."""
    return lambda i, n: i < count


def part(share: int) -> Layers:
    """The first layers, one in `share`."""
    return lambda i, n: i < n // share


VALUE = ("value", "query, key and value")
DOWN = ("mlp down",)
OUT = ("attention output",)


@dataclass(frozen=True)
class Rule:
    """A format for the weights of some roles in some layers."""

    roles: tuple[str, ...]
    format: str
    layers: Layers = every
    grouped: bool = False
    """Only where GROUPED or more query heads share a value head."""


@dataclass(frozen=True)
class Mix:
    """Formats by role. The first rule that holds counts."""

    default: str
    rules: tuple[Rule, ...] = ()
    head: str = "q6_k"
    """Of the layer that gives logits, or of the table that is tied to it."""


MIXES = {
    "q2_k": Mix("q2_k", (Rule(VALUE, "q4_k", grouped=True), Rule((*VALUE, *OUT, *DOWN), "q3_k"))),
    "q2_k_s": Mix("q2_k", (Rule(VALUE, "q4_k", grouped=True), Rule(DOWN, "q4_k", part(8)))),
    "q3_k_s": Mix("q3_k"),
    "q3_k_m": Mix(
        "q3_k",
        (Rule(VALUE, "q5_k", first(2)), Rule(VALUE, "q4_k"), Rule(DOWN, "q5_k", part(16)), Rule((*DOWN, *OUT), "q4_k")),
    ),
    "q3_k_l": Mix("q3_k", (Rule((*VALUE, *OUT, *DOWN), "q5_k"),)),
    "q4_k_s": Mix("q4_k", (Rule(VALUE, "q5_k", first(4)), Rule(DOWN, "q5_k", part(8)))),
    "q4_k_m": Mix("q4_k", (Rule((*VALUE, *DOWN), "q6_k", more),)),
    "q5_k_s": Mix("q5_k"),
    "q5_k_m": Mix("q5_k", (Rule((*VALUE, *DOWN), "q6_k", more),)),
    "q6_k": Mix("q6_k"),
    "iq4_nl": Mix("iq4_nl", (Rule(VALUE, "q5_k", grouped=True), Rule(DOWN, "q5_k", part(8)))),
    "iq4_xs": Mix("iq4_xs", (Rule(VALUE, "q5_k", grouped=True), Rule(DOWN, "q5_k", part(8)))),
    "q4_0": Mix("q4_0"),
    "q4_1": Mix("q4_1"),
    "q5_0": Mix("q5_0"),
    "q5_1": Mix("q5_1"),
    "q8_0": Mix("q8_0", head="q8_0"),
}


def mix_names() -> list[str]:
    """All mixes, as they are written."""
    formats = set(format_names())
    return sorted(f"{PREFIX}{name}" if name in formats else name for name in MIXES)


def find_mix(spec: str) -> tuple[str, Mix] | None:
    """(name as it is written, mix) of a spec; None for what is no mix."""
    spec = spec.strip().lower()
    name = spec.removeprefix(PREFIX)
    if name not in MIXES or (spec == name and name in format_names()):
        return None
    return (f"{PREFIX}{name}" if name in format_names() else name), MIXES[name]


def is_positions(tensor: TensorInfo) -> bool:
    """Whether a weight is a table of positions, which mixes leave in float."""
    return tensor.role == "position table"


def format_of(mix: Mix, tensor: TensorInfo, tensors: Sequence[TensorInfo]) -> tuple[str, str]:
    """(format spec, why) of one weight of a model."""
    if tensor.role == "head" or (tensor.role == "token table" and any("head" in a or "output" in a for a in tensor.aliases)):
        return mix.head, "head"
    layers = 1 + max((t.block for t in tensors if t.block is not None), default=0)
    for rule in mix.rules:
        if tensor.role not in rule.roles or (rule.grouped and not _is_grouped(tensor, tensors)):
            continue
        if rule.layers(tensor.block or 0, layers):
            return rule.format, tensor.role
    return mix.default, ""


def _is_grouped(tensor: TensorInfo, tensors: Sequence[TensorInfo]) -> bool:
    queries = next((t.shape[0] for t in tensors if t.block == tensor.block and t.role == "query"), 0)
    return queries >= GROUPED * tensor.shape[0]
