"""The main job: several variants of one model, measured side by side on the same weights and text.

The parent process imports no torch; it starts the measuring processes (worker.py), merges what they say into records, and
removes everything it made. Each variant's memory and speed are taken in fresh processes, one for torch and one for the
engine, while nothing else runs.
"""

from __future__ import annotations

import datetime
import json
import platform
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from nybble import demo, kernels
from nybble.calibrate.source import SELF, read_calibration
from nybble.calibrate.windows import PROTOCOLS, read_text
from nybble.demo.text import calibration_text
from nybble.errors import InputError, UsageError, unknown_name
from nybble.evaluate import memory
from nybble.evaluate.job import Job, Worker
from nybble.evaluate.record import EngineRecord, LayerRecord, Record, Run
from nybble.evaluate.variants import Variant, parse_variants
from nybble.files.journal import check_same
from nybble.methods import parse_method
from nybble.models.checkpoint import Checkpoint, check_float, check_tokenizer, is_causal, open_checkpoint
from nybble.models.hub import resolve
from nybble.version import __version__

Progress = Callable[[str, str, float], None]
"""Called with (variant or empty, what is being done, fraction of the whole run done)."""

DEMO_PROMPT = 'class Stack:\n    """A last-in, first-out container.'
BANDWIDTH_BYTES = 1 << 28
GIB = 1 << 30


def compare(
    model: str | Path | None = None,
    text: str | Path | None = None,
    variants: str | Sequence[str] = "default",
    *,
    shape: str | None = None,
    protocol: str = "paper",
    window: int | None = None,
    windows: int = 100,
    stride: int | None = None,
    prompt: str | None = None,
    new_tokens: int = 50,
    repeats: int = 5,
    threads: int | None = None,
    seed: int = 0,
    keep: Sequence[str] = (),
    rules: Sequence[tuple[str, str]] = (),
    calibrate: str | Path | None = None,
    kl_budget_bytes: int = 2 * GIB,
    work: str | Path | None = None,
    download: bool = False,
    progress: Progress | None = None,
    on_record: Callable[[Record], None] | None = None,
    known: Sequence[Record] = (),
) -> list[Record]:
    """Measure variants of a model folder (default: the model that ships) and return their records, the baseline first.

    `text` is a file; by default the held-out part of this Python's own standard library. `shape` measures random weights
    of a known shape instead: memory and speed only. `windows` windows of `window` tokens are scored under `protocol`.
    `calibrate` is another text for methods that read any: a file, `hub:DATASET`, or `self`, and the model writes it.
    `work` is a folder for scratch files (default: the system's); `on_record` is called as each record is complete;
    `known` are records of an earlier run of the same, whose variants are not measured again.
    Raises NybbleError subclasses: wrong arguments, unusable model or text, weights that are not finite, a worker that died.
    """
    names = parse_variants(variants if isinstance(variants, str) else ",".join(variants))
    if shape is not None and (model is not None or text is not None):
        raise UsageError("--shape makes a model of random weights: give no MODEL and no --text with it")
    _check_calibration(names, calibrate is not None or (model is None and shape is None))
    check_scoring(protocol, window, windows, stride)
    _check_counts({"new tokens": (new_tokens, 1), "repeats": (repeats, 1), "threads": (threads, 1)})
    threads = threads or memory.machine()["cores"]
    scratch = Path(tempfile.mkdtemp(prefix="nybble-", dir=work))
    try:
        has_text = shape is None
        evaluation, text_facts = _evaluation_text(text, scratch) if has_text else (None, None)
        if prompt is None and has_text:
            prompt = DEMO_PROMPT if model is None else _first_words(Path(evaluation or "").read_text(encoding="utf-8"))
        calibration: Path | str | None = None
        documents = None if calibrate is None else read_calibration(str(calibrate))
        if documents == SELF:
            calibration = SELF
        elif documents is not None or (model is None and has_text):
            calibration = scratch / "calibration.txt"
            calibration.write_text("\n\n".join(documents) if documents else calibration_text(), encoding="utf-8")
        # All that can be checked without the model is, before one is downloaded.
        folder = scratch / "shape" if shape else (resolve(model, download) if model is not None else demo.model_folder())
        job = Job(
            folder=str(folder),
            work=str(scratch),
            variants=tuple(map(str, names)),
            text=evaluation,
            window=window,
            windows=windows,
            protocol=protocol,
            stride=stride,
            kl_budget_bytes=kl_budget_bytes,
            prompt=prompt if has_text else None,
            new_tokens=new_tokens,
            repeats=repeats,
            prefill_tokens=512,
            threads=threads,
            seed=seed,
            keep=tuple(keep),
            rules=tuple(rules),
            calibration=str(calibration) if calibration else None,
        )
        path = job.write(scratch / "job.json")
        if shape:
            with Worker("shape", path, shape, threads=threads, what=f"shape {shape}") as worker:
                worker.until("done")
        checkpoint = open_checkpoint(folder)
        _check_causal(checkpoint.config, folder)
        check_float(checkpoint)
        if has_text:
            check_tokenizer(folder)
        name = f"{shape} shape, random weights" if shape else (checkpoint.name if model is not None else demo.NAME)
        facts = {"name": name, "random_weights": shape is not None}
        _check_known(known, checkpoint, text_facts)
        return _measure_all(job, path, facts, text_facts, progress, on_record, known)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _check_calibration(variants: Sequence[Variant], given: bool) -> None:
    """Raise UsageError for a method that reads calibration text where there is none."""
    methods = [parse_method(variant.method) for variant in variants if variant.method != "cast"]
    for method in methods:
        if not given and method.settings.calibrated:
            raise method.lacks_calibration()


