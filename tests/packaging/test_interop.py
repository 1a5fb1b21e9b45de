"""tools/interop.sh, which makes the environment of `make interop`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = ("interop.sh", "interop-requirements.txt", "interop-gptqmodel.txt")


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["sh", str(ROOT / "tools" / "interop.sh"), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=120, check=False, cwd=ROOT
    )


def test_pins_are_exact_and_no_index_is_named() -> None:
    for name in FILES:
        text = (ROOT / "tools" / name).read_text()
        assert not re.search(r"--(extra-)?index-url|--find-links|https?://|/home/|/root/", text), name
        if name.endswith(".txt"):
            lines = [line for line in text.splitlines() if line and not line.startswith("#")]
            assert lines
            assert all(re.fullmatch(r"[A-Za-z0-9-]+==[0-9][0-9a-z.]*", line) for line in lines)
            assert not any(line.startswith(("torch==", "numpy==", "transformers==")) for line in lines)


def test_a_built_wheel_is_taken_again(tmp_path: Path) -> None:
    """Nothing is built, and nothing asked of the network, where the wheel lies in the cache."""
    missing = run("wheel", sys.prefix, XDG_CACHE_HOME=str(tmp_path), PIP_NO_INDEX="1", PIP_CONFIG_FILE=os.devnull)
    (folder,) = (tmp_path / "nybble" / "wheels").iterdir()
    assert missing.returncode == 1
    (folder / "llama_cpp_python-0.3.36-py3-none-any.whl").write_bytes(b"")
    found = run("wheel", sys.prefix, XDG_CACHE_HOME=str(tmp_path), PIP_NO_INDEX="1", PIP_CONFIG_FILE=os.devnull)
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")


@pytest.mark.parametrize("what", ["wheel", "environment"])
def test_without_a_network_one_line_says_so(what: str, tmp_path: Path) -> None:
    done = run(
        what, sys.prefix, str(tmp_path / "made"), XDG_CACHE_HOME=str(tmp_path), PIP_NO_INDEX="1", PIP_CONFIG_FILE=os.devnull
    )
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if "cannot build llama-cpp-python" in line]
    assert len(lines) == 1
    log = Path(lines[0].rpartition(" ")[2])
    assert "llama-cpp-python" in log.read_text()
    assert [path.name for path in log.parent.iterdir()] == ["log"]  # nothing half-made is left
    assert not (tmp_path / "made").exists()


def test_wrong_usage() -> None:
    done = run("install")
    assert done.returncode == 2
    assert "'install' is none of wheel, environment" in done.stderr
