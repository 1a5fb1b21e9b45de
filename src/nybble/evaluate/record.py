"""The record of one measured variant: one line of `results.jsonl`. This module is the schema, and its documentation.

Sizes are bytes, times are seconds, information is in nats. A field is None where the quantity was not measured or does
not exist (quality of a model with random weights, an encoder's tokens per second). A reader must refuse a line whose
`schema` it does not know; a field is only ever added under the same number, never renamed or re-defined.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nybble.errors import FileFormatError, InputError

SCHEMA = "nybble.results/1"
HISTOGRAM_BINS = 96


@dataclass(frozen=True)
class LayerRecord:
    """One weight of the model under one variant."""

    name: str
    """Hugging Face parameter name, e.g. `transformer.h.0.attn.c_attn.weight`."""
    block: int | None
    """Index of the transformer block that holds it; None for embeddings and head."""
    kind: str
    """`linear`, `conv1d` or `embedding`."""
    shape: tuple[int, int]
    """[N, K] = [out features, in features]; for an embedding [entries, width]."""
    format: str
    """Spec string of what it is stored as, e.g. `int4:g64`."""
    bpw: float
    """Everything stored for it (codes, scales, offsets), in bits, over its number of weights."""
    relative_error: float
    """|W - Q|^2 / |W|^2, squared Frobenius norms; 0 for fp32."""
    histogram_limit: float
    """Bins are HISTOGRAM_BINS equal steps over [-limit, limit]; what lies outside is counted in the end bins."""
    histogram: list[int]
    """Counts of the decoded weights per bin. The same limit in every variant, so that they can be laid over each other."""
    loss_of_rounding: float | None = None
    """By calibrated methods: squared error of the layer's outputs on calibration text, as a share of the outputs' own
    squares, had the weight been rounded to nearest."""
    loss: float | None = None
    """The same of what the method chose."""
    damping: float | None = None
    """Added to the Hessian's diagonal, as a share of its mean."""
    dead_columns: int | None = None
    """Inputs that calibration never activated."""
    rows_fallen_back: int | None = None
    """Rows for which rounding to nearest was better and was taken."""


@dataclass(frozen=True)
class EngineRecord:
    """One variant decoded by nybble's engine (no torch), measured in a process of its own."""

    activations: str
    """`int8`: rounded to int8 in blocks where the weight has codes, the engine's default; `float`: no weight has codes."""
    cache: str
    """What keys and values were held in: f16, ..."""
    instruction_set: str
    threads: int
    load_seconds: float
    """From the file on disk to a decoder that is ready."""
    start_seconds: float
    """From the start of the process (Python, imports, loading) to the first new token; the prompt is given as ids."""
    first_token_seconds: float
    """From prompt to first new token, the decoder loaded and warm. Median of `run.repeats`, as are those below."""
    seconds_50_tokens: float
    """Greedy, batch 1, end-of-text ignored: the same ids in as for torch, `run.new_tokens` out."""
    seconds_50_tokens_runs: list[float]
    tokens_per_second: float
    """new_tokens / seconds_50_tokens."""
    prefill_tokens_per_second: float
    """Reading 512 tokens (or the context), logits of the last position only."""
    batch8_tokens_per_second: float
    """New tokens of all texts per second, eight prompts decoded together."""
    weight_bytes: int
    """All matrices as the engine holds them."""
    bytes_per_token: int
    """Weights that one new token reads, and the cache at its average length in the timed runs."""
    bandwidth_share: float
    """bytes_per_token * tokens_per_second over the run's measured bandwidth; above 1 the weights come from the caches."""
    memory_before_bytes: int | None
    """Resident set of the fresh process with the engine imported, before the model is loaded."""
    memory_after_load_bytes: int | None


@dataclass(frozen=True)
class Run:
    """Where a record comes from: shared by all records of one run."""

    id: str
    """Random, one per run of compare."""
    created: str
    """ISO 8601, UTC."""
    model: dict[str, Any]
    """name, architecture, parameters (count, tied weights once), blake3 (of config.json and all tensors),
    random_weights (bool)."""
    text: dict[str, Any] | None
    """name, sha256, tokens, protocol (paper, llama.cpp, stride), window, windows, scored_tokens, kl_tokens, bos (bool)."""
    versions: dict[str, str]
    """nybble, python, torch, transformers, numpy."""
    machine: dict[str, Any]
    """cpu, cores, memory_bytes, system, bandwidth_bytes_per_second (measured: all threads reading), instruction_set."""
    threads: int
    seed: int
    prompt: str | None
    """What `sample_greedy` and `sample_top_k` continue."""
    prompt_tokens: int
    new_tokens: int
    """50, unless asked otherwise; `seconds_50_tokens` is then for that many."""
    repeats: int
    """Timed runs of each speed figure; the record holds their median."""


