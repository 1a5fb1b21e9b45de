"""What is promised by pyproject.toml, requirements.lock and the Makefile holds together."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import nybble

ROOT = Path(__file__).parents[2]
if not (ROOT / "pyproject.toml").is_file():
    pytest.skip("runs beside the sources only", allow_module_level=True)


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def locked() -> dict[str, str]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", pin) for pin in pins), "exact pins and nothing else"
    found = {canonical(name): version for name, version in (pin.split("==") for pin in pins)}
    assert len(found) == len(pins), "a package is pinned twice"
    return found


def listed(section: str) -> list[str]:
    """The strings of one list in pyproject.toml (Python 3.10 has no tomllib)."""
    match = re.search(rf"^{section} = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    assert match is not None
    return re.findall(r'"([^"]+)"', match.group(1))


def number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))


def test_the_lock_pins_every_dependency_at_or_above_its_lower_bound() -> None:
    pins = locked()
    for requirement in listed("dependencies") + listed("requires"):
        name, bound = requirement.split(">=")
        assert number(pins[canonical(name)]) >= number(bound), requirement


def test_the_lock_names_torch_by_the_one_version_that_is_tested() -> None:
    assert locked()["torch"] == "2.13.0"


def test_the_version_has_one_source() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", nybble.__version__)
    assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text()


def test_no_file_of_the_build_names_a_machine_or_an_index() -> None:
    for name in (
        "Makefile",
        "pyproject.toml",
        "requirements.lock",
        "CMakeLists.txt",
        ".ci/run",
        "tools/with_compiler.sh",
    ):
        text = (ROOT / name).read_text()
        assert not re.search(r"--(extra-)?index-url|--find-links|https?://|/home/|/root/", text), name


def bare(folder: Path, *programs: str) -> dict[str, str]:
    """An environment whose PATH has the named programs and nothing else."""
    for name in programs:
        found = shutil.which(name)
        if found is None:
            pytest.skip(f"{name} is not installed here")
        (folder / name).symlink_to(found)
    kept = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX", "PATH", "MAKEFLAGS")}
    return {**kept, "PATH": str(folder)}


def stub(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def test_without_a_compiler_and_without_ziglang_one_line_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "path").mkdir()
    # A Python that has its headers and whose pip finds nothing.
    stub(tmp_path / "venv" / "bin" / "python", 'case "$1" in -c) exit 0 ;; *) exit 1 ;; esac')
    done = subprocess.run(
        ["/bin/sh", str(ROOT / "tools" / "with_compiler.sh"), str(tmp_path / "venv"), "echo", "built"],
        env=bare(tmp_path / "path"),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1].startswith("nybble: no C++ compiler; install one (Debian, Ubuntu: apt install g++)")


def test_a_compiler_that_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    stub(tmp_path / "venv" / "bin" / "python", 'case "$1" in -c) exit 0 ;; *) exit 1 ;; esac')
    done = subprocess.run(
        ["/bin/sh", str(ROOT / "tools" / "with_compiler.sh"), str(tmp_path / "venv"), "/bin/sh", "-c", 'echo "$CXX"'],
        env={**bare(tmp_path), "CXX": "my-compiler"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "my-compiler\n", "")


def test_without_the_headers_of_python_one_line_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    stub(tmp_path / "venv" / "bin" / "python", "exit 1")
    done = subprocess.run(
        ["/bin/sh", str(ROOT / "tools" / "with_compiler.sh"), str(tmp_path / "venv"), "echo", "built"],
        env=bare(tmp_path),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "apt install python3-dev" in done.stderr


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ("exit 1", "needs Python 3.11 or later"),
        (
            'case "$2" in *ensurepip*) exit 1 ;; esac',
            "has no venv module; install it (Debian, Ubuntu: apt install python3-venv)",
        ),
    ],
)
def test_make_says_in_one_line_what_python_lacks(tmp_path: Path, answers: str, message: str) -> None:
    environment = bare(tmp_path, "make", "sh", "uname")
    stub(tmp_path / "oddpython", answers)
    done = subprocess.run(
        [shutil.which("make") or "make", "-f", str(ROOT / "Makefile"), "PYTHON=oddpython", ".venv/.created"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert message in done.stderr.splitlines()[0]
    assert not (tmp_path / ".venv").exists()


@pytest.mark.slow
def test_the_source_archive_has_what_a_build_needs(tmp_path: Path) -> None:
    pytest.importorskip("scikit_build_core", reason="the build tools are not installed")
    code = f"from scikit_build_core.build import build_sdist; build_sdist({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path / "out", filter="data")
    (folder,) = (tmp_path / "out").iterdir()
    for name in (
        "CMakeLists.txt",
        "LICENSE",
        "Makefile",
        "pyproject.toml",
        "requirements.lock",
        "tools/with_compiler.sh",
        "src/nybble/kernels/module.cpp",
        "src/nybble/engine/state.hpp",
        "src/nybble/kernels/body_product.hpp",
        "src/nybble/demo/model/model.safetensors",
        "tests/kernels/test_guard_pages.py",
    ):
        assert (folder / name).is_file(), name
    assert not list(folder.rglob("*.so")), "compiled files do not belong in a source archive"
