"""The shape of the package, read from its source: which way imports go, what is public, what stays small and light."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import nybble
from nybble.formats import format_names
from nybble.methods import method_names, parse_method
from nybble.methods.steps.settings import Settings

ROOT = Path(nybble.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
MAX_LINES = 450

LAYERS = (
    {"errors", "version"},
    {"kernels", "demo"},
    {"formats"},
    {"files", "models"},
    {"containers"},
    {"engine"},
    {"calibrate"},
    {"methods"},
    {"mixes"},
    {"plan"},
    {"converting", "finished", "forecast"},
    {"convert"},
    {"edits"},
    {"tuner"},
    {"walk"},
    {"quantized"},
    {"run"},
    {"observing", "walk_forecast"},
    {"blockwise"},
    {"evaluate", "train"},
    {"report"},
    {"bench"},
    {"cli"},
)
"""A part may import from its own layer and those before it. The package itself and its hook import lazily what they offer."""
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}
FREE = {"__init__", "__main__", "_transformers_hook"}

FORBIDDEN = {
    "errors": {"nybble", "numpy", "torch", "transformers"},
    "demo": {"torch", "transformers"},
    "kernels": {"torch", "transformers"},
    "formats": {"nybble.files", "nybble.methods", "nybble.models", "torch", "transformers", "safetensors"},
    "files": {"nybble.methods", "nybble.models", "nybble.kernels", "torch", "transformers"},
    "containers": {"nybble.methods", "nybble.kernels", "torch", "transformers"},
    "methods": {"nybble.files", "nybble.models", "nybble.kernels", "transformers"},
    "engine": {"nybble.methods", "nybble.models.loading", "nybble.models.packed", "torch", "transformers"},
    "mixes": {"torch", "transformers"},
    "plan": {"torch", "transformers"},
    "report": {"nybble.run", "nybble.quantized", "nybble.models", "nybble.demo", "torch", "transformers"},
}
"""What a part must not import, even where the layers would let it."""


def part_of(path: Path) -> str:
    relative = path.relative_to(ROOT)
    return relative.parts[0].removesuffix(".py")


def under_type_checking(tree: ast.Module) -> set[ast.AST]:
    """Imports that only a type checker sees."""
    hidden: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            hidden.update(child for statement in node.body for child in ast.walk(statement))
    return hidden


@cache
def imports(path: Path) -> frozenset[str]:
    """Full names of the modules that a file imports at run time, wherever in the file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    hidden = under_type_checking(tree)
    found = set()
    for node in ast.walk(tree):
        if node in hidden:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} line {node.lineno}: relative import"
            assert node.module is not None
            # `from nybble import kernels` imports a part, `from nybble.errors import UsageError` a module
            names = {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "nybble" else {node.module}
            found.update(names)
    return frozenset(found)


def ours(path: Path) -> Iterator[tuple[str, str]]:
    """(module, part) of the package's own modules that a file imports."""
    for name in sorted(imports(path)):
        parts = name.split(".")
        if parts[0] == "nybble" and len(parts) > 1:
            yield name, parts[1]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    part = part_of(path)
    if part in FREE:
        return
    assert part in LEVEL, f"{part} has no place in LAYERS: say where it belongs"
    relative = path.relative_to(ROOT).as_posix()
    for name, other in ours(path):
        if other in FREE:
            continue
        assert other in LEVEL, f"{relative} imports {name}, which has no place in LAYERS"
        assert other == part or LEVEL[other] <= LEVEL[part], f"{relative} imports {name}, which comes after {part}"


@pytest.mark.parametrize("part", FORBIDDEN)
def test_forbidden_imports(part: str) -> None:
    paths = [path for path in FILES if part_of(path) == part]
    assert paths
    for path in paths:
        for name in imports(path):
            wrong = [module for module in FORBIDDEN[part] if f"{name}.".startswith(f"{module}.")]
            assert not wrong, f"{path.relative_to(ROOT)} imports {name}"


def test_two_parts_of_one_layer_do_not_import_each_other() -> None:
    pairs = {(part_of(path), other) for path in FILES if part_of(path) in LEVEL for _, other in ours(path) if other in LEVEL}
    for one, other in pairs:
        if one != other and LEVEL[one] == LEVEL[other]:
            assert (other, one) not in pairs, f"{one} and {other} import each other"


def test_the_public_names_are_there() -> None:
    assert sorted(nybble.__all__) == sorted({"__version__", *nybble._HOME})
    assert dir(nybble) == sorted(nybble.__all__)
    for name, home in nybble._HOME.items():
        assert getattr(nybble, name) is getattr(importlib.import_module(home), name)
        assert inspect.getdoc(getattr(nybble, name)), name
    with pytest.raises(AttributeError, match="module 'nybble' has no attribute 'quantise'"):
        nybble.quantise  # noqa: B018  # the access is the test


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_module_says_what_it_is(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text)), f"{path} has no docstring"
    assert len(text.splitlines()) <= MAX_LINES, f"{path} is over {MAX_LINES} lines: split it"


def test_formats_and_methods_are_found_by_file() -> None:
    shared = {
        "activations",
        "base",
        "explain",
        "floating",
        "ggml_search",
        "ggml_tries",
        "nonzero",
        "number_line",
        "qtensor",
        "recast",
        "search",
        "spec",
    }
    found = set()
    for module in pkgutil.iter_modules([str(ROOT / "formats")]):
        names = getattr(importlib.import_module(f"nybble.formats.{module.name}"), "NAMES", {})
        assert bool(names) != (module.name in shared), module.name
        found.update(names)
    assert sorted(found) == format_names()
    files = {path.stem for path in (ROOT / "methods").glob("*.py")} - {"__init__"}
    assert sorted(files) == method_names()
    for name in files:
        assert isinstance(importlib.import_module(f"nybble.methods.{name}").SETTINGS, Settings)
        assert parse_method(name).settings == importlib.import_module(f"nybble.methods.{name}").SETTINGS


HEAVY = ("torch", "transformers", "matplotlib", "huggingface_hub", "tokenizers")
LEAN = {
    "import nybble": "import nybble",
    "formats, files and methods": "import nybble.formats, nybble.files.native, nybble.methods; nybble.method_names()",
    "a plan": "import nybble.plan",
    "the process that compares": "import nybble.evaluate.compare",
    "the command line": "import nybble.cli",
    "the engine": "import nybble.engine",
    "decoding": (
        "from nybble.engine import Decoder\n"
        "assert len(Decoder.load({model!r}, threads=1).generate([5, 6], max_new_tokens=3, stop_tokens=())) == 3"
    ),
    "inspect": (
        "import nybble.cli\n"
        "sys.argv = ['nybble', 'inspect', {model!r}]\n"
        "try:\n"
        "    nybble.cli.main()\n"
        "except SystemExit as done:\n"
        "    assert not done.code, done.code\n"
    ),
}


@pytest.mark.parametrize("name", LEAN)
def test_light_things_import_nothing_heavy(name: str) -> None:
    code = LEAN[name].format(model=str(ROOT / "demo" / "model"))
    script = f"import sys\n{code}\nprint('HEAVY', [name for name in {HEAVY!r} if name in sys.modules])"
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    assert done.returncode == 0, done.stderr
    assert "HEAVY []" in done.stdout.splitlines(), done.stdout[-500:]
    assert seconds < 60, f"took {seconds:.1f} s; far over what even a loaded machine needs without torch"
