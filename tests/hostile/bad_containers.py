"""Quantized folders whose settings are broken, or whose tensors are not what the settings say: every container."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from catalogue import Build, Case
from good import BLOCK, write_folder

from nybble.errors import FileFormatError
from nybble.files.safetensors import SafetensorsFile, write

Q = f"{BLOCK}.self_attn.q_proj"
SPARSE = "nybble-sparse"
ABSENT = object()


def quantized(variant: str, change: Callable[[dict[str, Any]], Any]) -> Build:
    """A good folder whose quantization_config is changed in place, or replaced by what the change gives."""

    def build(folder: Path) -> None:
        write_folder(folder, variant)
        config = json.loads((folder / "config.json").read_text())
        settings = config["quantization_config"]
        changed = change(settings)
        config["quantization_config"] = settings if changed is None else changed
        (folder / "config.json").write_text(json.dumps(config))

    return build


def setting(variant: str, key: str, value: Any) -> Build:
    """A good folder with one setting of another value, or without it (ABSENT)."""

    def change(settings: dict[str, Any]) -> None:
        settings.pop(key, None)
        if value is not ABSENT:
            settings[key] = value

    return quantized(variant, change)


def scheme(variant: str, **changes: Any) -> Build:
    """A compressed-tensors folder whose only scheme is changed."""
    return quantized(variant, lambda s: s["config_groups"]["group_0"]["weights"].update(changes))


def ours(change: Callable[[dict[str, Any]], object]) -> Build:
    """A folder of nybble's whose entry of one weight is changed in place."""

    def settings(found: dict[str, Any]) -> None:
        change(found["tensors"][f"{Q}.weight"])

    return quantized("nybble", settings)


def tensors(variant: str, name: str, new: Callable[[np.ndarray], np.ndarray | None], tag: str | None = None) -> Build:
    """A good folder with one tensor changed, or left out (None)."""

    def build(folder: Path) -> None:
        write_folder(folder, variant)
        path = folder / "model.safetensors"
        file = SafetensorsFile(path)
        arrays = {n: file.read(n).copy() for n in file.entries}
        tags = {n: entry.dtype for n, entry in file.entries.items()}
        changed = new(arrays.pop(name))
        del tags[name]
        if changed is not None:
            arrays[name] = changed
            if tag is not None:
                tags[name] = tag
        write(path, arrays, file.metadata, tags)

    return build


def gone(array: np.ndarray) -> None:
    return None


def at_first(value: float) -> Callable[[np.ndarray], np.ndarray]:
    """The first element is this."""

    def change(array: np.ndarray) -> np.ndarray:
        array.reshape(-1)[0] = value
        return array

    return change


def state(change: Callable[[dict[str, Any]], Any] | bytes) -> Build:
    """A bitsandbytes folder with another quant_state."""

    def new(array: np.ndarray) -> np.ndarray:
        if isinstance(change, bytes):
            return np.frombuffer(change, np.uint8)
        found = json.loads(array.tobytes())
        change(found)
        return np.frombuffer(json.dumps(found).encode(), np.uint8)

    return tensors("bitsandbytes", f"{Q}.weight.quant_state.bitsandbytes__nf4", new)


def metadata(text: str) -> Build:
    """A folder of nybble's with another provenance."""

    def build(folder: Path) -> None:
        write_folder(folder, "nybble")
        path = folder / "model.safetensors"
        file = SafetensorsFile(path)
        arrays = {n: file.read(n).copy() for n in file.entries}
        write(path, arrays, {"nybble": text}, {n: entry.dtype for n, entry in file.entries.items()})

    return build


