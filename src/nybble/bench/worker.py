"""The measuring process: one job, told by a JSON file, answered by one JSON line on standard output.

    python -m nybble.bench.worker JOB SPAWNED

`do` of the job is `shape` (write a model of random weights), `check` (is the runtime installed), `make` (write the file
that a racer reads), `convert` (write the one that a peer makes it from) or `measure`. SPAWNED is the time (seconds since
1970) when the parent started this process, for systems that do not say so themselves. Whatever libraries print goes to
standard error.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from nybble.bench.adapters import OURS, Runtime, adapter_of
from nybble.errors import NybbleError
from nybble.evaluate import memory
from nybble.evaluate.clock import seconds_since_start

BUDGET_SECONDS = 30.0


def measure(job: dict[str, Any], spawned: float) -> dict[str, Any]:
    """Every figure of one racer. Seconds are the best of `repeats` runs after a warm-up, memory is bytes.

    A figure whose runs have taken BUDGET_SECONDS gets no more of them. The process is new: the first token counts from
    its start, libraries and weights included.
    """
    adapter, work, what = adapter_of(job["runtime"]), job["workload"], job["what"]
    prompts, new_tokens, repeats = work["prompts"], work["new_tokens"], job["repeats"]
    adapter.start(job["threads"])
    found: dict[str, Any] = {"memory_before_load_bytes": memory.resident_bytes()}
    runtime = adapter.load(Path(job["path"]), job["format"], job["threads"], job["exact"])
    found["load_s"] = seconds_since_start(spawned)
    runtime.generate(prompts["1"], 1)
    found["first_token_s"] = seconds_since_start(spawned)
    (tokens,) = _generate(runtime, prompts["1"], new_tokens)
    found |= {"tokens": tokens, "memory_loaded_bytes": memory.resident_bytes()}
    if "decode" in what:
        found["decode_s"] = best_of([partial(_generate, runtime, prompts["1"], new_tokens)] * repeats)
    if "prefill" in what:
        first, *texts = work["texts"]
        runtime.prefill(first)
        found["prefill_s"] = best_of([partial(runtime.prefill, text) for text in texts])
    if "batch" in what:
        found["batch_s"] = {}
        for rows, batch in prompts.items():
            if rows == "1" and "decode_s" in found:
                found["batch_s"][rows] = found["decode_s"]
                continue
            _generate(runtime, batch, min(2, new_tokens))
            found["batch_s"][rows] = best_of([partial(_generate, runtime, batch, new_tokens)] * repeats)
    found["memory_peak_bytes"] = memory.peak_bytes()
    return found | runtime.facts()


def best_of(runs: Sequence[Callable[[], object]]) -> float:
    """Fewest seconds of several runs: what a shared machine disturbs least."""
    seconds: list[float] = []
    for run in runs:
        if sum(seconds) > BUDGET_SECONDS:
            break
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _generate(runtime: Runtime, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    rows = [[int(token) for token in row] for row in runtime.generate(prompts, new_tokens)]
    if [len(row) for row in rows] != [new_tokens] * len(prompts):
        raise RuntimeError(f"{len(prompts)} prompts gave {[len(row) for row in rows]} tokens instead of {new_tokens} each")
    return rows


def answer(job: dict[str, Any], spawned: float) -> dict[str, Any]:
    """What came of a job."""
    if job["do"] == "shape":
        from nybble.models.shapes import make_shape

        make_shape(job["shape"], Path(job["target"]))
        return {}
    if job["do"] == "convert":
        from nybble.convert import convert

        convert(job["source"], job["target"], job["container"], to="fp16")
        return {}
    if job["do"] == "check":
        return {"missing": adapter_of(job["runtime"]).missing()}
    if job["do"] == "make":
        adapter_of(job["runtime"]).make(Path(job["source"]), Path(job["target"]), job["format"], job["threads"])
        return {}
    return measure(job, spawned)


def main(arguments: list[str]) -> int:
    """Do the job and print its answer."""
    path, spawned = arguments
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries, also those in C, print to standard error from here on
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: end with the parent, however it ends
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    if job.get("runtime") != OURS:
        # A peer is timed without what nybble adds to transformers.
        sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__module__ != "nybble._transformers_hook"]
    try:
        found = answer(job, float(spawned))
    except NybbleError as error:
        found = {"error": type(error).__name__, "message": str(error)}
    except Exception as error:  # a peer's library may raise anything; the race goes on without it
        words = " ".join(str(error).split())[:300]
        found = {"error": "MeasureError", "message": f"{type(error).__name__}: {words}"}
    out.write(json.dumps(found) + "\n")
    out.flush()
    return 1 if "error" in found else 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # the figures are out: a library that hangs or crashes while it is taken down changes nothing
