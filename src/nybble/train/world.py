"""The processes that train together: one, or as many as torchrun started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import distributed

from nybble.errors import UsageError


@dataclass(frozen=True)
class World:
    """This process among `size`; the first reports and saves."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process reports and saves."""
        return self.rank == 0

    def mean(self, value: float) -> float:
        """Of all processes."""
        if self.size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        distributed.all_reduce(total)
        return float(total) / self.size

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            distributed.barrier()


@contextmanager
def join(device: str | None = None) -> Iterator[World]:
    """The processes of torchrun (its variables RANK, LOCAL_RANK and WORLD_SIZE), or this one alone.

    `device`: cpu or cuda; default a GPU where there is one. Raises UsageError for one that is not there.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        raise UsageError(f"device {kind!r} is not here; this machine has cpu{' and cuda' if torch.cuda.is_available() else ''}")
    size, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    place = torch.device(kind, local) if kind == "cuda" else torch.device("cpu")
    if size == 1:
        yield World(0, 1, place)
        return
    distributed.init_process_group("nccl" if kind == "cuda" else "gloo")
    try:
        world = World(distributed.get_rank(), size, place)
        yield world
        world.wait()  # for the first, which saves: torchrun ends all when one ends badly
    finally:
        distributed.destroy_process_group()
