"""How near the packed matrix-vector product comes to the memory's limit.

Prints, per format and GPT-2 shape, microseconds a call, weights per second, and the bytes read per second over the
bandwidth measured in the same run. Median of several rounds; a matrix that fits the caches can exceed the memory's figure.

Run: python bench/kernels.py [--threads N] [--rounds 9]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

import numpy as np

from nybble import kernels
from nybble.formats import parse_format

SHAPES = [(50257, 768), (2304, 768), (768, 3072), (768, 768)]
FORMATS = ["int8:channel", "int4:g64", "int4:g64,asym", "nf4:g64", "int3:g64", "int2:g64"]


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    cli.add_argument("--rounds", type=int, default=9)
    args = cli.parse_args()
    bandwidth = kernels.read_bandwidth(1 << 29, args.threads, 5)
    print(f"{kernels.instruction_set()}, {args.threads} threads, memory reads {bandwidth / 1e9:.1f} GB/s")
    print(f"{'format':16} {'shape':>14} {'us':>9} {'G weights/s':>12} {'GB/s':>7} {'of memory':>10}")
    rng = np.random.default_rng(0)
    for shape in SHAPES:
        weight = rng.standard_normal(shape, dtype=np.float32)
        x = rng.standard_normal((1, shape[1]), dtype=np.float32)
        for spec in FORMATS:
            fmt = parse_format(spec)
            params = fmt.fit(weight)
            stored = fmt.to_storage(fmt.encode(weight, params), params)
            _, offset = fmt.grid(params)
            arguments = (stored["codes"], shape[1], fmt.bits, fmt.levels, fmt.block(shape[1]))
            packed = kernels.check_weight(*arguments, stored["scale"], offset)
            seconds = []
            for _ in range(args.rounds):
                calls = max(1, int(2e7 // weight.size))
                start = time.perf_counter()
                for _ in range(calls):
                    kernels.matmul_checked(x, packed, args.threads)
                seconds.append((time.perf_counter() - start) / calls)
            median = statistics.median(seconds)
            rate = fmt.stored_bits(shape) / 8 / median
            print(
                f"{spec:16} {shape[0]:>7}x{shape[1]:<6} {median * 1e6:9.1f} {weight.size / median / 1e9:12.1f} "
                f"{rate / 1e9:7.1f} {rate / bandwidth:10.0%}"
            )


if __name__ == "__main__":
    main()
