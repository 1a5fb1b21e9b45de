"""Records that look like those of a real comparison: 13 variants of a GPT-2 shaped model of 6 blocks, 26 layers.

The weights are random but really quantized (by a few lines here, not by the package), so that histograms and errors
have their true shapes. Speed, memory and quality follow simple laws with fixed jitter.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from nybble.evaluate.record import HISTOGRAM_BINS, EngineRecord, LayerRecord, Record, Run

# The tests of this folder share chromium.py and hostile.py, which pytest's importlib mode does not find by itself.
sys.path.insert(0, str(Path(__file__).parent))

VARIANTS: dict[str, tuple[float, float]] = {  # bits per weight, mean KL
    "fp32": (32, 0.0),
    "fp16": (16, 2.1e-7),
    "bf16": (16, 1.3e-5),
    "int8:tensor": (8.001, 1.9e-3),
    "int8:tensor,asym": (8.001, 1.7e-3),
    "int8:channel": (8.06, 2.4e-4),
    "int4:g64": (4.25, 0.061),
    "int4:g64,asym": (4.5, 0.043),
    "nf4:g64": (4.25, 0.036),
    "nf4:g64,dq": (4.127, 0.038),
    "fp4:g64": (4.25, 0.088),
    "int3:g64": (3.25, 0.31),
    "int2:g64": (2.25, 4.9),
}
KINDS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
RUN = Run(
    id="5f0c2a9d77",
    created="2026-03-01T10:20:30Z",
    model={
        "name": "stdlib-gpt2-6m",
        "architecture": "gpt2",
        "parameters": 5_900_000,
        "blake3": "ab" * 32,
        "random_weights": False,
    },
    text={
        "name": "held-out modules",
        "sha256": "cd" * 32,
        "tokens": 60_000,
        "protocol": "paper",
        "window": 512,
        "windows": 117,
        "scored_tokens": 59_787,
        "kl_tokens": 59_787,
        "bos": False,
    },
    versions={"nybble": "0.1.0", "python": "3.11.9", "torch": "2.13.0", "transformers": "5.23.0", "numpy": "2.3.0"},
    machine={
        "cpu": "Example CPU",
        "cores": 2,
        "memory_bytes": 16_000_000_000,
        "system": "Linux",
        "bandwidth_bytes_per_second": 1.9e10,
    },
    threads=2,
    seed=0,
    prompt="def main(",
    prompt_tokens=4,
    new_tokens=50,
    repeats=5,
)


def _decode(weight: NDArray[np.float64], spec: str) -> NDArray[np.float64]:
    """What a variant makes of a weight: rounding to a grid with the block of its spec string."""
    if spec == "fp32":
        return weight
    if spec in ("fp16", "bf16"):
        return weight.astype(np.float16).astype(np.float64) if spec == "fp16" else weight * (1 + 2.0**-9)
    bits = int(spec[3]) if spec.startswith("int") else 4
    blocks = weight.reshape(1, -1) if "tensor" in spec else weight if "channel" in spec else weight.reshape(-1, 64)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / (2 ** (bits - 1) - 1)
    return np.asarray((np.round(blocks / scale) * scale).reshape(weight.shape))


def _count(weight: NDArray[np.float64], limit: float) -> list[int]:
    places = ((weight.ravel() + limit) / (2 * limit) * HISTOGRAM_BINS).astype(int).clip(0, HISTOGRAM_BINS - 1)
    return [int(n) for n in np.bincount(places, minlength=HISTOGRAM_BINS)]


def _weights() -> list[tuple[str, int | None, str, NDArray[np.float64]]]:
    rng = np.random.default_rng(7)
    rows: list[tuple[str, int | None, str, NDArray[np.float64]]]
    rows = [(f"transformer.{name}.weight", None, "embedding", rng.standard_t(6, (32, 64)) * 0.06) for name in ("wte", "wpe")]
    for block in range(6):
        for kind in KINDS:
            width = 0.05 + 0.02 * block if kind.endswith("c_proj") else 0.08
            rows.append((f"transformer.h.{block}.{kind}.weight", block, "conv1d", rng.standard_t(5, (32, 64)) * width))
    return rows


def make_engine(bpw: float, weight_bytes: int, seconds: float) -> EngineRecord:
    """Figures of an engine eight to ten times as fast as torch."""
    own = seconds / (8 + (32 - bpw) / 16)
    return EngineRecord(
        activations="float" if bpw >= 16 else "int8",
        cache="f16",
        instruction_set="avx512vnni",
        threads=2,
        load_seconds=0.01 + bpw / 4000,
        start_seconds=0.2 + bpw / 2000,
        first_token_seconds=own / 40,
        seconds_50_tokens=own,
        seconds_50_tokens_runs=[own * f for f in (1.1, 0.98, 1.0, 0.99, 1.05)],
        tokens_per_second=50 / own,
        prefill_tokens_per_second=30_000 - 100 * bpw,
        batch8_tokens_per_second=4 * 50 / own,
        weight_bytes=weight_bytes,
        bytes_per_token=weight_bytes + 60_000,
        bandwidth_share=(weight_bytes + 60_000) * 50 / own / 1.9e10,
        memory_before_bytes=35_000_000,
        memory_after_load_bytes=36_000_000 + int(weight_bytes * 1.1),
    )


def make_records(run: Run = RUN) -> list[Record]:
    """One record for each of VARIANTS, in order, of `run`."""
    rng = np.random.default_rng(11)
    weights = _weights()
    records = []
    for variant, (bpw, kl) in VARIANTS.items():
        layers, decoded = [], []
        for name, block, kind, weight in weights:
            limit = float(np.abs(weight).max())
            rounded = _decode(weight, variant)
            decoded.append(rounded.ravel())
            error = float(((weight - rounded) ** 2).sum() / (weight**2).sum())
            shape = (weight.shape[0], weight.shape[1])
            layers.append(LayerRecord(name, block, kind, shape, variant, bpw, error, limit, _count(rounded, limit)))
        weight_bytes = int(5.9e6 * bpw / 8) + 9000
        seconds = (0.09 + 0.42 * (bpw / 32) ** 0.6) * float(rng.uniform(0.95, 1.05))
        runs = [seconds * f for f in (1.08, 0.99, 1.0, 0.97, 1.02)]
        before = int(246e6 + rng.uniform(-2e6, 2e6))
        loaded = before + int(weight_bytes * 1.15 + 6e6)
        greedy = "self, argv=None):\n    parser = ArgumentParser()\n    parser.add_argument('--out')\n    return parser"
        records.append(
            Record(
                variant=variant,
                format=variant,
                method="cast" if bpw >= 16 else "rtn",
                plan_hash="ef" * 32,
                bpw=bpw,
                weight_bytes=weight_bytes,
                file_bytes=weight_bytes + 8412,
                memory_before_bytes=before,
                memory_after_load_bytes=loaded,
                memory_peak_bytes=loaded + int(21e6),
                memory_after_cleanup_bytes=before + int(9e6),
                load_seconds=0.11 + bpw / 400,
                first_token_seconds=seconds / 38,
                seconds_50_tokens=seconds,
                seconds_50_tokens_runs=runs,
                tokens_per_second=50 / seconds,
                prefill_tokens_per_second=2100 + 40 * bpw,
                limit_tokens_per_second=1.9e10 / weight_bytes,
                perplexity=8.412 * float(np.exp(kl * 0.8)),
                perplexity_se=0.11,
                kl_mean=kl,
                kl_se=kl * 0.03,
                kl_p99=kl * 11,
                top1_agreement=max(1 - kl**0.5 * 0.45, 0.02),
                sample_greedy=greedy if kl < 0.01 else greedy[: int(70 - 8 * kl)] + "pass\n\nclass Thing:\n    x = 1",
                sample_top_k=f"self):\n    # sample {variant}\n    return None",
                quantize_seconds=0.0 if bpw == 32 else 0.4 + kl / 10,
                model_histogram_limit=0.6,
                model_histogram=_count(np.concatenate(decoded), 0.6),
                run=run,
                layers=layers,
                notes=["position embedding kept in fp16"] if bpw < 16 else [],
                engine=make_engine(bpw, weight_bytes, seconds),
            )
        )
    return records


@pytest.fixture(scope="session")
def _all_records() -> list[Record]:
    return make_records()


@pytest.fixture
def records(_all_records: list[Record]) -> list[Record]:
    """The 13 default variants."""
    return list(_all_records)


@pytest.fixture
def change() -> Callable[..., list[Record]]:
    """Replace fields of every record, or of its run: `change(records, run={...}, perplexity=None)`."""

    def apply(records: list[Record], run: dict[str, Any] | None = None, **fields: Any) -> list[Record]:
        return [replace(r, run=replace(r.run, **(run or {})), **fields) for r in records]

    return apply