@dataclass(frozen=True)
class Record:
    """One variant, measured."""

    variant: str
    """Spec string as asked: FORMAT or FORMAT+METHOD, e.g. `int4:g64+rtn:mse`."""
    format: str
    method: str
    """`cast` for the floating formats."""
    plan_hash: str
    """SHA-256 of the plan: which tensor got which format and method."""
    bpw: float
    """Mean over the quantized weights (tied ones once): all bits stored for them over their number."""
    weight_bytes: int
    """All tensors of the loaded model, packed as they are, tied ones once; what was kept in float included."""
    file_bytes: int
    """The weight file on disk, header included."""
    memory_before_bytes: int | None
    """Resident set of the fresh process with its libraries imported, before the model is loaded."""
    memory_after_load_bytes: int | None
    memory_peak_bytes: int | None
    """Highest resident set from load through generation."""
    memory_after_cleanup_bytes: int | None
    """After the model is deleted and freed memory is given back to the system."""
    load_seconds: float | None
    first_token_seconds: float | None
    """From prompt to first new token, the model loaded and warm."""
    seconds_50_tokens: float | None
    """Greedy, batch 1, end-of-text ignored: prompt in, `run.new_tokens` out. Median of `run.repeats`."""
    seconds_50_tokens_runs: list[float] | None
    """Every timed run, in order."""
    tokens_per_second: float | None
    """new_tokens / seconds_50_tokens."""
    prefill_tokens_per_second: float | None
    limit_tokens_per_second: float | None
    """Measured memory bandwidth over the bytes that one new token must read: what no program can exceed from memory
    (a model that fits the caches can)."""
    perplexity: float | None
    perplexity_se: float | None
    """Standard error, tokens of different windows taken as independent: perplexity * se(mean of window losses)."""
    kl_mean: float | None
    """KL(float || variant) per token, in nats, mean over `run.text.kl_tokens`."""
    kl_se: float | None
    kl_p99: float | None
    """99th percentile of the per-token KL."""
    top1_agreement: float | None
    """Fraction of tokens whose most likely successor is the float model's."""
    sample_greedy: str | None
    sample_top_k: str | None
    """k = 40, temperature 1, with `run.seed`."""
    quantize_seconds: float | None
    """Choosing codes and writing the file; reading the float model is not counted."""
    model_histogram_limit: float
    model_histogram: list[int]
    """All quantized weights together, as in LayerRecord."""
    run: Run
    layers: list[LayerRecord] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What a reader must know: tail groups, tensors kept, quality not measured and why."""
    schema: str = SCHEMA
    engine: EngineRecord | None = None
    """Speed and memory of the engine; the fields above are torch's. None: the engine cannot decode this model (`notes` says
    why), or the record is older than this field."""

    def to_line(self) -> str:
        """One line of JSON. NaN and infinity, which JSON lacks, become null."""
        return json.dumps(_finite(dataclasses.asdict(self)), ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def from_line(line: str, where: str = "line") -> Record:
    """Parse one line of `results.jsonl`. Raises FileFormatError, naming `where`, when it is not a record of this schema."""
    try:
        data = json.loads(line)
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            found = data.get("schema") if isinstance(data, dict) else type(data).__name__
            raise FileFormatError(f"{where}: schema is {found!r}, this version reads {SCHEMA!r}; measure again with compare")
        known = {f.name for f in dataclasses.fields(Record)}
        data = {key: value for key, value in data.items() if key in known}
        run_fields = {f.name for f in dataclasses.fields(Run)}
        data["run"] = Run(**{key: value for key, value in data["run"].items() if key in run_fields})
        layer_fields = {f.name for f in dataclasses.fields(LayerRecord)}
        data["layers"] = [
            LayerRecord(**{**{k: v for k, v in layer.items() if k in layer_fields}, "shape": tuple(layer["shape"])})
            for layer in data.get("layers", [])
        ]
        if data.get("engine") is not None:
            engine_fields = {f.name for f in dataclasses.fields(EngineRecord)}
            data["engine"] = EngineRecord(**{key: value for key, value in data["engine"].items() if key in engine_fields})
        return Record(**data)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, FileFormatError):
            raise
        raise FileFormatError(f"{where}: not a result record ({error}); was the file cut short?") from error


def read_results(path: str | Path) -> list[Record]:
    """All records of a `results.jsonl`, in order. Raises InputError when it is missing or empty, FileFormatError per bad line."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read results {path}: {getattr(error, 'strerror', None) or error}") from error
    records = [from_line(line, f"{path}, line {i}") for i, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not records:
        raise InputError(f"{path} holds no records; run nybble compare first")
    return records