NYBBLE: dict[str, tuple[Build, str]] = {
    "nybble, no version": (setting("nybble", "container", ABSENT), "container version None"),
    "nybble, version 2": (setting("nybble", "container", 2), "container version 2; this nybble reads 1"),
    "nybble, version true": (setting("nybble", "container", True), "container version True"),
    "nybble, version is a text": (setting("nybble", "container", "1"), "container version '1'"),
    "nybble, no tensors": (setting("nybble", "tensors", ABSENT), "not a map of tensor names"),
    "nybble, tensors is a list": (setting("nybble", "tensors", []), "not a map of tensor names"),
    "nybble, a tensor is a text": (setting("nybble", "tensors", {"w": "int4"}), "quantization_config of tensor 'w'"),
    "nybble, a tensor is null": (setting("nybble", "tensors", {"w": None}), "quantization_config of tensor 'w'"),
    "nybble, a tensor without a format": (ours(lambda t: t.pop("format")), "quantization_config of tensor"),
    "nybble, a tensor without a shape": (ours(lambda t: t.pop("shape")), "quantization_config of tensor"),
    "nybble, a format that nobody knows": (ours(lambda t: t.update(format="evil")), "unknown format 'evil'"),
    "nybble, a format like a path": (ours(lambda t: t.update(format="../../evil")), "unknown format"),
    "nybble, a format of a megabyte": (ours(lambda t: t.update(format="a" * 1_000_000)), "is not a spec string"),
    "nybble, a format with a line break": (ours(lambda t: t.update(format="int4\n\x1b[2J")), "unknown format"),
    "nybble, a format with an unknown option": (ours(lambda t: t.update(format="int4:g32,evil")), "unknown option 'evil'"),
    "nybble, a format that is a list": (ours(lambda t: t.update(format=["int4"])), "is not a spec string"),
    "nybble, a shape of one size": (ours(lambda t: t.update(shape=[64])), "quantization_config of tensor"),
    "nybble, a shape of text": (ours(lambda t: t.update(shape="64")), "quantization_config of tensor"),
    "nybble, a shape with 0": (ours(lambda t: t.update(shape=[0, 64])), "not two positive integers"),
    "nybble, a shape that is negative": (ours(lambda t: t.update(shape=[-64, -64])), "not two positive integers"),
    "nybble, a shape of floats": (ours(lambda t: t.update(shape=[64.0, 64.0])), "not two positive integers"),
    "nybble, a shape with true": (ours(lambda t: t.update(shape=[64, True])), "not two positive integers"),
    "nybble, a shape of 2^62": (ours(lambda t: t.update(shape=[1 << 62, 64])), "needs uint8"),
    "nybble, another shape": (ours(lambda t: t.update(shape=[64, 128])), "needs uint8"),
    "nybble, another format": (ours(lambda t: t.update(format="int8:channel")), f"{Q}.weight"),
    "nybble, inputs of an unknown kind": (ours(lambda t: t.update(activations={"scheme": "evil"})), "activations"),
    "nybble, inputs that are a text": (ours(lambda t: t.update(activations="dynamic")), "activations"),
    "nybble, inputs for a table": (
        quantized("nybble", lambda s: s["tensors"][f"{BLOCK}.self_attn.k_proj.weight"].update(activations={"scheme": "dynamic"})),
        "need an integer format",
    ),
    "nybble, codes are missing": (tensors("nybble", f"{Q}.weight.codes", gone), f"lacks tensor '{Q}.weight.codes'"),
    "nybble, codes of another type": (tensors("nybble", f"{Q}.weight.codes", lambda a: a.view(np.int8)), f"{Q}.weight"),
    "nybble, codes of another shape": (tensors("nybble", f"{Q}.weight.codes", lambda a: a[:-1]), f"{Q}.weight"),
    "nybble, a scale that is NaN": (tensors("nybble", f"{Q}.weight.scale", at_first(float("nan"))), f"{Q}.weight"),
    "nybble, a scale that is infinite": (tensors("nybble", f"{Q}.weight.scale", at_first(float("inf"))), f"{Q}.weight"),
    "nybble-sparse, a mask that keeps more": (tensors(SPARSE, f"{Q}.weight.mask", at_first(255)), "kept is uint8"),
    "nybble-sparse, a mask of another shape": (tensors(SPARSE, f"{Q}.weight.mask", lambda a: a[:-1]), "mask is uint8"),
    "nybble-sparse, a mask of another type": (tensors(SPARSE, f"{Q}.weight.mask", lambda a: a.view(np.int8)), "mask is int8"),
    "nybble-sparse, too few codes": (tensors(SPARSE, f"{Q}.weight.kept", lambda a: a[:-1]), "kept is uint8"),
    "nybble-sparse, no codes": (tensors(SPARSE, f"{Q}.weight.kept", gone), f"lacks tensor '{Q}.weight.kept'"),
    "nybble-sparse, no mask": (tensors(SPARSE, f"{Q}.weight.mask", gone), f"lacks tensor '{Q}.weight.codes'"),
    "nybble-sparse, a scale that is NaN": (tensors(SPARSE, f"{Q}.weight.scale", at_first(float("nan"))), "are not finite"),
    "nybble-sparse, a format that nobody knows": (
        quantized(SPARSE, lambda s: s["tensors"][f"{Q}.weight"].update(format="evil")),
        "unknown format 'evil'",
    ),
    "nybble, a provenance that is not JSON": (metadata("{"), "its provenance is not JSON"),
    "nybble, a provenance that nests 100,000 deep": (metadata("[" * 100_000), "its provenance"),
}
WORDS: dict[str, tuple[Build, str]] = {
    "gptq, no bits": (setting("gptq", "bits", ABSENT), "bits of quantization_config is None"),
    "gptq, 5 bits": (setting("gptq", "bits", 5), "bits of quantization_config is 5"),
    "gptq, bits is true": (setting("gptq", "bits", True), "bits of quantization_config is True"),
    "gptq, 4.0 bits": (setting("gptq", "bits", 4.0), "bits of quantization_config is 4.0"),
    "gptq, other bits than it has": (setting("gptq", "bits", 8), "qweight'? has 8 rows, it must have 16"),
    "gptq, groups of 0": (setting("gptq", "group_size", 0), "group_size of quantization_config is 0"),
    "gptq, groups of -2": (setting("gptq", "group_size", -2), "group_size of quantization_config is -2"),
    "gptq, groups of 2^40": (setting("gptq", "group_size", 1 << 40), "group_size of quantization_config"),
    "gptq, groups are a text": (setting("gptq", "group_size", "32"), "group_size of quantization_config is '32'"),
    "gptq, other groups than it has": (setting("gptq", "group_size", 64), "scales'? has 2 groups, it must have 1"),
    "gptq, groups of 33": (setting("gptq", "group_size", 33), "groups of 33 columns"),
    "gptq, an unknown version": (setting("gptq", "checkpoint_format", "gptq_v9"), "checkpoint_format .* 'gptq_v9'"),
    "gptq, a version that is a list": (setting("gptq", "checkpoint_format", ["gptq"]), "checkpoint_format"),
    "gptq, no scales": (tensors("gptq", f"{Q}.scales", gone), f"tensor '{Q}.scales' is missing"),
    "gptq, no zero points": (tensors("gptq", f"{Q}.qzeros", gone), f"tensor '{Q}.qzeros' is missing"),
    "gptq, codes of another type": (tensors("gptq", f"{Q}.qweight", lambda a: a.view(np.uint32)), "is U32, it must be I32"),
    "gptq, codes in one dimension": (tensors("gptq", f"{Q}.qweight", lambda a: a.reshape(-1)), "it must be"),
    "gptq, codes of no rows": (tensors("gptq", f"{Q}.qweight", lambda a: a[:0]), "it must be"),
    "gptq, a row of codes missing": (tensors("gptq", f"{Q}.qweight", lambda a: a[:-1]), "qweight'? has 7 rows"),
    "gptq, a scale too few": (tensors("gptq", f"{Q}.scales", lambda a: a[:, :-1].copy()), "scales' has shape"),
    "gptq, scales are whole numbers": (tensors("gptq", f"{Q}.scales", lambda a: a.view(np.int16)), "is I16, it must be F16"),
    "gptq, a scale that is NaN": (tensors("gptq", f"{Q}.scales", at_first(float("nan"))), "values that are not finite"),
    "gptq, a zero point too few": (tensors("gptq", f"{Q}.qzeros", lambda a: a[:, :-1].copy()), "qzeros' has shape"),
    "gptq, a group that is negative": (tensors("gptq", f"{Q}.g_idx", at_first(-1)), "names group -1; there are 2"),
    "gptq, a group beyond all": (tensors("gptq", f"{Q}.g_idx", at_first((1 << 31) - 1)), "names group 2147483647"),
    "gptq, groups in another order": (
        tensors("gptq", f"{Q}.g_idx", lambda a: np.arange(len(a), dtype=np.int32) % 2),
        "puts column 1 into group 1",
    ),
    "awq, 8 bits": (setting("awq", "bits", 8), "bits of quantization_config is 8"),
    "awq, another order": (setting("awq", "version", "gemv"), "version of quantization_config is 'gemv'"),
    "awq, an order that is a number": (setting("awq", "version", 3), "version of quantization_config is 3"),
    "awq, groups of 31": (setting("awq", "group_size", 31), "group_size of quantization_config is 31"),
    "awq, other groups than it has": (setting("awq", "group_size", 64), "it must be"),
    "awq, no scales": (tensors("awq", f"{Q}.scales", gone), f"tensor '{Q}.scales' is missing"),
    "awq, no zero points": (tensors("awq", f"{Q}.qzeros", gone), f"tensor '{Q}.qzeros' is missing"),
    "awq, codes of another type": (tensors("awq", f"{Q}.qweight", lambda a: a.astype(np.int64)), "is I64, it must be I32"),
    "awq, half of its rows": (tensors("awq", f"{Q}.qweight", lambda a: a[:32]), "it must be"),
    "awq, a scale that is infinite": (tensors("awq", f"{Q}.scales", at_first(float("inf"))), "values that are not finite"),
}
COMPRESSED: dict[str, tuple[Build, str]] = {
    "compressed-tensors, no groups": (setting("compressed-tensors", "config_groups", ABSENT), "config_groups"),
    "compressed-tensors, groups are a list": (setting("compressed-tensors", "config_groups", []), "config_groups"),
    "compressed-tensors, a group is a text": (setting("compressed-tensors", "config_groups", {"g": "x"}), "g"),
    "compressed-tensors, a group without weights": (setting("compressed-tensors", "config_groups", {"g": {}}), "weights|config"),
    "compressed-tensors, a group by name of a preset": (
        setting("compressed-tensors", "config_groups", {"W4A16": ["Linear"]}),
        "W4A16",
    ),
    "compressed-tensors, 5 bits": (scheme("compressed-tensors", num_bits=5), "num_bits|5"),
    "compressed-tensors, bits are a text": (scheme("compressed-tensors", num_bits="4"), "num_bits"),
    "compressed-tensors, floats": (scheme("compressed-tensors", type="float"), "float"),
    "compressed-tensors, groups of 0": (scheme("compressed-tensors", group_size=0), "group_size"),
    "compressed-tensors, groups of -1 where groups are": (scheme("compressed-tensors", group_size=-5), "group_size"),
    "compressed-tensors, groups are a text": (scheme("compressed-tensors", group_size="32"), "group_size"),
    "compressed-tensors, an unknown strategy": (scheme("compressed-tensors", strategy="evil"), "strategy|evil"),
    "compressed-tensors, symmetric is a text": (scheme("compressed-tensors", symmetric="yes"), "symmetric|yes"),
    "compressed-tensors, other bits than it has": (scheme("compressed-tensors", num_bits=8), "no config group fits"),
    "compressed-tensors, asymmetric without zero points": (scheme("compressed-tensors", symmetric=False), "no config group fits"),
    "compressed-tensors, a scheme for the cache": (
        setting("compressed-tensors", "kv_cache_scheme", {"num_bits": 8}),
        "has a kv_cache_scheme",
    ),
    "compressed-tensors, an unknown status": (setting("compressed-tensors", "quantization_status", "frozen"), "'frozen'"),
    "compressed-tensors, an unknown format": (
        quantized("compressed-tensors", lambda s: s["config_groups"]["group_0"].update(format="marlin-24")),
        "has format 'marlin-24'",
    ),
    "compressed-tensors, no shape": (tensors("compressed-tensors", f"{Q}.weight_shape", gone), "weight_shape' is missing"),
    "compressed-tensors, a shape of 2^62": (
        tensors("compressed-tensors", f"{Q}.weight_shape", at_first(1 << 62)),
        "not two sizes",
    ),
    "compressed-tensors, a shape below 0": (tensors("compressed-tensors", f"{Q}.weight_shape", at_first(-64)), "not two sizes"),
    "compressed-tensors, a shape that does not fit": (
        tensors("compressed-tensors", f"{Q}.weight_shape", at_first(65)),
        "it must be",
    ),
    "compressed-tensors, no scales": (tensors("compressed-tensors", f"{Q}.weight_scale", gone), "weight_scale'? is missing"),
    "compressed-tensors, a scale that is NaN": (
        tensors("compressed-tensors", f"{Q}.weight_scale", at_first(float("nan"))),
        "values that are not finite",
    ),
}
BITSANDBYTES: dict[str, tuple[Build, str]] = {
    "bitsandbytes, neither 4 nor 8 bits": (setting("bitsandbytes", "load_in_4bit", False), "one of them is true"),
    "bitsandbytes, both 4 and 8 bits": (setting("bitsandbytes", "load_in_8bit", True), "one of them is true"),
    "bitsandbytes, 4 bits is a text": (setting("bitsandbytes", "load_in_4bit", "yes"), "load_in_4bit of quantization_config"),
    "bitsandbytes, a state that is not JSON": (state(b"{]"), "is not JSON"),
    "bitsandbytes, a state that is a pickle": (state(b"cos\nsystem\n(S'true'\ntR."), "is not JSON"),
    "bitsandbytes, a state that is not UTF-8": (state(b"\xff\xfe"), "is not JSON"),
    "bitsandbytes, a state that is a list": (state(b"[]"), "holds a list, not an object"),
    "bitsandbytes, a state that nests deep": (state(b"[" * 2000 + b"]" * 2000), "nests deeper"),
    "bitsandbytes, a state of 10,000 bytes": (state(b" " * 10_000), "has 10000 bytes, the limit is 4096"),
    "bitsandbytes, a state with a key twice": (state(b'{"shape": [64, 64], "shape": [1, 1]}'), "stands twice"),
    "bitsandbytes, a state of another type": (state(lambda s: s.update(quant_type="fp4")), "quant_type of its quant_state"),
    "bitsandbytes, blocks of 0": (state(lambda s: s.update(blocksize=0)), "blocksize of its quant_state is 0"),
    "bitsandbytes, blocks of 2^40": (state(lambda s: s.update(blocksize=1 << 40)), "blocksize of its quant_state"),
    "bitsandbytes, blocks are true": (state(lambda s: s.update(blocksize=True)), "blocksize of its quant_state is True"),
    "bitsandbytes, other blocks than it has": (state(lambda s: s.update(blocksize=64)), "it must be"),
    "bitsandbytes, a shape of one size": (state(lambda s: s.update(shape=[4096])), "shape of its quant_state"),
    "bitsandbytes, a shape of 2^62": (state(lambda s: s.update(shape=[1 << 62, 64])), "shape of its quant_state"),
    "bitsandbytes, a shape that wraps to the right size": (
        state(lambda s: s.update(shape=[(1 << 31) + 64, 1 << 31])),
        "it must be",
    ),
    "bitsandbytes, another shape": (state(lambda s: s.update(shape=[64, 128])), "it must be"),
    "bitsandbytes, an unknown dtype": (state(lambda s: s.update(dtype="os.system")), "dtype of its quant_state"),
    "bitsandbytes, an offset that is a text": (state(lambda s: s.update(nested_offset="0")), "nested_offset"),
    "bitsandbytes, an offset of 1e300": (state(lambda s: s.update(nested_offset=1e300)), "nested_offset"),
    "bitsandbytes, no scales": (tensors("bitsandbytes", f"{Q}.weight.absmax", gone), "absmax' is missing"),
    "bitsandbytes, a scale too few": (tensors("bitsandbytes", f"{Q}.weight.absmax", lambda a: a[:-1]), "absmax' has shape"),
    "bitsandbytes, another table": (tensors("bitsandbytes", f"{Q}.weight.quant_map", at_first(-2.0)), "another table"),
    "bitsandbytes, a table too short": (
        tensors("bitsandbytes", f"{Q}.weight.quant_map", lambda a: a[:-1]),
        "quant_map' has shape",
    ),
    "bitsandbytes, nested scales that are NaN": (
        tensors("bitsandbytes", f"{Q}.weight.nested_absmax", at_first(float("nan"))),
        "values that are not finite",
    ),
    "bitsandbytes, half of its codes": (tensors("bitsandbytes", f"{Q}.weight", lambda a: a[: len(a) // 2]), "it must be"),
    "bitsandbytes, codes of another type": (
        tensors("bitsandbytes", f"{Q}.weight", lambda a: a.view(np.int8)),
        "is I8, it must be U8",
    ),
    "bitsandbytes, 8 bits with a threshold below 0": (
        setting("bitsandbytes-int8", "llm_int8_threshold", -1),
        "llm_int8_threshold",
    ),
    "bitsandbytes, 8 bits with a threshold of text": (
        setting("bitsandbytes-int8", "llm_int8_threshold", "6"),
        "llm_int8_threshold",
    ),
    "bitsandbytes, 8 bits with a row too few": (tensors("bitsandbytes-int8", f"{Q}.SCB", lambda a: a[:-1]), "it must be"),
    "bitsandbytes, 8 bits with a row that is NaN": (
        tensors("bitsandbytes-int8", f"{Q}.SCB", at_first(float("nan"))),
        "values that are not finite",
    ),
    "bitsandbytes, 8 bits in an unknown order": (
        tensors("bitsandbytes-int8", f"{Q}.weight_format", lambda a: a + np.uint8(1)),
        "is 1; only 0",
    ),
}

CASES: dict[str, Case] = {
    name: Case("config", build, match, FileFormatError)
    for table in (NYBBLE, WORDS, COMPRESSED, BITSANDBYTES)
    for name, (build, match) in table.items()
}
