"""Starting measuring processes, in this Python or in a peer's own.

A peer's environment need not hold nybble, and must not see the packages of ours: it gets a copy of the few modules that
a worker needs (SLIM), in a folder that stands alone on its path.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nybble
from nybble import errors
from nybble.errors import MeasureError, NybbleError, UsageError

SLIM = (
    "errors.py",
    "version.py",
    "files/__init__.py",
    "files/safetensors.py",
    "evaluate/__init__.py",
    "evaluate/clock.py",
    "evaluate/memory.py",
    "bench/__init__.py",
    "bench/workload.py",
    "bench/worker.py",
    "bench/adapters",
)
MEASURE_SECONDS, MAKE_SECONDS = 900.0, 3600.0
"""How long a process may take before it is ended."""


def copy_slim(folder: Path) -> Path:
    """Copy what a worker needs into `folder`/nybble, as a package that imports nothing else; returns `folder`."""
    package, root = folder / "nybble", Path(nybble.__file__).parent
    for name in SLIM:
        target = package / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (root / name).is_dir():
            shutil.copytree(root / name, target, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
        else:
            shutil.copyfile(root / name, target)
    (package / "__init__.py").write_text('"""The part of nybble that a measuring process needs."""\n', encoding="utf-8")
    return folder


class Children:
    """Runs workers one at a time: in this Python, or for the runtimes in `pythons` in one of their own."""

    def __init__(self, scratch: Path, threads: int, pythons: dict[str, str]) -> None:
        self._scratch, self._threads = scratch, threads
        self._pythons = {name: find_python(path) for name, path in pythons.items()}
        self._slim = copy_slim(scratch / "slim") if pythons else None

    def run(self, job: dict[str, Any], what: str) -> dict[str, Any]:
        """The worker's answer. Raises the NybbleError that it names, or MeasureError when it died or took too long."""
        python = self._pythons.get(str(job.get("runtime")))
        path = self._scratch / "job.json"
        path.write_text(json.dumps(job), encoding="utf-8")
        limit = MEASURE_SECONDS if job["do"] == "measure" else MAKE_SECONDS
        with (
            tempfile.TemporaryFile() as stderr,
            subprocess.Popen(
                [python or sys.executable, "-m", "nybble.bench.worker", str(path), repr(time.time())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                cwd=self._slim if python else None,  # which stands first on the path
                env=self._environment(python is not None),
                start_new_session=True,  # Ctrl-C reaches the parent alone, which ends its workers in order
            ) as process,
        ):
            try:
                out, _ = process.communicate(timeout=limit)
            except subprocess.TimeoutExpired as error:
                raise MeasureError(f"{what} took over {limit:.0f} s and was ended") from error
            finally:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            stderr.seek(0)
            return _read_answer(out, process.returncode, stderr.read(), what)

    def _environment(self, own_python: bool) -> dict[str, str]:
        count = str(self._threads)
        given = {**os.environ, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "TOKENIZERS_PARALLELISM": "false"}
        given |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TMPDIR": str(self._scratch)}
        if own_python:
            for name in ("PYTHONHOME", "VIRTUAL_ENV"):
                given.pop(name, None)
            given["PYTHONPATH"] = str(self._slim)
        return given


def find_python(path: str) -> str:
    """The interpreter at `path`, absolute. UsageError when there is none."""
    found = shutil.which(path)
    if found is None:
        raise UsageError(f"--peer-python {path!r} is not a program; give the python of the peer's environment")
    return os.path.abspath(found)  # not resolved: the link is what makes it that environment's


def _read_answer(out: bytes, code: int, stderr: bytes, what: str) -> dict[str, Any]:
    try:
        found = json.loads(out.decode("utf-8", "replace").splitlines()[-1])
    except (ValueError, IndexError):
        lines = [line for line in stderr.decode("utf-8", "replace").splitlines() if line.strip()]
        last = " ".join(lines[-1].split())[:300] if lines else "it printed nothing"
        if code < 0:
            hint = "; most often the machine ran out of memory" if code == -signal.SIGKILL else ""
            raise MeasureError(f"{what} was ended by {signal.Signals(-code).name}{hint} ({last})") from None
        raise MeasureError(f"{what} ended with code {code}: {last}") from None
    if "error" in found:
        kind = getattr(errors, found["error"], MeasureError)
        raise (kind if issubclass(kind, NybbleError) else MeasureError)(found["message"])
    return dict(found)
