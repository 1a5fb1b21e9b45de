"""From one container to another: codes are carried over where the other holds the same values, and what that costs elsewhere is
measured. No torch.

Every weight takes two steps. First the format that is asked for (`to`), if any: a float weight is rounded to it, a packed one
keeps its values where it can. Then the format that the container has for that (`candidates`): the smallest that holds the same
values, else the nearest. What was written is read again and compared, code for code, before it gets its name.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nybble.containers import find_container, open_contents
from nybble.containers.contents import FLOAT_TAGS, Contents
from nybble.containers.float import is_transposed
from nybble.containers.saving import check_room, check_target, container_of, digest_of, save
from nybble.errors import NumericError, UsageError
from nybble.formats import Format, QTensor, parse_format
from nybble.formats.recast import Recast, compare, recast
from nybble.methods import Method, parse_method
from nybble.models.arch import table_for
from nybble.models.checkpoint import unpickle_folder
from nybble.models.info import TensorInfo
from nybble.plan import CAST_TAGS, Plan, Recipe, make_plan

Progress = Callable[[str, int, int], None]
"""Called with (name of the tensor, tensors done, tensors in all)."""
KINDS = {"token table": "embedding", "position table": "positions", "head": "head"}
SAME = 1e-5
"""Squared error, as a share, below which a format counts as another one with its scales rounded: half of a half's last place."""


@contextmanager
def opened(path: str | Path, allow_pickle: bool = False) -> Iterator[Contents]:
    """What a path holds; with `allow_pickle` also a folder that has its weights in *.bin files only, which are first written
    as safetensors into a temporary folder. Errors as of `open_contents`."""
    path = Path(path)
    if not (allow_pickle and path.is_dir() and not any(path.glob("*.safetensors"))):
        yield open_contents(path)
        return
    with tempfile.TemporaryDirectory(prefix="nybble-") as folder:
        copy = Path(folder) / path.resolve().name  # a model's name is its folder's
        copy.mkdir()
        contents = open_contents(unpickle_folder(path, copy))
        yield dataclasses.replace(contents, bytes=sum(file.stat().st_size for file in path.glob("*.bin")))


@dataclass(frozen=True)
class Step:
    """What became of one tensor."""

    name: str
    shape: tuple[int, ...]
    before: str
    """Format spec, or dtype tag of a float."""
    after: str
    exact: bool
    """It decodes to the same floats, to the bit."""
    error: float
    """Squared error, as a share of the squares of what was there before."""
    energy: float
    """Those squares; 0 where nothing changed."""


@dataclass(frozen=True)
class Conversion:
    """What was done, tensor by tensor."""

    path: Path
    container: str
    steps: tuple[Step, ...]
    bytes: int
    """On disk."""

    @property
    def changed(self) -> tuple[Step, ...]:
        """The steps that did not keep every value."""
        return tuple(step for step in self.steps if not step.exact)

    @property
    def error(self) -> float:
        """Squared error over all tensors that changed, as a share of their squares."""
        energy = sum(step.energy for step in self.changed)
        return sum(step.error * step.energy for step in self.changed) / energy if energy else 0.0


