"""Work on several cores whose result does not depend on how many: pieces of fixed size, each on one thread, taken in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers:
    """Threads that each run torch on one core. A context: torch's own number of threads is one inside, and comes back."""

    def __init__(self, threads: int | None = None) -> None:
        self.threads = threads or torch.get_num_threads()

    def __enter__(self) -> Workers:
        self._before = torch.get_num_threads()
        torch.set_num_threads(1)
        self._pool = ThreadPoolExecutor(self.threads, initializer=torch.set_num_threads, initargs=(1,))
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._before)

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Results in the order of the items; at most one more than there are threads is waiting to be taken."""
        waiting: deque[Future[Result]] = deque()
        for item in items:
            waiting.append(self._pool.submit(function, item))
            if len(waiting) > self.threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def mean(self, function: Callable[[Item], float], items: Sequence[Item]) -> float:
        """Mean of what a function gives, summed in the order of the items."""
        return sum(self.map(function, items)) / len(items)

    def mean_tensors(self, function: Callable[[Item], Sequence[torch.Tensor]], items: Sequence[Item]) -> list[torch.Tensor]:
        """Mean of each of the tensors that a function gives, summed in the order of the items as they come."""
        sums: list[torch.Tensor] = []
        for tensors in self.map(function, items):
            if sums:
                for total, more in zip(sums, tensors, strict=True):
                    total += more
            else:
                sums = [tensor.clone() for tensor in tensors]
        return [total / len(items) for total in sums]

    def each(self, function: Callable[[int], Any], indices: Iterable[int]) -> None:
        """Call a function for every index and wait for all."""
        for _ in self.map(function, indices):
            pass