def _check_known(known: Sequence[Record], checkpoint: Checkpoint, text_facts: dict[str, Any] | None) -> None:
    """Raise UsageError for records of another model or text, or made by other programs."""
    if not known:
        return
    run = known[0].run
    was = {"model": run.model.get("blake3"), "text": (run.text or {}).get("sha256"), "versions": {**run.versions, "torch": ""}}
    now = {"model": checkpoint.digest(), "text": (text_facts or {}).get("sha256"), "versions": {**_versions(), "torch": ""}}
    check_same(Path("the output"), was, now)


def _measure_all(
    job: Job,
    path: Path,
    model_facts: dict[str, Any],
    text_facts: dict[str, Any] | None,
    progress: Progress | None,
    on_record: Callable[[Record], None] | None,
    known: Sequence[Record],
) -> list[Record]:
    found = {record.variant: record for record in known}
    if set(job.variants) <= set(found):
        return [found[spec] for spec in job.variants]

    def report(index: int, inner: float, what: str) -> None:
        if progress:
            done = (index + inner) / len(job.variants) if index >= 0 else 0.0
            progress(job.variants[index] if index >= 0 else "", what, done)

    run = known[0].run if known else None
    if run is None:
        report(-1, 0, "measuring memory bandwidth")
    bandwidth = (
        float(run.machine["bandwidth_bytes_per_second"]) if run else kernels.read_bandwidth(BANDWIDTH_BYTES, job.threads, 3)
    )
    records: list[Record] = []
    with Worker("quality", path, threads=job.threads, what="quality") as quality:
        report(-1, 0, "loading the float model")
        events = quality.events()
        ready = _follow(events, "ready", lambda what, fraction: report(-1, 0, f"{what} ({fraction:.0%})"))
        for i, spec in enumerate(job.variants):
            if spec in found:
                records.append(found[spec])
                continue
            quality.what = spec
            quality.ask(i)
            made = _follow(events, "variant", lambda what, fraction, i=i: report(i, 0.6 * fraction, what))  # type: ignore[misc]
            report(i, 0.6, "memory and speed, in a process of its own")
            with Worker("measure", path, made["folder"], threads=job.threads, what=spec) as worker:
                measured = worker.until("measured")
            report(i, 0.9, "decoding by the engine, in another process")
            prompt = json.dumps(measured["prompt_ids"])
            with Worker("decode", path, made["folder"], prompt, str(time.time()), threads=job.threads, what=spec) as worker:
                decoded = worker.until("decoded")
            shutil.rmtree(made["folder"], ignore_errors=True)
            run = run or _run(job, ready, measured, model_facts, text_facts, bandwidth)
            record = _record(spec, made, measured, decoded, run, bandwidth)
            records.append(record)
            if on_record:
                on_record(record)
            report(i, 1, "done")
    return records


def _follow(events: Any, name: str, progress: Callable[[str, float], None]) -> dict[str, Any]:
    for event in events:
        if event["event"] == name:
            return dict(event)
        if event["event"] == "progress":
            progress(event["what"], event["done"] / max(1, event["total"]))
    raise AssertionError(f"the worker ended without {name}")  # events() raises before this


