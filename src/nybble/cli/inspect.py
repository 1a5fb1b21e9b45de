"""`nybble inspect`: what is inside a model file or folder. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from nybble.cli import console

NAME = "inspect"
HELP = """Show the tensors, formats, bits and provenance of a model folder, nybble's or another tool's, or of a GGUF file.

\b
nybble inspect model-int4
nybble inspect model.gguf
nybble inspect model-int4/model.safetensors --json
"""

LONGEST = 8
"""Values that a list of the container's own facts may have to be shown."""
WIDEST = 120
"""Characters of one of them."""
_KINDS = {"nybble": "packed by nybble", "float": "floats"}


def run(
    path: Annotated[Path, typer.Argument(help="Model folder, .gguf or .safetensors file.")],
    as_json: Annotated[bool, typer.Option("--json", help="Everything as JSON on standard output.")] = False,
) -> None:
    """Read headers only."""
    facts = _inspect(path)
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
        return
    rows = [
        [t["name"], _with_scheme(t), " x ".join(map(str, t["shape"])), f"{t['bits_per_weight']:.3f}", f"{t['bytes']:,}"]
        for t in facts["tensors"]
    ]
    console.print_table(["tensor", "format", "shape", "bits/weight", "bytes"], rows, left=2)
    typer.echo(f"\n{facts['kind']}: {len(rows)} tensors, {facts['weights']:,} numbers in {facts['bytes']:,} bytes of data, ")
    typer.echo(f"{facts['bits_per_weight']:.4f} bits per weight over all; {facts['file_bytes']:,} bytes on disk")
    for key, value in facts["provenance"].items():
        if value not in (None, [], "", {}):
            text = ", ".join(f"{name} {each}" for name, each in value.items()) if isinstance(value, dict) else value
            typer.echo(console.clean(f"{key:16} {text}"))
    for key, value in _flat(facts["details"]):
        typer.echo(console.clean(f"{key:16} {value}"))


def _inspect(path: Path) -> dict[str, Any]:
    if path.is_file() and path.name.endswith(".safetensors"):
        from nybble.files.native import is_native

        if path.name != "model.safetensors" or not is_native(path.parent):
            return _safetensors(path)
        path = path.parent
    import numpy as np

    from nybble.containers import open_contents
    from nybble.files.safetensors import DTYPES
    from nybble.formats import parse_format

    contents = open_contents(path)
    tensors = []
    for name, (spec, shape) in contents.packed.items():
        scheme = contents.schemes.get(name)
        taken = (parse_format(spec).stored_bits(shape) + (scheme.bits if scheme else 0)) // 8
        tensors.append(_row(name, spec, shape, contents.sizes.get(name, taken)))
        tensors[-1]["activations"] = str(scheme) if scheme else None
    for name, (tag, size) in contents.floats.items():
        tensors.append(_row(name, tag, size, _product(size) * np.dtype(DTYPES[tag]).itemsize))
    return {
        "kind": f"{contents.config.get('model_type')} model, {_KINDS.get(contents.container, contents.container)}",
        "container": contents.container,
        **_sums(tensors),
        "file_bytes": contents.bytes,
        "provenance": dict(contents.provenance),
        "details": _plain(contents.details),
    }


def _safetensors(path: Path) -> dict[str, Any]:
    from nybble.files.safetensors import SafetensorsFile

    file = SafetensorsFile(path)
    tensors = [_row(name, entry.dtype, entry.shape, entry.bytes) for name, entry in file.entries.items()]
    size, provenance = path.stat().st_size, _json(file.metadata.get("nybble"))
    return {"kind": "safetensors file", **_sums(tensors), "file_bytes": size, "provenance": provenance, "details": {}}


def _sums(tensors: list[dict[str, Any]]) -> dict[str, Any]:
    weights, data = sum(t["weights"] for t in tensors), sum(t["bytes"] for t in tensors)
    return {"tensors": tensors, "weights": weights, "bytes": data, "bits_per_weight": 8 * data / max(1, weights)}


def _flat(details: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """(dotted key, value in one line) of what the container says of itself."""
    for key, value in details.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif value not in (None, "", []):
            text = " ".join(str(value).split())
            yield f"{prefix}{key}", text if len(text) <= WIDEST else f"{text[:WIDEST]}... ({len(text)} characters)"


def _plain(value: Any) -> Any:
    """What a container says of itself as JSON has it; long lists by their length."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    items = value.tolist() if hasattr(value, "tolist") else list(value) if isinstance(value, (list, tuple)) else str(value)
    if isinstance(items, list):
        return [_plain(each) for each in items] if len(items) <= LONGEST else f"{len(items)} values"
    return items


def _product(shape: Iterable[int]) -> int:
    weights = 1
    for n in shape:
        weights *= n
    return weights


def _row(name: str, spec: str, shape: tuple[int, ...], size: int) -> dict[str, Any]:
    weights = _product(shape)
    bits = 8 * size / max(1, weights)
    return {"name": name, "format": spec, "shape": list(shape), "weights": weights, "bytes": size, "bits_per_weight": bits}


def _with_scheme(tensor: dict[str, Any]) -> str:
    scheme = tensor.get("activations")
    return f"{tensor['format']}, activations {scheme}" if scheme else str(tensor["format"])


def _json(text: str | None) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
