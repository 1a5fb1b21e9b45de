"""Variants: what is compared, as spec strings `FORMAT[+METHOD]`, e.g. `int4:g64` or `int4:g64,asym+rtn:mse`."""

from __future__ import annotations

from dataclasses import dataclass

from nybble.errors import UsageError
from nybble.formats import format_names
from nybble.methods import parse_method
from nybble.mixes import mix_names
from nybble.plan import CAST_TAGS, canonical

DEFAULT = (
    "fp32",
    "fp16",
    "bf16",
    "int8:tensor",
    "int8:tensor,asym",
    "int8:channel",
    "int4:g64",
    "int4:g64,asym",
    "nf4:g64",
    "nf4:g64,dq",
    "fp4:g64",
    "int3:g64",
    "int2:g64",
)
FAST = ("fp32", "int8:channel", "int4:g64")
ALL = (
    *DEFAULT,
    "int8:channel,asym",
    "int6:g64",
    "int5:g64",
    "int4:channel",
    "int4:g32",
    "int4:g128",
    "int4:g64+rtn:mse",
    "int4:g64,asym+rtn:mse",
    "nf4:g64+rtn:mse",
    "fp4:g64,dq",
    "int3:g64+rtn:mse",
    "int2:g64+rtn:mse",
    "q8_0",
    "mix:q6_k",
    "q5_k_m",
    "q4_k_m",
    "mix:q4_0",
    "mix:iq4_xs",
    "mxfp4",
    "q3_k_m",
    "mix:q2_k",
)
SETS = {"default": DEFAULT, "fast": FAST, "all": ALL}
BASELINE = "fp32"


@dataclass(frozen=True)
class Variant:
    """A format or mix, and the method that chooses the codes."""

    format: str
    method: str

    def __str__(self) -> str:
        return self.format if self.method in ("rtn", "cast") else f"{self.format}+{self.method}"


def parse_variant(spec: str) -> Variant:
    """One variant. Raises UsageError for an unknown format or method."""
    fmt, plus, method = spec.strip().partition("+")
    name = canonical(fmt)
    if name in CAST_TAGS:
        if not plus:
            return Variant(name, "cast")
        if not parse_method(method).settings.prunes:
            raise UsageError(f"variant {spec!r}: {name} is a cast and takes no method but those that prune")
    return Variant(name, str(parse_method(method)) if plus else "rtn")


def parse_variants(spec: str) -> list[Variant]:
    """The variants of `default`, `fast`, `all` or a list `NAME,NAME,...`, the float baseline first, each once.

    A format's options also follow commas: a part that begins with no format name belongs to the one before it.
    """
    parts: list[str] = []
    for part in spec.split(","):
        is_option = part.strip().partition("+")[0] in ("asym", "dq")
        if part.strip() in SETS:
            parts.extend(SETS[part.strip()])
        elif is_option and parts:
            parts[-1] += f",{part.strip()}"
        elif part.strip():
            parts.append(part.strip())
    if not parts:
        raise UsageError(f"no variants; name some ({', '.join((*format_names(), *mix_names()))}) or one of {', '.join(SETS)}")
    return list(dict.fromkeys([parse_variant(BASELINE), *map(parse_variant, parts)]))
