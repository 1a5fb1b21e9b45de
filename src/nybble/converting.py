"""What every tensor of a model becomes in another container, and what that costs. No torch.

Every weight takes two steps. First the format that is asked for, if any: a float weight is rounded to it, a packed one keeps its
values where it can. Then the format that the container has for that (`candidates`): the smallest that holds the same values, else
the nearest. Where rows do not depend on each other they may be made apart, so that no tensor is ever held.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nybble.containers.contents import Contents
from nybble.containers.float import is_transposed
from nybble.containers.saving import digest_of
from nybble.errors import NumericError, UsageError
from nybble.files.safetensors import FLOAT_TAGS, forget_pages, widen
from nybble.formats import Format, QTensor, parse_format
from nybble.formats.activations import Activations
from nybble.formats.recast import Recast, compare, recast
from nybble.methods import Method
from nybble.models.arch import table_for
from nybble.models.checkpoint import row_digests
from nybble.models.info import TensorInfo
from nybble.plan import CAST_TAGS, Plan, prunes

Progress = Callable[[str, int, int], None]
"""Called with (name of the tensor, tensors done, tensors in all)."""
Cost = tuple[bool, float, float]
"""(whether the values are the same, squared error, squares of what was there)."""
NO_COST: Cost = (True, 0.0, 0.0)
KINDS = {"token table": "embedding", "position table": "positions", "head": "head"}
TRIED_WEIGHTS = 1 << 22
"""Of a tensor that is tried in several formats: as many are held."""
SLAB_WEIGHTS = 1 << 20
"""Of a tensor that is carried over: as many are looked at together."""
SAME = 1e-5
"""Squared error, as a share, below which a format counts as another one with its scales rounded: half of a half's last place."""


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


