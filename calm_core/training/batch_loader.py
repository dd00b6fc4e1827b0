"""The batches of a run, loaded one step ahead."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import numpy as np


def step_samples(
    consumed: int, micro_batches: int, micro_batch: int, data_rank: int, data_size: int
) -> list[np.ndarray]:
    """Global sample indices of each of this rank's micro-batches in the step that starts at sample `consumed`.

    Together the ranks take exactly the samples `consumed .. consumed + global_batch - 1`, so the samples of a
    step do not depend on the layout.
    """
    first = consumed + data_rank * micro_batch
    return [np.arange(micro_batch) + first + index * micro_batch * data_size for index in range(micro_batches)]


class Loader:
    """Loads the micro-batches of each step in a thread during the previous step.

    Args:
        load: global sample indices -> micro-batch.
        plan: consumed samples -> the indices of each micro-batch of the next step.
        consumed: samples consumed before the first step.
        global_batch: samples per step.
        steps: steps that remain.
    """

    def __init__(
        self,
        load: Callable[[np.ndarray], Any],
        plan: Callable[[int], list[np.ndarray]],
        consumed: int,
        global_batch: int,
        steps: int,
    ) -> None:
        self._load, self._plan = load, plan
        self._starts = iter(range(consumed, consumed + steps * global_batch, global_batch))
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
        self._next: Future | None = self._submit()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def next(self) -> tuple[list[Any], float]:
        """The micro-batches of the next step, and the seconds spent waiting for them."""
        began = time.perf_counter()
        batches = self._next.result()
        waited = time.perf_counter() - began
        self._next = self._submit()
        return batches, waited

    def _submit(self) -> Future | None:
        start = next(self._starts, None)
        return None if start is None else self._thread.submit(lambda: [self._load(s) for s in self._plan(start)])
