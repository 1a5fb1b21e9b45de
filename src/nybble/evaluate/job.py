"""What a measuring process is told, and how it answers: one JSON job file in, JSON lines out.

The parent (compare.py) never imports torch. It starts `python -m nybble.evaluate.worker KIND JOB`:

    quality    one process for the run: tokenizes, keeps the float model's predictions, then, for each line it reads on
               standard input, makes the next variant, saves it and evaluates what was saved
    measure    a fresh process per variant: memory, speed and generated text of one saved folder, by torch
    decode     another fresh process per variant, without torch: memory and speed of the same folder by the engine

Events are {"event": NAME, ...}; `error` carries the class and message of a NybbleError, which the parent raises again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from nybble import errors
from nybble.errors import MeasureError, NybbleError


@dataclass(frozen=True)
class Job:
    """Everything that decides the figures of one run."""

    folder: str
    """The float model."""
    work: str
    """Scratch folder: variants and the cache of float predictions."""
    variants: tuple[str, ...]
    text: str | None
    """Path of the evaluation text in `work`; None: quality is not measured."""
    window: int | None
    windows: int
    protocol: str
    stride: int | None
    kl_budget_bytes: int
    prompt: str | None
    new_tokens: int
    repeats: int
    prefill_tokens: int
    threads: int
    seed: int
    keep: tuple[str, ...]
    rules: tuple[tuple[str, str], ...]
    calibration: str | None
    """Path of the calibration text in `work`, or `self`."""

    def write(self, path: Path) -> Path:
        path.write_text(json.dumps(dataclasses.asdict(self)), encoding="utf-8")
        return path

    @classmethod
    def read(cls, path: str | Path) -> Job:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        lists = {"variants", "keep"}
        data = {key: tuple(value) if key in lists else value for key, value in data.items()}
        return cls(**{**data, "rules": tuple((p, f) for p, f in data["rules"])})


class Worker:
    """A running measuring process. Use it as a context: leaving it ends the process, whatever happened."""

    def __init__(self, kind: str, job: Path, *arguments: str, threads: int, what: str) -> None:
        self.what = what
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # closed in __exit__
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment["TMPDIR"] = str(job.parent)  # what libraries leave there (torch does) goes with the scratch folder
        self._process = subprocess.Popen(
            [sys.executable, "-m", "nybble.evaluate.worker", kind, str(job), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            encoding="utf-8",
            env=environment,
            start_new_session=True,  # Ctrl-C reaches the parent alone, which ends its workers in order
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._stderr):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()

    def ask(self, index: int) -> None:
        """Let the worker go on with a piece."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died: `events` says how
            self._process.stdin.write(f"{index}\n")
            self._process.stdin.flush()

    def events(self) -> Iterator[dict[str, Any]]:
        """Events as they come. Raises the worker's own NybbleError, or MeasureError when it died without one."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                event = json.loads(line)
            except ValueError:
                continue  # something a library printed
            if event.get("event") == "error":
                raise _raised_again(event)
            yield event
            if event.get("event") == "done":
                return
        raise self._death()

    def until(self, name: str) -> dict[str, Any]:
        """The next event of this name; others before it are dropped."""
        return next(event for event in self.events() if event["event"] == name)

    def _death(self) -> MeasureError:
        code = self._process.wait()
        self._stderr.seek(0)
        lines = [line for line in self._stderr.read().decode("utf-8", "replace").splitlines() if line.strip()]
        last = lines[-1][:300] if lines else "it printed nothing"
        if code < 0:
            name = signal.Signals(-code).name
            hint = "; most often the machine ran out of memory" if -code == signal.SIGKILL else ""
            return MeasureError(f"the process measuring {self.what} was ended by {name}{hint} ({last})")
        return MeasureError(f"the process measuring {self.what} ended with code {code}: {last}")


def _raised_again(event: dict[str, Any]) -> NybbleError:
    cls = getattr(errors, str(event.get("type")), NybbleError)
    message = str(event.get("message"))
    return cls(message) if isinstance(cls, type) and issubclass(cls, NybbleError) else NybbleError(message)