def _record(
    spec: str, made: dict[str, Any], measured: dict[str, Any], decoded: dict[str, Any], run: Run, bandwidth: float
) -> Record:
    names = ("perplexity", "perplexity_se", "kl_mean", "kl_se", "kl_p99", "top1_agreement")
    quality: dict[str, Any] = {name: (made["quality"] or {}).get(name) for name in names}
    from_measured = {key: value for key, value in measured.items() if key not in ("event", "bytes_per_token", "prompt_ids")}
    engine = decoded["engine"]
    if engine is not None:
        engine["bandwidth_share"] = engine["bytes_per_token"] * engine["tokens_per_second"] / bandwidth
    return Record(
        variant=spec,
        format=made["format"],
        method=made["method"],
        plan_hash=made["plan_hash"],
        bpw=made["bpw"],
        file_bytes=made["file_bytes"],
        limit_tokens_per_second=bandwidth / measured["bytes_per_token"],
        quantize_seconds=made["quantize_seconds"],
        model_histogram_limit=made["model_histogram_limit"],
        model_histogram=made["model_histogram"],
        run=run,
        layers=[LayerRecord(**{**layer, "shape": tuple(layer["shape"])}) for layer in made["layers"]],
        notes=made["notes"] + ([decoded["note"]] if decoded["note"] else []),
        engine=None if engine is None else EngineRecord(**engine),
        **quality,
        **from_measured,
    )


def _run(
    job: Job,
    ready: dict[str, Any],
    measured: dict[str, Any],
    model_facts: dict[str, Any],
    text_facts: dict[str, Any] | None,
    bandwidth: float,
) -> Run:
    facts = {key: ready[key] for key in ("architecture", "parameters", "blake3")}
    return Run(
        id=uuid.uuid4().hex,
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        model={**model_facts, **facts},
        text={**text_facts, **ready["text"]} if text_facts and ready["text"] else None,
        versions={**_versions(), "torch": ready["torch"]},
        machine={
            **memory.machine(),
            "bandwidth_bytes_per_second": bandwidth,
            "instruction_set": kernels.instruction_set(),
        },
        threads=job.threads,
        seed=job.seed,
        prompt=job.prompt,
        prompt_tokens=len(measured["prompt_ids"]),
        new_tokens=job.new_tokens,
        repeats=job.repeats,
    )


def _versions() -> dict[str, str]:
    packages = {package: _version(package) for package in ("transformers", "tokenizers", "numpy")}
    return {"nybble": __version__, "python": platform.python_version(), "torch": "", **packages}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _evaluation_text(text: str | Path | None, scratch: Path) -> tuple[str, dict[str, Any]]:
    if text is None:
        from nybble.demo.text import evaluation_text

        content, name = evaluation_text(), f"Python {platform.python_version()} standard library, held-out modules"
    else:
        content, name = read_text(text), Path(text).name
    path = scratch / "text.txt"
    path.write_text(content, encoding="utf-8", newline="")
    return str(path), {"name": name, "sha256": sha256(content.encode()).hexdigest(), "characters": len(content)}


def _first_words(text: str) -> str:
    return " ".join(text.split()[:8])


def _check_causal(config: dict[str, Any], folder: Path) -> None:
    if not is_causal(config):
        name = (config.get("architectures") or [config.get("model_type")])[0]
        raise InputError(
            f"{folder} is a {name}, which does not predict the next token; "
            "compare needs a causal language model (quantize and plan take any)"
        )


def check_scoring(protocol: str, window: int | None, windows: int | None, stride: int | None) -> None:
    """Raise UsageError for settings of the perplexity that no model and no text could satisfy."""
    if protocol not in PROTOCOLS:
        raise unknown_name("protocol", protocol, PROTOCOLS)
    _check_counts({"window": (window, 2), "windows": (windows, 1), "stride": (stride, 1)})
    if stride is not None and protocol != "stride":
        raise UsageError(f"stride {stride} given with protocol {protocol}; only protocol stride takes one")
    if stride is not None and window is not None and stride >= window:
        raise UsageError(f"stride {stride} must be less than the window of {window} tokens, or text would be left out")


def _check_counts(counts: dict[str, tuple[int | None, int]]) -> None:
    for what, (value, least) in counts.items():
        if value is not None and value < least:
            raise UsageError(f"{what} is {value}; the least is {least}")