def convert(
    source: str | Path | Contents,
    target: str | Path,
    container: str | None = None,
    to: str | None = None,
    method: str = "rtn",
    keep: Sequence[str] = (),
    rules: Sequence[tuple[str, str]] = (),
    options: Mapping[str, str] | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Write a model in another container.

    `source` is whatever `open_contents` opens; `container` follows from the name of `target` where it is not given: gguf for
    `.gguf`, else nybble. `to` is a format or mix for every weight, with `keep` and `rules` as in a recipe; without it every
    weight keeps its format as far as the container has it. `method` chooses codes where a weight is rounded: one that reads no
    calibration text. Raises UsageError for what the container cannot hold, which it lists; InputError for the source;
    NumericError naming the tensor; OutputError where the target cannot be written.
    """
    target = Path(target)
    module = find_container(container_of(target, container))
    parsed = parse_method(method)
    if parsed.settings.calibrated:
        raise UsageError(f"method {parsed} reads calibration text; convert rounds without: nybble quantize --file {container}")
    if to is None and (keep or rules):
        raise UsageError("keep and rules say what else becomes of some weights; give the format of the others with --to")
    chosen = check_target(module.NAME, target, force, options or {})
    contents = source if isinstance(source, Contents) else open_contents(source)
    plan = make_plan(describe_contents(contents), Recipe(to, str(parsed), tuple(keep), tuple(rules))) if to else None
    work = _Work(contents, module, plan, parsed, progress)
    result = work.contents()
    check_room(target, work.bytes)
    size = save(result, target, module.NAME, chosen, force, work.digests.__getitem__)
    return Conversion(target, module.NAME, tuple(work.steps[name] for name in (*result.packed, *result.floats)), size)


def stay_float(source: str | Path, container: str, recipe: Recipe) -> list[str]:
    """Names of the weights of a float model that a container has as floats whatever the recipe says (tables of tokens in a GPTQ
    folder): they need not be rounded first. Raises UsageError for a format that it cannot hold, before any work."""
    module = find_container(container)
    contents = open_contents(source)
    found = []
    for row in make_plan(describe_contents(contents), recipe).packed:
        rows, columns = row.tensor.shape
        specs = _specs(module, contents, row.tensor.name, parse_format(str(row.format)), (rows, columns), asked=True)
        if all(parse_format(spec).is_cast for spec in specs) and not parse_format(str(row.format)).is_cast:
            found.append(row.tensor.name)
    return found


def describe_contents(contents: Contents) -> list[TensorInfo]:
    """Every tensor of a model as a plan takes it, from its names and shapes alone. A head that is tied stands once, with its
    table of tokens."""
    table = table_for(str(contents.config.get("model_type")))
    tied = bool(contents.config.get("tie_word_embeddings", table.ties_by_default))
    head, tokens = table.tied or ("", "")
    infos = []
    for name, shape, dtype in (
        *((name, shape, "F32") for name, (_, shape) in contents.packed.items()),
        *((name, shape, tag) for name, (tag, shape) in contents.floats.items()),
    ):
        if tied and name == f"{head}.weight":
            continue
        matrix = name in contents.packed or (len(shape) == 2 and name.endswith("weight") and dtype in FLOAT_TAGS)
        transposed = name in contents.floats and is_transposed(contents.config, name)
        kind = kind_of(contents, name) if matrix else "float"
        infos.append(
            TensorInfo(
                name=name,
                aliases=(f"{head}.weight",) if tied and name == f"{tokens}.weight" else (),
                kind={"float": "float", "linear": "conv1d" if transposed else "linear", "head": "linear"}.get(kind, "embedding"),
                shape=(shape[1], shape[0]) if transposed else tuple(shape),
                dtype=dtype,
                block=table.block_of(name),
                role=table.role_of(name),
                reason="" if matrix else "bias" if name.endswith("bias") else "norm gain or other vector",
            )
        )
    return infos


def kind_of(contents: Contents, name: str) -> str:
    """What a matrix is to a container: linear, head, embedding or positions; by its architecture's table, or by its name."""
    table = table_for(str(contents.config.get("model_type")))
    role = table.role_of(name)
    if role:
        return KINDS.get(role, "linear")
    words = name.lower()
    if "lm_head" in words:
        return "head"
    if "position" in words or words.endswith("wpe.weight"):
        return "positions"
    return "embedding" if "embed" in words or words.endswith("wte.weight") else "linear"


class _Work:
    """A conversion while it goes on: what each tensor becomes, and what that cost."""

    def __init__(
        self, source: Contents, module: ModuleType, plan: Plan | None, method: Method, progress: Progress | None
    ) -> None:
        self.source, self.module, self.method, self.progress = source, module, method, progress
        self.wanted = {row.tensor.name: row.format for row in plan.rows} if plan else {}
        self.plan = plan
        self.steps: dict[str, Step] = {}
        self.digests: dict[str, str] = {}
        self.specs: dict[str, str] = {}
        """Name of each matrix -> the format that it is written in."""
        self.tags: dict[str, str] = {}
        """Name of each other tensor -> its dtype tag."""
        names = {info.name for info in describe_contents(source)}
        for name in source.packed:
            self.specs[name] = self._choose(name)
        for name, (tag, shape) in source.floats.items():
            if name not in names:  # a tied head: its table stands for it
                continue
            if len(shape) == 2 and tag in FLOAT_TAGS and name.endswith("weight"):
                self.specs[name] = self._choose(name)
            else:
                self.tags[name] = CAST_TAGS[plan.recipe.format] if plan and plan.is_cast and tag in FLOAT_TAGS else tag

    def shape(self, name: str) -> tuple[int, int]:
        """[out, in] of a matrix."""
        if name in self.source.packed:
            return self.source.packed[name][1]
        first, second = self.source.floats[name][1]
        return (second, first) if is_transposed(self.source.config, name) else (first, second)

    @property
    def bytes(self) -> int:
        """Of all tensors as they are written."""
        matrices = sum(parse_format(spec).stored_bits(self.shape(name)) // 8 for name, spec in self.specs.items())
        return matrices + sum(4 * int(np.prod(self.source.floats[name][1])) for name in self.tags)

    def contents(self) -> Contents:
        """What is written. A tensor is made when the container asks for it."""
        plan = (
            {"plan_hash": self.plan.hash, "format": self.plan.recipe.format, "method": self.plan.recipe.method}
            if self.plan
            else {}
        )
        packed = {name: (spec, self.shape(name)) for name, spec in self.specs.items()}
        return dataclasses.replace(
            self.source,
            container=self.module.NAME,
            packed=packed,
            floats={name: (tag, self.source.floats[name][1]) for name, tag in self.tags.items()},
            read_packed=self._matrix,
            read_float=self._float,
            read_stored=None,
            provenance={**self.source.provenance, **plan},
        )

    def _choose(self, name: str) -> str:
        """The format of a matrix in the container."""
        asked = self._asked(name)
        fmt = parse_format(asked)
        specs = _specs(self.module, self.source, name, fmt, self.shape(name), asked=name in self.wanted)
        if all(parse_format(spec).is_cast for spec in specs):  # floats stay of the type they are, or that of the model
            tag = self.source.floats[name][0] if name in self.source.floats else self.source.float_tag
            specs = tuple(sorted(specs, key=lambda spec: spec != _spec_of(tag)))
            if name in self.source.floats and not fmt.is_cast:
                return specs[0]
        if len(specs) == 1 or str(fmt) in specs:
            return str(fmt) if str(fmt) in specs else specs[0]
        tensor = self._given(name, asked)  # codes that are there already: cheap to try
        return next((spec for spec in specs if self._is_exact(tensor, parse_format(spec))), specs[0])

    def _is_exact(self, tensor: QTensor, fmt: Format) -> bool:
        done = recast(tensor, fmt)
        settled = self._settled(done.tensor)
        return done.exact and (settled is done.tensor or compare(tensor.decode(), settled).exact)

    def _asked(self, name: str) -> str:
        """The format that a matrix should have before the container has its say."""
        given = self.source.packed[name][0] if name in self.source.packed else _spec_of(self.source.floats[name][0])
        if self.plan is not None and self.plan.is_cast and name in self.source.floats:
            return self.plan.recipe.format
        return self.wanted.get(name) or given

    def _given(self, name: str, asked: str) -> QTensor:
        """A matrix in the format that is asked for."""
        fmt = parse_format(asked)
        if name in self.source.packed:
            return recast(self.source.read_packed(name), fmt).tensor
        return self._round(name, self._weight(name), fmt)

    def _weight(self, name: str) -> NDArray[np.float32]:
        """A float matrix [out, in]."""
        values = self.source.float32(name)
        return np.ascontiguousarray(values.T) if is_transposed(self.source.config, name) else values

    def _round(self, name: str, weight: NDArray[np.float32], fmt: Format) -> QTensor:
        try:
            return self.method.quantize(weight, fmt) if not fmt.is_cast else QTensor(fmt, *fmt.round(weight))
        except NumericError as error:
            raise NumericError(f"{name}: {error}") from error

    def _matrix(self, name: str) -> QTensor:
        spec = self.specs[name]
        fmt, asked = parse_format(spec), parse_format(self._asked(name))
        if name in self.source.packed:
            given = self.source.read_packed(name)
            before = str(given.format)
            tensor = recast(given, asked).tensor if asked != fmt else given
            made = self._settled(recast(tensor, fmt).tensor)
            done = Recast(made, True, 0.0, 0.0) if made is given else compare(given.decode(), made)
        else:
            before, weight = self.source.floats[name][0], self._weight(name)
            if fmt.is_cast:
                made = self._round(name, weight, fmt)
            else:
                made = self._settled(recast(self._round(name, weight, asked), fmt).tensor)
            done = Recast(made, True, 0.0, 0.0) if spec == _spec_of(before) else compare(weight, made)
        self._note(Step(name, self.shape(name), before, spec, done.exact, done.error, done.energy))
        self.digests[name] = digest_of(made)
        return made

    def _settled(self, tensor: QTensor) -> QTensor:
        """A tensor whose params the container can store, where that is coarser than the format."""
        return self.module.settle(tensor) if hasattr(self.module, "settle") else tensor

    def _float(self, name: str) -> NDArray[Any]:
        tag, values = self.source.floats[name][0], self.source.read_float(name)
        exact, error, energy = True, 0.0, 0.0
        if self.tags[name] != tag:
            wide = self.source.float32(name)
            fmt = parse_format(_spec_of(self.tags[name]))
            cast = compare(wide.reshape(1, -1), self._round(name, wide.reshape(1, -1), fmt))
            values = cast.tensor.stored()["values"].reshape(wide.shape)
            exact, error, energy = cast.exact, cast.error, cast.energy
        self._note(Step(name, values.shape, tag, self.tags[name], exact, error, energy))
        return values

    def _note(self, step: Step) -> None:
        self.steps[step.name] = step
        if self.progress is not None:
            self.progress(step.name, len(self.steps), len(self.specs) + len(self.tags))


def _specs(
    module: ModuleType, contents: Contents, name: str, fmt: Format, shape: tuple[int, int], asked: bool
) -> tuple[str, ...]:
    """A container's candidates for a weight. Raises UsageError where it has none, and where a format was `asked` for by name and
    the candidates are others: a near miss is for what is there already."""
    specs: tuple[str, ...] = module.candidates(fmt, shape, kind_of(contents, name))
    if asked:
        specs = tuple(spec for spec in specs if _holds(parse_format(spec), fmt))
    if not specs:
        raise UsageError(
            f"{module.NAME} cannot hold {name} {list(shape)} in {fmt}: it holds {module.HOLDS}; "
            "name one of them with --to, or another container with --file"
        )
    return specs


@cache
def _holds(there: Format, fmt: Format) -> bool:
    """Whether a format holds what another does, but for the rounding of scales to its storage type. Found out on a sample."""
    if there.is_cast or there == fmt:
        return True
    sample = np.random.default_rng(0).standard_normal((4, 512)).astype(np.float32)
    return recast(QTensor(fmt, *fmt.round(sample)), there).error < SAME


def _spec_of(tag: str) -> str:
    return {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}[tag]
