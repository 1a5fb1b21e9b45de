"""Writing GPT-2 124M's shape as Q4_K_M: nybble beside llama.cpp's own quantizer, on the same random weights and threads.

Each turn is a new process; turns alternate. nybble reads a folder of float32 safetensors, llama.cpp the GGUF file that nybble
made of it. Seconds of the whole process, and of the call alone: `nybble.convert.convert`, and `llama_model_quantize` of
llama.cpp's library as llama-cpp-python has it. nybble's time contains reading back what was written, and flushing it to the
disk. Seconds of the processors say less of what else goes on. Median of several. The error is the square of what was lost, as a
share of the squares of the weights.

Run: .interop/bin/python bench/quantize.py [--mix q4_k_m] [--rounds 5] [--threads 2] [--json]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from nybble.containers import open_contents
from nybble.containers.float import is_transposed
from nybble.convert import convert
from nybble.models.shapes import make_shape

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


KINDS = ("process_s", "call_s", "cpu_s")


def turn(program: str, arguments: list[str]) -> dict[str, float]:
    """Seconds of the whole process, of the call, and of all processors together."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    whole, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"process_s": whole, "call_s": float(done.stdout.split()[-1]), "cpu_s": cpu}


def error_of(path: Path, floats: Path) -> float:
    """Squared error of the packed weights of a GGUF file, as a share of the squares of those in the file of floats."""
    made, given = open_contents(path), open_contents(floats)
    lost = energy = 0.0
    for name in made.packed:
        weight, values = given.float32(name), made.read_packed(name).decode()
        if is_transposed(given.config, name):
            weight = weight.T
        lost += float(np.square(values - weight, dtype=np.float64).sum())
        energy += float(np.square(weight, dtype=np.float64).sum())
    return lost / energy


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

    mix = args.mix.removeprefix("mix:")
    with tempfile.TemporaryDirectory(prefix="nybble-bench-") as folder:
        source, floats = make_shape(args.shape, Path(folder) / "source"), Path(folder) / "floats.gguf"
        convert(source, floats)
        out = {"nybble": Path(folder) / "ours.gguf", "llama.cpp": Path(folder) / "theirs.gguf"}
        seconds: dict[str, list[dict[str, float]]] = {name: [] for name in out}
        for _ in range(args.rounds):
            seconds["nybble"].append(turn(OURS, [str(source), str(out["nybble"]), args.mix]))
            seconds["llama.cpp"].append(turn(THEIRS, [str(floats), str(out["llama.cpp"]), mix, str(args.threads)]))
        sizes = {name: path.stat().st_size for name, path in out.items()}
        errors = {name: error_of(path, floats) for name, path in out.items()}
    result = {
        "shape": args.shape,
        "mix": mix,
        "threads": args.threads,
        "rounds": args.rounds,
        "llama_cpp_python": importlib.metadata.version("llama-cpp-python"),
        **{
            name: {
                **{kind: statistics.median(one[kind] for one in turns) for kind in KINDS},
                "of_rounds": {kind: [round(one[kind], 3) for one in turns] for kind in KINDS},
                "bytes": sizes[name],
                "error": errors[name],
            }
            for name, turns in seconds.items()
        },
    }
    ours, theirs = result["nybble"], result["llama.cpp"]
    result["ratio"] = {key: ours[key] / theirs[key] for key in KINDS}
    if args.json:
        print(json.dumps(result))
        return
    print(f"{args.shape} as {mix}, {args.threads} threads, median of {args.rounds} rounds in turns (least to most)")
    print(f"{'':10} {'process, s':>26} {'call, s':>26} {'processors, s':>26} {'MB':>8} {'error':>9}")
    for name in out:
        cells = []
        for kind in KINDS:
            rounds = result[name]["of_rounds"][kind]
            cells.append(f"{result[name][kind]:.2f} ({min(rounds):.2f} to {max(rounds):.2f})")
        print(f"{name:10} {cells[0]:>26} {cells[1]:>26} {cells[2]:>26} {sizes[name] / 1e6:8.1f} {errors[name]:9.6f}")
    print(f"{'ratio':10} " + " ".join(f"{result['ratio'][kind]:>26.2f}" for kind in KINDS))


if __name__ == "__main__":
    main()
