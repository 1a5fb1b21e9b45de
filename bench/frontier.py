"""What each bit and each second buys: size, KL, perplexity, top 1, seconds and peak memory of formats and methods.

    python bench/frontier.py                                              the model that ships; hours on two cores
    python bench/frontier.py --variants int4:g64+gptq,int4:g64+best
    python bench/frontier.py --model FOLDER --text held.txt --calibrate train.txt --json rows.jsonl
    python bench/frontier.py --calibrate self --variants int4:g32+best                            no data: the model writes it
    python bench/frontier.py --model FOLDER --text held.bin --calibrate train.bin --seed 1234       token ids, uint16, no text

Only the linear layers of the blocks are quantized; tables, head, norms and biases stay float. 128 calibration windows of the
context (at most 512 tokens), 100 windows of the same length scored side by side, all in nats per token over the float model.
Every row is made in a process of its own, whose processor time and peak memory are those of calibrating (making its windows
included) and choosing codes; scoring comes after both are read.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

METHODS = ("rtn", "rtn:mse", "hqq", "imatrix", "awq", "gptq", "gptq:scales=search", "best:tune=0", "best")
FORMATS = (
    "int8:g32",
    "int6:g32",
    "int5:g32",
    "int4:g32",
    "int4:g64",
    "int4:g128",
    "int3:g32",
    "int3:g64",
    "int2:g32",
    "int2:g64",
)
LENGTH, WINDOWS, CALIBRATION = 512, 100, 128


def measure(model: str, text: str, calibrate: str, variant: str, seed: int) -> dict[str, Any]:
    """One row, in this process."""
    import numpy as np

    import nybble
    from nybble.calibrate.self_written import written_windows
    from nybble.calibrate.source import SELF
    from nybble.calibrate.windows import calibration_windows, encode, read_text, token_windows
    from nybble.evaluate.quality import LogitCache, evaluate
    from nybble.methods import parse_method
    from nybble.models.arch import table_for
    from nybble.models.loading import context_length, load_model, load_tokenizer

    spec, _, method = variant.partition("+")
    method = method or "rtn"
    float_model = load_model(model)
    length = min(LENGTH, context_length(float_model))
    tokenizer = load_tokenizer(model)
    windows = None
    start, before = time.perf_counter(), time.process_time()
    if parse_method(method).uses_calibration and calibrate.endswith(".bin"):
        pool = token_ids(calibrate, length)
        windows = pool[np.random.default_rng(seed).permutation(len(pool))[:CALIBRATION]]
    elif parse_method(method).uses_calibration and calibrate == SELF:
        windows = written_windows(float_model, CALIBRATION, length, seed)
    elif parse_method(method).uses_calibration:
        ids, bos = encode(tokenizer, read_text(calibrate))
        windows = calibration_windows(ids, context_length(float_model), bos, CALIBRATION, length, seed)
    keep = [
        name for name in table_for(float_model.config.model_type).others if any(name in n for n, _ in float_model.named_modules())
    ]
    quantized = nybble.quantize(float_model, spec, method, windows, keep=keep, seed=seed)
    seconds, processor = time.perf_counter() - start, time.process_time() - before
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if text.endswith(".bin"):
        held = token_windows(token_ids(text, length).reshape(-1), length, WINDOWS)
    else:
        ids, bos = encode(tokenizer, read_text(text))
        held = token_windows(ids, length, WINDOWS, bos)
    with tempfile.TemporaryDirectory() as work:
        cache = LogitCache.create(Path(work) / "cache", float_model, "float", held, 8 << 30)
        quality = evaluate(quantized.model(), held, cache)
    figures = dataclasses.asdict(quality)
    return {
        "variant": variant,
        "bpw": quantized.provenance["bits_per_weight"],
        "seconds": seconds,
        "processor_seconds": processor,
        "peak_bytes": peak,
        **{key: figures[key] for key in ("kl_mean", "kl_se", "perplexity", "top1_agreement")},
    }


def token_ids(path: str, length: int) -> Any:
    """int64 [windows, length] of a file of token ids, little-endian uint16, one window after the other."""
    import numpy as np

    ids = np.fromfile(path, dtype="<u2").astype(np.int64)
    return ids[: len(ids) // length * length].reshape(-1, length)


def main() -> None:
    """Rows as they come, as a table on standard output."""
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--model", help="model folder; default the one that ships")
    cli.add_argument("--text", help="text that scores; default the held-out part of this Python's library")
    cli.add_argument("--calibrate", help="calibration text; default another part of it")
    cli.add_argument("--variants", default=",".join(f"{spec}+{method}" for spec in FORMATS for method in METHODS))
    cli.add_argument("--seed", type=int, default=0)
    cli.add_argument("--json", type=Path, help="also write the rows here, one a line")
    cli.add_argument("--one", help=argparse.SUPPRESS)
    args = cli.parse_args()
    if args.one:
        print(json.dumps(measure(args.model, args.text, args.calibrate, args.one, args.seed)))
        return
    from nybble.demo import model_folder
    from nybble.demo.text import calibration_text, evaluation_text
    from nybble.evaluate.variants import parse_variants

    with tempfile.TemporaryDirectory() as work:
        texts = {"text": args.text, "calibrate": args.calibrate}
        for name, make in {"text": evaluation_text, "calibrate": calibration_text}.items():
            if texts[name] is None:
                path = Path(work) / f"{name}.txt"
                path.write_text(make(), encoding="utf-8")
                texts[name] = str(path)
        model = args.model or str(model_folder())
        print("| format | method | bits per weight | KL, nats | ± | perplexity | same top 1 | seconds | processor s | peak MB |")
        print("|---|---|--:|--:|--:|--:|--:|--:|--:|--:|")
        for variant in map(str, parse_variants(args.variants)[1:]):  # the first is the float baseline
            command = [sys.executable, __file__, "--one", variant, "--model", model, "--seed", str(args.seed)]
            done = subprocess.run(
                [*command, "--text", texts["text"], "--calibrate", texts["calibrate"]],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            row = json.loads(done.stdout.splitlines()[-1])
            if args.json:
                with args.json.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            spec, _, method = variant.partition("+")
            cells = [spec, method or "rtn", f"{row['bpw']:.3f}", f"{row['kl_mean']:.7f}", f"{row['kl_se']:.7f}"]
            cells += [f"{row['perplexity']:.3f}", f"{row['top1_agreement']:.2%}", f"{row['seconds']:.0f}"]
            cells += [f"{row['processor_seconds']:.0f}", f"{row['peak_bytes'] / 1e6:.0f}"]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
