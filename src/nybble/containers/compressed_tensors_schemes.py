"""The settings of compressed-tensors: which schemes the modules of a folder have, as config.json says it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nybble.containers.hf_folder import Folder
from nybble.containers.integers import WHOLE_ROW
from nybble.errors import FileFormatError, shown

BITS = (2, 4, 8)
PACKED, INT = "pack-quantized", "int-quantized"
MOST_SCHEMES = 64
Wrong = Callable[[str, Any, str], FileFormatError]
"""The error for a setting: (key, value, what nybble reads)."""


@dataclass(frozen=True)
class Scheme:
    """How the weights of some modules are stored, and what becomes of their inputs."""

    bits: int
    group: int
    """Columns of a group; -1: a row."""
    whole: bool
    """One scale for the matrix (strategy tensor)."""
    asymmetric: bool
    packed: bool
    inputs: str = ""
    """`dynamic`, `static` or empty: they stay floats."""

    def entry(self, targets: list[str]) -> dict[str, Any]:
        """The config group of a scheme, for modules named in `targets`."""
        weights = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": not self.asymmetric,
            "strategy": "channel" if self.group == WHOLE_ROW else "group",
            "group_size": None if self.group == WHOLE_ROW else self.group,
            "dynamic": False,
        }
        inputs = None
        if self.inputs:
            inputs = {
                "num_bits": 8,
                "type": "int",
                "symmetric": self.inputs == "dynamic",
                "strategy": "token" if self.inputs == "dynamic" else "tensor",
                "group_size": None,
                "dynamic": self.inputs == "dynamic",
                "observer": None if self.inputs == "dynamic" else "minmax",
            }
        return {
            "targets": targets,
            "weights": weights,
            "input_activations": inputs,
            "output_activations": None,
            "format": PACKED if self.packed else INT,
        }


def read_schemes(folder: Folder) -> list[Scheme]:
    """The different schemes of the config groups. Raises FileFormatError for one that nybble does not compute."""
    groups = folder.settings.get("config_groups")
    if not isinstance(groups, dict) or not 0 < len(groups) <= MOST_SCHEMES:
        raise folder.broken(f"config_groups of quantization_config is {shown(groups)}, not 1 to {MOST_SCHEMES} groups")
    overall = folder.settings.get("format")
    return list(dict.fromkeys(_scheme(folder, name, group, overall) for name, group in groups.items()))


def _scheme(folder: Folder, name: str, group: Any, overall: Any) -> Scheme:
    def wrong(key: str, value: Any, allowed: str) -> FileFormatError:
        return folder.broken(f"config group {shown(name)} has {key} {shown(value)}; nybble reads {allowed}")

    if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
        raise folder.broken(f"config group {shown(name)} has no settings of weights")
    weights: dict[str, Any] = group["weights"]
    kind = group.get("format") or overall
    if kind not in (PACKED, INT, "naive-quantized"):
        raise wrong("format", kind, f"{PACKED}, {INT} and naive-quantized")
    if weights.get("type", "int") != "int":
        raise wrong("type", weights.get("type"), "int")
    bits = weights.get("num_bits", 8)
    if type(bits) is not int or bits not in BITS:
        raise wrong("num_bits", bits, ", ".join(map(str, BITS)))
    size = weights.get("group_size")
    strategy = weights.get("strategy") or ("tensor" if size is None else "channel" if size == WHOLE_ROW else "group")
    if strategy not in ("tensor", "channel", "group"):
        raise wrong("strategy", strategy, "tensor, channel and group")
    if strategy == "group" and (type(size) is not int or not 0 < size < 1 << 24):
        raise wrong("group_size", size, "a number of columns")
    if weights.get("dynamic"):
        raise wrong("dynamic", weights["dynamic"], "weights that are stored, false")
    if not isinstance(weights.get("symmetric", True), bool):
        raise wrong("symmetric", weights["symmetric"], "true and false")
    if group.get("output_activations"):
        raise wrong("output_activations", group["output_activations"], "null")
    return Scheme(
        bits,
        WHOLE_ROW if strategy != "group" or size is None else int(size),
        strategy == "tensor",
        not weights.get("symmetric", True),
        kind == PACKED,
        _input_scheme(group.get("input_activations"), wrong),
    )


def _input_scheme(entry: Any, wrong: Wrong) -> str:
    if not entry:
        return ""
    stated = {key: entry.get(key) for key in ("num_bits", "type", "strategy", "dynamic")} if isinstance(entry, dict) else {}
    if stated == {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True} and entry.get("symmetric", True) is True:
        return "dynamic"
    if stated == {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False}:
        return "static"
    raise wrong("input_activations", entry, "8-bit int, dynamic for each token (symmetric) or static for the tensor")
