"""The measuring processes. Started by compare.py; see job.py for the protocol."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

from nybble.errors import NybbleError
from nybble.evaluate.job import Job


def emit(event: str, **fields: Any) -> None:
    """One JSON line on standard output."""
    sys.stdout.write(json.dumps({"event": event, **fields}) + "\n")
    sys.stdout.flush()


def quality(job: Job) -> None:
    """Make, save and evaluate the variants one by one, each when asked for."""
    import torch

    from nybble.evaluate.layers import LayerObserver, histogram_limit
    from nybble.evaluate.quality import LogitCache
    from nybble.evaluate.variants import parse_variant
    from nybble.models.checkpoint import open_checkpoint
    from nybble.models.describe import describe
    from nybble.models.loading import load_model
    from nybble.plan import Recipe, make_plan
    from nybble.quantized import float_weights

    torch.set_num_threads(job.threads)
    model = load_model(job.folder)
    checkpoint = open_checkpoint(job.folder)
    source_hash = checkpoint.digest()
    tensors = describe(model, checkpoint.float_tag)
    plans = []
    for spec in job.variants:  # all of them first: a wrong pattern shows before an hour of work
        variant = parse_variant(spec)
        method = "rtn" if variant.method == "cast" else variant.method
        casting = variant.method == "cast"
        recipe = Recipe(variant.format, method, () if casting else job.keep, () if casting else job.rules)
        plans.append((variant, make_plan(tensors, recipe)))
    windows = _windows(job, model)
    _check_prompt(job, model)
    calibration = _calibration(job, model, [variant.method for variant, _ in plans])
    cache = None
    if windows is not None:

        def report(done: int, total: int) -> None:
            emit("progress", what="float predictions", done=done, total=total)

        cache = LogitCache.create(Path(job.work) / "cache", model, source_hash, windows, job.kl_budget_bytes, progress=report)
    layer_limits = {name: histogram_limit([weight]) for name, weight in float_weights(model)}
    model_limit = histogram_limit(weight for _, weight in float_weights(model))
    emit(
        "ready",
        architecture=type(model).__name__,
        parameters=sum(p.numel() for p in model.parameters()),
        blake3=source_hash,
        torch=torch.__version__,
        text=None
        if windows is None
        else {
            "protocol": windows.protocol,
            "window": windows.length,
            "windows": len(windows),
            "stride": windows.stride if windows.protocol == "stride" else None,
            "scored_tokens": windows.scored_tokens,
            "kl_tokens": cache.tokens if cache else 0,
            "bos": windows.bos is not None,
        },
    )
    for asked in sys.stdin:
        i = int(asked)
        variant, plan = plans[i]
        observer = LayerObserver(plan, model_limit, layer_limits)
        folder = Path(job.work) / f"variant-{i}"
        seconds = _make_variant(model, plan, calibration, Path(job.folder), observer, folder)
        scored, note = _score_folder(folder, windows, cache) if windows is not None else (None, None)
        emit(
            "variant",
            folder=str(folder),
            format=variant.format,
            method=variant.method,
            plan_hash=plan.hash,
            bpw=plan.bpw,
            file_bytes=(folder / "model.safetensors").stat().st_size,
            quantize_seconds=seconds,
            notes=list(plan.notes) + ([scored.note] if scored and scored.note else []) + ([note] if note else []),
            quality=None if scored is None else dataclasses.asdict(scored),
            layers=[dataclasses.asdict(layer) for layer in observer.layers],
            model_histogram_limit=model_limit,
            model_histogram=observer.model_counts.tolist(),
        )


def _make_variant(model: Any, plan: Any, calibration: Any, source: Path, observer: Any, folder: Path) -> float:
    """Quantize and save one variant; returns the seconds that took, without those of looking at every layer."""
    from nybble.run import quantize_by_plan

    looking = 0.0

    def observe(*seen: Any) -> None:
        nonlocal looking
        start = time.perf_counter()
        observer.observe(*seen)
        looking += time.perf_counter() - start

    def report(what: str, done: int, total: int) -> None:
        emit("progress", what=f"quantizing: {what}", done=done, total=total)

    start = time.perf_counter()
    quantized = quantize_by_plan(model, plan, calibration, source, progress=report, observe=observe)
    quantized.save(folder)
    seconds = time.perf_counter() - start - looking
    observer.add_accounts(quantized.accounts)
    del quantized
    gc.collect()
    return seconds


def _score_folder(folder: Path, windows: Any, cache: Any) -> Any:
    """Quality of a saved variant, loaded again from its file, and what is to be said of its activations."""
    from nybble.evaluate.quality import evaluate
    from nybble.models.inputs import count_outliers, outlier_note
    from nybble.quantized import load

    def report(done: int, total: int) -> None:
        emit("progress", what="perplexity", done=done, total=total)

    model = load(folder).model()
    outliers = count_outliers(model)
    scored = evaluate(model, windows, cache, progress=report)
    del model
    note = outlier_note(outliers())
    gc.collect()
    return scored, note


def measure(job: Job, folder: Path) -> None:
    """Memory, speed and text of one saved variant. Nothing else has happened in this process."""
    import torch

    from nybble.evaluate import memory
    from nybble.evaluate.speed import greedy_text, measure_speed, prompt_tokens, top_k_text
    from nybble.models.checkpoint import open_checkpoint
    from nybble.models.loading import context_length, load_tokenizer, warm_up
    from nybble.quantized import load, tensor_bytes

    torch.set_num_threads(job.threads)
    warm_up(open_checkpoint(folder).config)
    tokenizer = load_tokenizer(folder) if job.prompt is not None else None
    memory.release()
    before = memory.resident_bytes()
    memory.reset_peak()
    start = time.perf_counter()
    quantized = load(folder)
    model = quantized.model()
    read_all(model)
    load_seconds = time.perf_counter() - start
    memory.release()
    after_load = memory.resident_bytes()
    context = context_length(model)
    prompt = prompt_tokens(tokenizer, job.prompt) if job.prompt is not None else _random_prompt(model, job.seed)
    speed = measure_speed(model, prompt, job.new_tokens, job.repeats, min(job.prefill_tokens, context), context, job.seed)
    samples: dict[str, str | None] = {"sample_greedy": None, "sample_top_k": None}
    if job.prompt is not None:
        samples["sample_greedy"] = greedy_text(model, tokenizer, job.prompt, job.new_tokens)
        samples["sample_top_k"] = top_k_text(model, tokenizer, job.prompt, job.new_tokens, job.seed)
    peak = memory.peak_bytes()
    weight_bytes, token_bytes = tensor_bytes(model), bytes_per_token(model)
    del model, quantized
    memory.release()
    emit(
        "measured",
        memory_before_bytes=before,
        memory_after_load_bytes=after_load,
        memory_peak_bytes=peak,
        memory_after_cleanup_bytes=memory.resident_bytes(),
        load_seconds=load_seconds,
        first_token_seconds=speed.first_token_seconds,
        seconds_50_tokens=speed.median_seconds,
        seconds_50_tokens_runs=speed.seconds,
        tokens_per_second=speed.tokens_per_second,
        prefill_tokens_per_second=speed.prefill_tokens_per_second,
        weight_bytes=weight_bytes,
        bytes_per_token=token_bytes,
        prompt_ids=prompt,
        **samples,
    )
    emit("done")


def decode(job: Job, folder: Path, prompt: list[int], spawned: float) -> None:
    """Speed and memory of the engine on one saved variant. No torch in this process."""
    from nybble.errors import InputError, NumericError, UsageError
    from nybble.evaluate.decoding import measure_decoding

    try:
        found = measure_decoding(folder, prompt, job.new_tokens, job.repeats, job.prefill_tokens, job.threads, job.seed, spawned)
    except (InputError, NumericError, UsageError) as error:  # torch's figures stand; the reader is told why these do not
        emit("decoded", engine=None, note=f"not decoded by the engine: {error}")
    else:
        emit("decoded", engine=found, note=None)
    emit("done")


def read_all(model: Any) -> None:
    """Read every page of every tensor. safetensors maps files, so that weights are neither read nor resident until used."""
    import torch

    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.detach().reshape(-1).view(torch.uint8)[::512].sum()


def end_with_parent() -> None:
    """Ask the kernel (Linux) to end this process when the one that started it dies, however it dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def bytes_per_token(model: Any) -> int:
    """Bytes of weights that one new token must read: all but the embedding tables that are only looked up."""
    from torch import nn

    from nybble.quantized import tensor_bytes

    read_whole = {id(m.weight) for m in model.modules() if hasattr(m, "weight") and not isinstance(m, nn.Embedding)}
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and id(m.weight) not in read_whole]
    looked_up = {id(m.weight): (tensor_bytes(m), m.num_embeddings) for m in tables}
    return tensor_bytes(model) - sum(size - size // entries for size, entries in looked_up.values())


def _windows(job: Job, model: Any) -> Any:
    from nybble.calibrate.windows import encode, token_windows
    from nybble.models.loading import load_tokenizer, window_length

    if job.text is None:
        return None
    length = window_length(model, job.window)
    ids, bos = encode(load_tokenizer(job.folder), Path(job.text).read_text(encoding="utf-8"))
    return token_windows(ids, length, job.windows, bos, job.protocol, job.stride)


def _check_prompt(job: Job, model: Any) -> None:
    """The timed runs come much later, in other processes: say now that prompt and new tokens do not fit."""
    from nybble.evaluate.speed import check_room, prompt_tokens
    from nybble.models.loading import context_length, load_tokenizer

    prompt = _random_prompt(model, job.seed) if job.prompt is None else prompt_tokens(load_tokenizer(job.folder), job.prompt)
    check_room(prompt, job.new_tokens, context_length(model))


def _calibration(job: Job, model: Any, methods: list[str]) -> Any:
    """Calibration windows for the methods that read any; None where there is no text or no such method."""
    from nybble.calibrate.self_written import written_windows
    from nybble.calibrate.source import SELF
    from nybble.calibrate.windows import calibration_windows, encode
    from nybble.methods import parse_method
    from nybble.models.loading import context_length, load_tokenizer

    if job.calibration is None or not any(m != "cast" and parse_method(m).uses_calibration for m in methods):
        return None
    if job.calibration == SELF:
        return written_windows(model, seed=job.seed)
    ids, bos = encode(load_tokenizer(job.folder), Path(job.calibration).read_text(encoding="utf-8"))
    return calibration_windows(ids, context_length(model), bos, seed=job.seed)


def _random_prompt(model: Any, seed: int) -> list[int]:
    import numpy as np

    vocabulary = model.config.get_text_config().vocab_size
    return [int(i) for i in np.random.default_rng(seed).integers(0, vocabulary, size=8)]


def main(arguments: list[str]) -> int:
    """Entry point of every kind of process."""
    kind, path, *rest = arguments
    end_with_parent()
    try:
        job = Job.read(path)
        if kind == "quality":
            quality(job)
        elif kind == "shape":
            from nybble.models.shapes import make_shape

            make_shape(rest[0], Path(job.folder), job.seed)
            emit("done")
        elif kind == "decode":
            decode(job, Path(rest[0]), json.loads(rest[1]), float(rest[2]))
        else:
            measure(job, Path(rest[0]))
    except NybbleError as error:
        emit("error", type=type(error).__name__, message=str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