class Work:
    """A conversion while it goes on: what each tensor becomes, and what that costs. Tensors may be made in several threads."""

    def __init__(
        self,
        source: Contents,
        module: ModuleType,
        plan: Plan | None,
        method: Method,
        progress: Progress | None = None,
        measures: bool = True,
    ) -> None:
        """With `measures`, what becomes of a tensor is compared with what it was."""
        self.source, self.module, self.method, self.plan = source, module, method, plan
        self.progress, self.measures = progress, measures
        rows = {row.tensor.name: row for row in plan.rows} if plan else {}
        self.wanted = {name: row.format for name, row in rows.items()}
        self.pruned = {name for name, row in rows.items() if prunes(row)}
        self.sums: dict[str, Cost] = {}
        self.parts: dict[tuple[str, int], tuple[Cost, list[str] | None]] | None = None
        """What is known of rows, by name and first row, where somebody else adds it up: their cost, and the digests of what they
        were made from, if `hashes`. Pieces may be made in any order."""
        self.hashes = False
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
        self.schemes = dict(source.schemes)
        for name, row in rows.items():
            if row.activations and name in self.specs:
                threshold = method.settings.threshold if row.activations == "outliers" else 0.0
                self.schemes[name] = Activations(row.activations, threshold=threshold)

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

    def contents(self, provenance: Mapping[str, Any]) -> Contents:
        """What is written. A tensor is made when the container asks for it."""
        return dataclasses.replace(
            self.source,
            container=self.module.NAME,
            packed={name: (spec, self.shape(name)) for name, spec in self.specs.items()},
            floats={name: (tag, self.source.floats[name][1]) for name, tag in self.tags.items()},
            read_packed=self._matrix,
            read_float=self._float,
            read_stored=None,
            by_rows=frozenset(name for name in (*self.specs, *self.tags) if self._by_rows(name)),
            read_rows=lambda name, rows: (self._matrix if name in self.specs else self._float)(name, rows),
            schemes=self.schemes,
            provenance=provenance,
        )

    def steps(self) -> tuple[Step, ...]:
        """What became of every tensor, once all are made."""
        found = []
        for name in (*self.specs, *self.tags):
            exact, error, energy = self.sums.get(name, NO_COST)
            before = self.source.packed[name][0] if name in self.source.packed else self.source.floats[name][0]
            after = self.specs.get(name) or self.tags[name]
            shape = self.shape(name) if name in self.specs else self.source.floats[name][1]
            found.append(Step(name, shape, before, after, exact, error / (energy or 1.0), energy))
        return tuple(found)

    def add(self, name: str, cost: Cost) -> None:
        """Count some rows of a tensor as made."""
        exact, error, energy = self.sums.get(name, NO_COST)
        self.sums[name] = exact and cost[0], error + cost[1], energy + cost[2]

    def source_rows(self, name: str, rows: slice | None) -> NDArray[Any]:
        """A float tensor of the source, or some rows, as it lies there."""
        values = self.source.read_float(name)
        return values if rows is None else values[rows]

    def _by_rows(self, name: str) -> bool:
        """Whether rows of what is written come from the same rows of the source alone."""
        if name in self.tags:
            return len(self.source.floats[name][1]) > 1
        return self._rows_apart(name, self.specs[name])

    def _rows_apart(self, name: str, *specs: str) -> bool:
        """Whether rows of a matrix in some formats come from the same rows of the source alone."""
        if name in self.source.packed or is_transposed(self.source.config, name) or name in self.pruned:
            return False
        return self.method.by_rows and all(parse_format(spec).by_rows for spec in (self._asked(name), *specs))

    def _choose(self, name: str) -> str:
        """The format of a matrix in the container."""
        asked = self._asked(name)
        fmt = parse_format(asked)
        specs = candidate_specs(self.module, self.source, name, fmt, self.shape(name), asked=name in self.wanted)
        if all(parse_format(spec).is_cast for spec in specs):  # floats stay of the type they are, or that of the model
            tag = self.source.floats[name][0] if name in self.source.floats else self.source.float_tag
            specs = tuple(sorted(specs, key=lambda spec: spec != _spec_of(tag)))
            if name in self.source.floats and not fmt.is_cast:
                return specs[0]
        if len(specs) == 1 or str(fmt) in specs:
            return str(fmt) if str(fmt) in specs else specs[0]
        left = list(specs)
        size = self.shape(name)[0]
        step = max(1, TRIED_WEIGHTS // max(1, self.shape(name)[1])) if self._rows_apart(name, *specs) else size
        for start in range(0, size, step):
            tensor = self._given(name, asked, slice(start, start + step) if step < size else None)
            left = [spec for spec in left if self._is_exact(tensor, parse_format(spec))]
            if not left:
                break
        forget_pages()
        return next(iter(left), specs[0])

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

    def _given(self, name: str, asked: str, rows: slice | None) -> QTensor:
        """A matrix in the format that is asked for, or some rows of a float one."""
        fmt = parse_format(asked)
        if name in self.source.packed:
            return recast(self.source.read_packed(name), fmt).tensor
        return self._round(name, self._weight(name, rows), fmt, rows)

    def _weight(self, name: str, rows: slice | None = None) -> NDArray[np.float32]:
        """A float matrix [out, in], or some rows of one that lies so."""
        values = widen(self.source.floats[name][0], self.source_rows(name, rows), name)
        return np.ascontiguousarray(values.T) if is_transposed(self.source.config, name) else values

    def carries(self, name: str) -> bool:
        """Whether a matrix is a float of the source, and is written in the type that it has."""
        given = self.source.floats.get(name)
        return given is not None and name not in self.pruned and self.specs[name] == _spec_of(given[0])

    def _carried(self, name: str, fmt: Format, rows: slice | None) -> QTensor:
        """A float matrix, or some rows, in the type that it has: no value is touched, all are looked at."""
        values = self.source_rows(name, rows)
        step = max(1, SLAB_WEIGHTS // max(1, values.shape[1]))
        for start in range(0, len(values), step):
            part = widen(self.source.floats[name][0], values[start : start + step], name)
            self._check_finite(name, part, start + (rows.start if rows else 0))
        lying = np.ascontiguousarray(values.T if is_transposed(self.source.config, name) else values)
        return QTensor(fmt, *fmt.from_storage({"values": lying}, (lying.shape[0], lying.shape[1])))

    def _straight(self, name: str, fmt: Format, rows: slice | None) -> QTensor | None:
        """A float matrix, or some rows, rounded to nearest without being widened first; None where that is no way."""
        settings = self.method.settings
        tag = self.source.floats[name][0]
        if settings.scales != "range" or settings.prunes or is_transposed(self.source.config, name) or tag not in FLOAT_TAGS:
            return None
        found = fmt.round_stored(self.source_rows(name, rows), tag.lower())
        return None if found is None else QTensor(fmt, *found)

    def _round(self, name: str, weight: NDArray[np.float32], fmt: Format, rows: slice | None = None) -> QTensor:
        prune = name in self.pruned
        try:
            if fmt.is_cast and not prune:
                return QTensor(fmt, *fmt.round(weight))
            return self.method.quantize(weight, fmt, prune=prune)
        except NumericError as error:
            where = name if rows is None else f"{name}, rows counted from {rows.start}"
            raise NumericError(f"{where}: {error}") from error

    def _matrix(self, name: str, rows: slice | None = None) -> QTensor:
        spec = self.specs[name]
        fmt, asked = parse_format(spec), parse_format(self._asked(name))
        if name in self.source.packed:
            given = self.source.read_packed(name)
            tensor = recast(given, asked).tensor if asked != fmt else given
            made = self._settled(recast(tensor, fmt).tensor)
            done = None if made is given else compare(given.decode(), made)
        else:
            weight = None
            if self.carries(name):
                rounded: QTensor | None = self._carried(name, fmt, rows)
            else:
                rounded = None if self.measures else self._straight(name, asked, rows)
            if rounded is None:
                weight = self._weight(name, rows)
                rounded = self._round(name, weight, fmt if fmt.is_cast else asked, rows)
            made = self._settled(rounded if fmt.is_cast else recast(rounded, fmt).tensor)
            done = None if weight is None or not self.measures else compare(weight, made)
        made = self.with_scheme(name, made)
        self._note(name, done, rows)
        if self.parts is None:
            self.digests[name] = digest_of(made)
        return made

    def with_scheme(self, name: str, tensor: QTensor) -> QTensor:
        """A tensor that is made, with what becomes of its inputs: as the container has it, else as the plan does."""
        settled = self._settled(tensor)
        if name in self.schemes and settled.activations is None:
            settled = dataclasses.replace(settled, activations=self.schemes[name])
        return settled

    def _settled(self, tensor: QTensor) -> QTensor:
        """A tensor whose params the container can store, where that is coarser than the format."""
        return self.module.settle(tensor) if hasattr(self.module, "settle") else tensor

    def _float(self, name: str, rows: slice | None = None) -> NDArray[Any]:
        tag, values = self.source.floats[name][0], self.source_rows(name, rows)
        if self.plan is not None and tag in FLOAT_TAGS:
            self._check_finite(name, widen(tag, values, name))
        done = None
        if self.tags[name] != tag:
            wide = widen(tag, values, name)
            fmt = parse_format(_spec_of(self.tags[name]))
            done = compare(wide.reshape(1, -1), self._round(name, wide.reshape(1, -1), fmt))
            values = done.tensor.stored()["values"].reshape(wide.shape)
        self._note(name, done, rows)
        return values

    def _check_finite(self, name: str, values: NDArray[np.float32], row: int = 0) -> None:
        bad = ~np.isfinite(values)
        if bad.any():
            first = tuple(int(i) for i in np.argwhere(bad)[0])
            raise NumericError(
                f"{name}: {int(bad.sum())} of {values.size} values are not finite, the first is {float(values[first])} at "
                f"{[first[0] + row, *first[1:]]}; repair the checkpoint or get it again"
            )

    def _note(self, name: str, done: Recast | None, rows: slice | None) -> None:
        cost = NO_COST if done is None or done.exact else (False, done.error * (done.energy or 1.0), done.energy)
        if self.parts is not None:
            hashed = self.hashes and name in self.source.floats
            digests = row_digests(self.source_rows(name, rows)) if hashed else None
            self.parts[name, rows.start if rows else 0] = cost, digests
            return
        self.sums[name] = cost
        if self.progress is not None:
            self.progress(name, len(self.sums), len(self.specs) + len(self.tags))


def candidate_specs(
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
