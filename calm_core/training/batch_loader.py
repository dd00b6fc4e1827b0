"""The batches of a run, loaded and copied to the device one step ahead."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields, replace
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor


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
    """Loads the micro-batches of each step in a thread during the previous step, and copies them to the device.

    On a GPU the copies are asynchronous, on a stream of their own. The thread runs no model, so it
    does not occupy the device, and the interpreter only for short times.

    Args:
        load: global sample indices -> micro-batch, a dataclass with tensors on the host.
        plan: consumed samples -> the indices of each micro-batch of the next step.
        consumed: samples consumed before the first step.
        global_batch: samples per step.
        steps: steps that remain.
        device: where the step takes place.
    """

    def __init__(
        self,
        load: Callable[[np.ndarray], Any],
        plan: Callable[[int], list[np.ndarray]],
        consumed: int,
        global_batch: int,
        steps: int,
        device: torch.device,
    ) -> None:
        self._load, self._plan = load, plan
        self._copies = DeviceCopies(device) if device.type == "cuda" else None
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
        if self._copies:
            self._copies.wait(batches)
        self._next = self._submit()
        return batches, waited

    def _submit(self) -> Future | None:
        start = next(self._starts, None)
        return None if start is None else self._thread.submit(self._load_step, start)

    def _load_step(self, start: int) -> list[Any]:
        batches = [self._load(samples) for samples in self._plan(start)]
        return [self._copies.begin(batch) for batch in batches] if self._copies else batches


class DeviceCopies:
    """Copies of micro-batches on a GPU, made by another thread and stream than those of the step."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def begin(self, batch: Any) -> Any:
        """Begin to copy a micro-batch, through pinned memory: only from there is a copy asynchronous."""
        with torch.cuda.stream(self._stream):
            return replace(batch, **{name: self._copy(tensor) for name, tensor in _tensors(batch).items()})

    def wait(self, batches: list[Any]) -> None:
        """Let the current stream wait for what was begun; the copies' memory is not reused before it has read them."""
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        for tensor in (tensor for batch in batches for tensor in _tensors(batch).values()):
            tensor.record_stream(current)

    def _copy(self, tensor: Tensor) -> Tensor:
        return tensor.contiguous().pin_memory().to(self._device, non_blocking=True)


def _tensors(batch: Any) -> dict[str, Tensor]:
    """The tensors of a dataclass, by name of their field."""
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}
