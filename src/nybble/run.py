"""A plan carried out: a float model in, a quantized model out (quantized.py)."""

from __future__ import annotations

import copy
import platform
from collections.abc import Callable, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel

from nybble.calibrate.histogram import input_histograms
from nybble.calibrate.importance import check_windows, input_importance
from nybble.calibrate.self_written import written_windows
from nybble.calibrate.source import SELF
from nybble.calibrate.windows import CALIBRATION_WINDOWS
from nybble.calibrate.workers import Workers
from nybble.edits import Edit, apply_edits, summary
from nybble.errors import BlocksError, InputError, NumericError
from nybble.finished import FinishedBlocks
from nybble.formats import QTensor, parse_format
from nybble.formats.activations import Activations
from nybble.methods import Method, parse_method
from nybble.methods.steps.choose import Account
from nybble.methods.steps.observe import static_grid
from nybble.models.checkpoint import open_checkpoint
from nybble.models.describe import TAGS, describe, sites
from nybble.models.float_weights import float_weight, weight_view
from nybble.models.gelu import quick_activations
from nybble.models.loading import DTYPES, evaluating, lay_out_for_half, load_model, quiet
from nybble.models.packed import PackedWeight
from nybble.models.replace import replace_weights
from nybble.models.shelf import Shelf
from nybble.plan import Plan, Recipe, make_plan, prunes
from nybble.quantized import Quantized, stored_tensor
from nybble.version import __version__
from nybble.walk import Walk

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, steps done, steps in all)."""


def quantize(
    model: str | Path | PreTrainedModel,
    format: str,
    method: str = "rtn",
    calibration: NDArray[np.integer[Any]] | str | Sequence[str] | None = None,
    keep: Sequence[str] = (),
    rules: Sequence[tuple[str, str]] = (),
    progress: Progress | None = None,
    windows: int = CALIBRATION_WINDOWS,
    window: int | None = None,
    seed: int = 0,
    packing: bool = True,
    finished: FinishedBlocks | None = None,
) -> Quantized:
    """Quantize a model folder, or a transformers model in memory (which is left as it is).

    `format` is a spec string (`int4:g64`, `nf4:g64,dq`, `fp16`), `method` too (`rtn`, `gptq`, `gptq:refine=3`, `best`).
    `calibration` is token windows, integers [windows, tokens], or text, of which `windows` windows of `window` tokens (the
    model's context, at most 2048) are drawn with `seed`, as is all that the method itself draws; or "self", and the model
    writes them. A list of texts is joined, or without `packing` each window lies in one of them. Methods that use no data
    ignore it. `finished` keeps blocks that are decided, for a run that goes on. `keep` names weights that stay in float (names
    or globs), `rules` gives others a format of their own.
    Raises UsageError for specs and patterns, InputError for the model or text, NumericError naming the tensor.
    """
    recipe = Recipe(format, str(seeded(method, seed)), tuple(keep), tuple(rules))
    source, owned, stored = None, False, None
    if not isinstance(model, nn.Module):
        checkpoint = open_checkpoint(model)
        if "quantization_config" in checkpoint.config:
            raise InputError(f"{model} is quantized already; quantize the float model it was made from")
        source, owned, stored = checkpoint.folder, True, checkpoint.float_tag
        model = load_model(source)
    elif any(isinstance(module, PackedWeight) for module in model.modules()):
        raise InputError(f"this {type(model).__name__} is quantized already; quantize the float model it was made from")
    plan = make_plan(describe(model, stored), recipe)
    with evaluating(model):
        token_windows = draw_windows(model, plan, calibration, source, windows, window, seed, packing, progress)
        return quantize_by_plan(model, plan, token_windows, source, owned, progress, finished=finished)


def quantize_by_plan(
    model: PreTrainedModel,
    plan: Plan,
    windows: NDArray[np.integer[Any]] | None = None,
    source: Path | None = None,
    consume: bool = False,
    progress: Progress | None = None,
    observe: Callable[[str, NDArray[np.float32], QTensor], None] | None = None,
    places: dict[str, NDArray[np.float32]] | None = None,
    finished: FinishedBlocks | None = None,
) -> Quantized:
    """Carry out a plan on a float model. With `consume` the model's own float weights are given up as they are packed.

    `windows` are calibration windows, integers [windows, tokens], for methods that read any. `observe` is called with
    (name, float weight [N, K], QTensor) for each packed weight; `places` is filled with where a calibrated method would rather
    have each weight, by name, as far as its code stays the nearest. Raises UsageError where a method needs windows and has none.
    """
    method = parse_method(plan.recipe.method)
    provenance = provenance_of(plan, source)
    rows = plan.packed
    known = sites(model)
    formats = {row.tensor.name: parse_format(row.format or "") for row in rows}
    if windows is None and method.settings.calibrated and any(row.method != "cast" for row in rows):
        raise method.lacks_calibration()
    if windows is not None and method.uses_calibration:
        check_windows(model, windows)
        provenance["calibration"] = windows_of(windows)
    packed: dict[str, QTensor] = {}
    accounts: dict[str, Account] = {}
    edits: list[Edit] = []
    edited: set[str] = set()
    moved: dict[str, torch.Tensor] = {}
    importance: dict[str, NDArray[np.float32]] = {}
    if windows is not None and method.settings.walks and not plan.is_cast:
        # nobody needs its float weights again, or they stay
        mine = (consume and observe is None and method.settings.edit == "none") or not method.settings.blockwise
        float_model = model if mine else copy.deepcopy(model)
        try:
            walked = walk(float_model, plan, windows, progress, places, finished)
            packed, accounts, edits, moved = walked.tensors, walked.accounts, walked.edits, walked.moved
            provenance |= done_by(walked)
        except BlocksError:
            if method.settings.blockwise:
                raise
            importance = input_importance(model, windows)
        if any(edit.scale is not None for edit in edits):  # what follows is about the edited float model
            model, consume = model if consume else copy.deepcopy(model), True
            edited, known = apply_edits(model, edits), sites(model)
    pruned = {row.tensor.name for row in rows if prunes(row)}
    for i, (name, fmt) in enumerate(formats.items()):
        weight = float_weight(known[name].modules[0])
        if name not in packed:
            try:
                packed[name] = method.quantize(weight, fmt, importance.get(name), prune=name in pruned)
            except NumericError as error:
                raise NumericError(f"{name}: {error}") from error
        if observe:
            observe(name, weight, packed[name])
        if progress:
            progress(name, i + 1, len(rows))
    packed = {name: packed[name] for name in formats}
    if plan.is_cast:
        target = model if consume else copy.deepcopy(model)
        _cast_state(target, DTYPES[plan.recipe.format])
        return Quantized(target, plan.hash, plan.recipe.format, provenance, source)
    target = model if consume else _copy_without(model, [known[name].modules[0] for name in packed])
    replace_weights(target, packed)
    with torch.no_grad():
        for name, value in moved.items():
            target.get_parameter(name).copy_(value)
    _round_inputs(target, plan, method, windows, progress)
    result = Quantized(target, plan.hash, None, provenance, source)
    result.accounts, result.edits, result.changed = accounts, edits, frozenset(edited | set(moved))
    return result


def walk(
    model: PreTrainedModel,
    plan: Plan,
    windows: NDArray[np.integer[Any]],
    progress: Progress | None,
    places: dict[str, NDArray[np.float32]] | None = None,
    finished: FinishedBlocks | None = None,
    shelf: Shelf | None = None,
    scratch: Path | None = None,
    threads: int | None = None,
) -> Walk:
    """A calibrated method on a model whose weights it replaces on its way. With a shelf, where the weights are, what is decided
    is in `finished` alone."""
    method = parse_method(plan.recipe.method)
    formats = {row.tensor.name: parse_format(row.format or "") for row in plan.packed if row.method != "cast"}
    roles = {row.tensor.name: row.tensor.role for row in plan.packed}
    layers = {name: site.modules[0] for name, site in sites(model).items()}
    fused = [name for name, role in roles.items() if role == "query, key and value"]
    groups = {name: 3 for name in fused if len(weight_view(layers[name])) % 3 == 0}
    with quiet(), quick_activations(model), Workers(threads) as workers:
        walk = Walk(model, layers, formats, method.settings, windows, groups, workers, progress)
        walk.finished, walk.places, walk.scratch = finished, places, scratch
        if shelf is not None:
            walk.shelf, walk.holds = shelf, False
        walk.run()
    return walk


def _round_inputs(
    target: PreTrainedModel,
    plan: Plan,
    method: Method,
    windows: NDArray[np.integer[Any]] | None,
    progress: Progress | None,
) -> None:
    """Give the packed weights of a model the schemes that the plan names. Static grids are those of the inputs that the packed
    model itself has on the calibration windows, none of them rounded yet."""
    weights = {name: module for name, module in target.named_modules() if isinstance(module, PackedWeight)}
    rows = [row for row in plan.packed if row.activations]
    static = [row.tensor.name for row in rows if row.activations == "static"]
    histograms = {}
    if static and windows is not None:
        watched = {name: target.get_submodule(name.rpartition(".")[0]) for name in static}
        histograms = input_histograms(
            target, watched, windows, lambda done, n: progress("observing inputs", done, n) if progress else None
        )
    for row in rows:
        name = row.tensor.name
        if row.activations == "static":
            weights[name].round_inputs(static_grid(histograms[name], method.settings))
        else:
            weights[name].round_inputs(Activations(str(row.activations), threshold=_threshold(method, row.activations)))


def _threshold(method: Method, scheme: str | None) -> float:
    return method.settings.threshold if scheme == "outliers" else 0.0


def _cast_state(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast what is saved. Not `model.to`: tables computed at start (rotary frequencies) stay float32, as when loaded."""
    for info in describe(model):
        if info.dtype in TAGS.values():
            tensor = stored_tensor(model, info.name)
            tensor.data = tensor.data.to(dtype)
    model.config.dtype = dtype
    if dtype != torch.float32:
        lay_out_for_half(model)


def _copy_without(model: PreTrainedModel, owners: list[nn.Module]) -> PreTrainedModel:
    """A deep copy that shares the weights about to be replaced, so that they are not copied for nothing."""
    shared = {id(owner._parameters["weight"]): owner._parameters["weight"] for owner in owners}
    return copy.deepcopy(model, memo=dict(shared))


def draw_windows(
    model: PreTrainedModel,
    plan: Plan,
    calibration: Any,
    source: Path | None,
    count: int,
    length: int | None,
    seed: int,
    packing: bool,
    progress: Progress | None,
) -> NDArray[np.int64] | None:
    """Calibration, as `quantize` takes it, as token windows; None where the method reads none. Only a model that is to write
    them needs its weights."""
    if calibration is None or not parse_method(plan.recipe.method).uses_calibration:
        return None
    if isinstance(calibration, str) and calibration == SELF:
        return written_windows(model, count, length, seed, partial(progress, "writing calibration text") if progress else None)
    if isinstance(calibration, str) or (isinstance(calibration, list | tuple) and all(isinstance(t, str) for t in calibration)):
        return _windows_of_text(model, calibration, source, count, length, seed, packing)
    windows = np.asarray(calibration)
    check_windows(model, windows)
    return windows


def _windows_of_text(
    model: PreTrainedModel,
    text: str | Sequence[str],
    source: Path | None,
    count: int,
    length: int | None,
    seed: int,
    packing: bool,
) -> NDArray[np.int64]:
    from nybble.calibrate.windows import calibration_windows, encode
    from nybble.models.loading import context_length, load_tokenizer

    if source is None:
        raise InputError(
            'calibration is text, but a model in memory has no tokenizer; give token windows [windows, tokens] or "self"'
        )
    tokenizer = load_tokenizer(source)
    texts = [text] if isinstance(text, str) else text
    encoded = [encode(tokenizer, t) for t in (["\n\n".join(texts)] if packing else texts) if packing or t.strip()]
    ids, bos = [ids for ids, _ in encoded], encoded[0][1] if encoded else None
    return calibration_windows(ids[0] if packing else ids, context_length(model), bos, count, length, seed)


def seeded(method: str, seed: int) -> Method:
    """A method that draws with a seed, where it draws and its own options name none."""
    parsed = parse_method(method)
    if seed and parsed.settings.draws and not any(option.startswith("seed=") for option in parsed.options):
        parsed = parse_method(f"{parsed}:seed={seed}")
    return parsed


def windows_of(windows: NDArray[np.integer[Any]]) -> dict[str, Any]:
    """What a file says of the calibration windows."""
    digest = sha256(np.ascontiguousarray(windows, dtype="<i8").tobytes()).hexdigest()
    return {"windows": len(windows), "tokens": windows.shape[1], "sha256": digest}


def done_by(walk: Walk) -> dict[str, Any]:
    """What a file says of a walk, beside its windows."""
    found: dict[str, Any] = {}
    if walk.edits:
        found["edits"] = summary(walk.edits)
    if walk.moved:
        biases = sum(name.endswith("bias") for name in walk.moved)
        found["moved"] = {"biases": biases, "norms": len(walk.moved) - biases}
    if walk.history:  # on the calibration windows that were held back
        best = min(loss for _, loss in walk.history)
        found["tuning"] = {"steps": walk.history[-1][0], "KL before": walk.history[0][1], "KL after": best}
    return found


def provenance_of(plan: Plan, source: Path | None) -> dict[str, Any]:
    """What a file says of how it was made, whatever the method."""
    return {
        "nybble": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "format": plan.recipe.format,
        "method": plan.recipe.method,
        "keep": list(plan.recipe.keep),
        "rules": [list(rule) for rule in plan.recipe.rules],
        "plan_hash": plan.hash,
        "bits_per_weight": round(plan.bpw, 6),
        "source": source.resolve().name if source else None,
        "source_blake3": open_checkpoint(source).digest() if source else None,
    }
