"""Seconds from the start of a process until nybble has answered: import, --version, inspect. Median of several runs.

Run: python bench/startup.py [--runs 9]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

from nybble.demo import model_folder


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--runs", type=int, default=9)
    args = cli.parse_args()
    commands = {
        "python -c pass": ["-c", "pass"],
        "import nybble": ["-c", "import nybble"],
        "nybble --version": ["-m", "nybble", "--version"],
        "nybble inspect (the model that ships)": ["-m", "nybble", "inspect", str(model_folder())],
    }
    for name, command in commands.items():
        seconds = []
        for _ in range(args.runs):
            start = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
            seconds.append(time.perf_counter() - start)
        print(f"{statistics.median(seconds):.3f} s  ({min(seconds):.3f} to {max(seconds):.3f})  {name}")


if __name__ == "__main__":
    main()
