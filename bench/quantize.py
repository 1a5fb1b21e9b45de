"""Writing GPT-2 124M's shape as Q4_K_M: nybble beside llama.cpp's own quantizer, on the same random weights and threads.

Each turn is a new process; turns alternate. nybble reads a folder of float32 safetensors, llama.cpp the GGUF file that nybble
made of it. Seconds of the whole process, and of the call alone: `nybble.convert.convert`, and `llama_model_quantize` of
llama.cpp's library as llama-cpp-python has it. nybble's time contains reading back what was written, and flushing it to the
disk. Median of several.

Run: .interop/bin/python bench/quantize.py [--mix q4_k_m] [--rounds 5] [--threads 2] [--json]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

OURS = """
import sys, time
from nybble.convert import convert
begun = time.perf_counter()
convert(sys.argv[1], sys.argv[2], to=sys.argv[3], force=True)
print(time.perf_counter() - begun)
"""
THEIRS = """
import ctypes, sys, time
import llama_cpp
silence = llama_cpp.llama_log_callback(lambda level, text, user: None)
llama_cpp.llama_log_set(silence, ctypes.c_void_p(0))
settings = llama_cpp.llama_model_quantize_default_params()
settings.ftype = getattr(llama_cpp, "LLAMA_FTYPE_MOSTLY_" + sys.argv[3].upper())
settings.nthread = int(sys.argv[4])
begun = time.perf_counter()
assert llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), settings) == 0
print(time.perf_counter() - begun)
"""
"""What each child runs; it prints the seconds of its call."""


def turn(program: str, arguments: list[str]) -> tuple[float, float]:
    """(seconds of the whole process, of the call)."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    return time.perf_counter() - started, float(done.stdout.split()[-1])


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--mix", default="q4_k_m", help="a mix that both have, as nybble writes it")
    cli.add_argument("--shape", default="gpt2", help="a shape of nybble.models.shapes")
    cli.add_argument("--rounds", type=int, default=5)
    cli.add_argument("--threads", type=int, default=min(2, len(os.sched_getaffinity(0))))
    cli.add_argument("--json", action="store_true", help="one object on stdout, no table")
    args = cli.parse_args()
    if importlib.util.find_spec("llama_cpp") is None:
        print("bench/quantize.py needs llama-cpp-python: make interop, then .interop/bin/python bench/quantize.py")
        return
    os.environ.update(OMP_NUM_THREADS=str(args.threads))

    from nybble.convert import convert
    from nybble.models.shapes import make_shape

    mix = args.mix.removeprefix("mix:")
    with tempfile.TemporaryDirectory(prefix="nybble-bench-") as folder:
        source, floats = make_shape(args.shape, Path(folder) / "source"), Path(folder) / "floats.gguf"
        convert(source, floats)
        out = {"nybble": Path(folder) / "ours.gguf", "llama.cpp": Path(folder) / "theirs.gguf"}
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in out}
        for _ in range(args.rounds):
            seconds["nybble"].append(turn(OURS, [str(source), str(out["nybble"]), args.mix]))
            seconds["llama.cpp"].append(turn(THEIRS, [str(floats), str(out["llama.cpp"]), mix, str(args.threads)]))
        sizes = {name: path.stat().st_size for name, path in out.items()}
    result = {
        "shape": args.shape,
        "mix": mix,
        "threads": args.threads,
        "rounds": args.rounds,
        "llama_cpp_python": importlib.metadata.version("llama-cpp-python"),
        **{
            name: {
                "process_s": statistics.median(whole for whole, _ in turns),
                "call_s": statistics.median(call for _, call in turns),
                "process_s_of_rounds": [round(whole, 3) for whole, _ in turns],
                "call_s_of_rounds": [round(call, 3) for _, call in turns],
                "bytes": sizes[name],
            }
            for name, turns in seconds.items()
        },
    }
    ours, theirs = result["nybble"], result["llama.cpp"]
    result["ratio"] = {key: ours[key] / theirs[key] for key in ("process_s", "call_s")}
    if args.json:
        print(json.dumps(result))
        return
    print(f"{args.shape} as {mix}, {args.threads} threads, median of {args.rounds} rounds in turns (least to most)")
    print(f"{'':10} {'process, s':>26} {'call, s':>26} {'MB':>8}")
    for name in out:
        cells = []
        for key in ("process_s", "call_s"):
            rounds = result[name][f"{key}_of_rounds"]
            cells.append(f"{result[name][key]:.2f} ({min(rounds):.2f} to {max(rounds):.2f})")
        print(f"{name:10} {cells[0]:>26} {cells[1]:>26} {sizes[name] / 1e6:8.1f}")
    print(f"{'ratio':10} {result['ratio']['process_s']:>26.2f} {result['ratio']['call_s']:>26.2f}")


if __name__ == "__main__":
    main()
