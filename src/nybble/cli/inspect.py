"""`nybble inspect`: what is inside a model file or folder. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nybble.cli import console

if TYPE_CHECKING:
    from nybble.formats.activations import Activations

NAME = "inspect"
HELP = """Show the tensors, formats, bits and provenance of a model folder or safetensors file.

\b
nybble inspect model-int4
nybble inspect model-int4/model.safetensors --json
"""


def run(
    path: Annotated[Path, typer.Argument(help="Model folder or .safetensors file.")],
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
            typer.echo(f"{key:16} {text}")


def _inspect(path: Path) -> dict[str, Any]:
    from nybble.files.native import is_native, open_native
    from nybble.files.safetensors import SafetensorsFile
    from nybble.formats import parse_format
    from nybble.models.checkpoint import open_checkpoint

    packed: dict[str, tuple[str, tuple[int, int]]] = {}
    schemes: dict[str, Activations] = {}
    provenance: dict[str, Any] = {}
    folder = path.parent if path.name == "model.safetensors" else path
    if path.is_dir() or (path.name == "model.safetensors" and is_native(folder)):
        checkpoint = open_checkpoint(folder)
        files = [SafetensorsFile(file) for file in checkpoint.files]
        kind = f"{checkpoint.config.get('model_type')} model"
        if is_native(folder):
            native = open_native(folder)
            packed, schemes, provenance = native.packed, native.schemes, native.provenance
            kind = f"{kind}, packed by nybble"
    else:
        files, kind = [SafetensorsFile(path)], "safetensors file"
    parts = {f"{name}.{suffix}" for name, (spec, shape) in packed.items() for suffix in parse_format(spec).storage(shape)}
    parts |= {f"{name}.{suffix}" for name, scheme in schemes.items() for suffix in scheme.stored()}
    tensors = []
    for name, (spec, shape) in packed.items():
        fmt = parse_format(spec)
        scheme = schemes.get(name)
        tensors.append(_row(name, spec, shape, (fmt.stored_bits(shape) + (scheme.bits if scheme else 0)) // 8))
        tensors[-1]["activations"] = str(scheme) if scheme else None
    for file in files:
        provenance = provenance or _json(file.metadata.get("nybble"))
        tensors += [_row(n, e.dtype, e.shape, e.bytes) for n, e in file.entries.items() if n not in parts]
    weights, data = sum(t["weights"] for t in tensors), sum(t["bytes"] for t in tensors)
    return {
        "kind": kind,
        "tensors": tensors,
        "weights": weights,
        "bytes": data,
        "bits_per_weight": 8 * data / max(1, weights),
        "file_bytes": sum(f.path.stat().st_size for f in files),
        "provenance": provenance,
    }


def _row(name: str, spec: str, shape: tuple[int, ...], size: int) -> dict[str, Any]:
    weights = 1
    for n in shape:
        weights *= n
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
