"""How near the products come to the memory's limit and to the processor's.

For each format and GPT-2 shape: microseconds of one row of x in fast and exact mode, the bytes of the weight read per second
over the bandwidth measured in the same run, and billions of operations a second for 512 rows (a prompt). Each matrix is one of
several copies, more than the caches hold, taken in turns. Median of several rounds.

Run: python bench/kernels.py [--threads N] [--rounds 9]
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from nybble import kernels
from nybble.formats import parse_format

SHAPES = [(50257, 768), (2304, 768), (768, 3072)]
FORMATS = ["int8:channel", "int4:g32", "int4:g64,asym", "nf4:g64", "int3:g64", "int2:g64"]
FOOTPRINT = 200e6
"""Bytes of copies that are read before one is read again."""


def median_seconds(rounds: int, work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def sweep(x: np.ndarray, copies: Iterator[kernels.Laid], calls: int, exact: bool, threads: int) -> None:
    for _ in range(calls):
        kernels.product(x, next(copies), exact, threads)


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    cli.add_argument("--rounds", type=int, default=9)
    args = cli.parse_args()
    bandwidth = kernels.read_bandwidth(1 << 29, args.threads, 5)
    print(f"{kernels.instruction_set()}, {args.threads} threads, memory reads {bandwidth / 1e9:.1f} GB/s")
    print(f"{'format':15} {'shape':>12} {'fast us':>9} {'of memory':>10} {'exact us':>9} {'of memory':>10} {'512 rows, G/s':>14}")
    rng = np.random.default_rng(0)
    for shape in SHAPES:
        weight = rng.standard_normal(shape, dtype=np.float32)
        one = rng.standard_normal((1, shape[1]), dtype=np.float32)
        many = rng.standard_normal((512, shape[1]), dtype=np.float32)
        for spec in FORMATS:
            fmt = parse_format(spec)
            params = fmt.fit(weight)
            stored = fmt.to_storage(fmt.encode(weight, params), params)
            codes = stored.pop("codes")
            scale, offset = fmt.kernel_grid(stored)
            arguments = (codes, shape[1], fmt.bits, fmt.levels, fmt.block(shape[1]), scale, offset)
            first = kernels.lay(*arguments, threads=args.threads)
            copies = [first, *(kernels.lay(*arguments) for _ in range(int(FOOTPRINT // first.nbytes)))]
            turn = itertools.cycle(copies)
            seconds = []
            for exact in (False, True):
                calls = len(copies)
                seconds.append(median_seconds(args.rounds, partial(sweep, one, turn, calls, exact, args.threads)) / calls)
            prompt = median_seconds(args.rounds, partial(kernels.product, many, first, False, args.threads))
            shares = [first.nbytes / s / bandwidth for s in seconds]
            print(
                f"{spec:15} {shape[0]:>5}x{shape[1]:<6} {seconds[0] * 1e6:9.1f} {shares[0]:10.0%} {seconds[1] * 1e6:9.1f} "
                f"{shares[1]:10.0%} {2 * 512 * weight.size / prompt / 1e9:14.0f}"
            )


if __name__ == "__main__":
    main()
