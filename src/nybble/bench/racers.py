"""Who takes part: pairs of runtime and format, read from `--formats` and `--against`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nybble.bench.adapters import FILES, OURS, adapter_of
from nybble.errors import UsageError, unknown_name
from nybble.formats import format_names, parse_format
from nybble.plan import canonical

DEFAULT_FORMATS = "f32,f16,int8,int4:g32,nf4:g64"
ALIASES = {"f32": "fp32", "f16": "fp16"}


@dataclass(frozen=True)
class Racer:
    """A runtime with a format."""

    runtime: str
    format: str
    """As the adapter knows it; a format of nybble in its full spelling (`int8:channel`)."""
    label: str
    """As the person wrote it."""

    def __str__(self) -> str:
        return f"{self.runtime} {self.label}"


def parse_formats(spec: str) -> list[Racer]:
    """Racers of nybble's engine from `f32,int8,int4:g32,nf4:g64,dq`, each format once.

    A part that is no format of its own but an option of the one before it belongs to that one. Raises UsageError for an
    unknown format, or none.
    """
    parts: list[str] = []
    for part in (part.strip() for part in spec.split(",")):
        head = part.partition(":")[0]
        if parts and head not in format_names() and head not in ALIASES and _is_format(f"{parts[-1]},{part}"):
            parts[-1] += f",{part}"
        elif part:
            parts.append(part)
    if not parts:
        raise UsageError(f"no formats; name some of {', '.join(format_names())}")
    racers: dict[str, Racer] = {}
    for part in parts:
        racers.setdefault(_full(part), Racer(OURS, _full(part), part))
    return list(racers.values())


def parse_against(spec: str) -> list[Racer]:
    """Racers of peers from `torch,llama.cpp:Q4_0`: all formats of a runtime, or one. UsageError for unknown names."""
    parts: list[str] = []
    for part in (part.strip() for part in spec.split(",")):
        if parts and part and part.partition(":")[0] not in FILES and ":" in parts[-1]:
            parts[-1] += f",{part}"  # an option of a format
        elif part:
            parts.append(part)
    racers: list[Racer] = []
    for part in parts:
        runtime, colon, label = part.partition(":")
        if runtime not in FILES or runtime == OURS:
            raise unknown_name("peer", runtime, (name for name in FILES if name != OURS))
        racers += [_peer(runtime, label)] if colon else [Racer(runtime, f, f) for f in adapter_of(runtime).formats]
    return list(dict.fromkeys(racers))


def check_pythons(pythons: Sequence[tuple[str, str]], racers: Sequence[Racer]) -> dict[str, str]:
    """Runtime -> Python of its own. Raises UsageError for one that does not race, or that needs nybble itself."""
    peers = sorted({racer.runtime for racer in racers} - {OURS})
    for name, _ in pythons:
        if name not in peers:
            racing = f"--against names {', '.join(peers)}" if peers else "--against names no peer"
            raise UsageError(f"--peer-python is for {name!r}, but {racing}")
        for racer in racers:
            if racer.runtime == name and racer.format not in adapter_of(name).formats:
                raise UsageError(f"{racer} runs nybble's modules, so in nybble's Python: leave out --peer-python {name}=...")
    return dict(pythons)


def _peer(runtime: str, label: str) -> Racer:
    known = {name.lower(): name for name in adapter_of(runtime).formats}
    if label.lower() in known:
        return Racer(runtime, known[label.lower()], known[label.lower()])
    if runtime != "torch":
        raise unknown_name(f"format of {runtime}", label, known.values())
    # Any other format of torch is nybble's packed modules; a float one is among its own.
    full = _full(label)
    return Racer(runtime, full, full if full in known else label)


def _full(spec: str) -> str:
    return canonical(ALIASES.get(spec, spec))


def _is_format(spec: str) -> bool:
    try:
        parse_format(spec)
    except UsageError:
        return False
    return True
