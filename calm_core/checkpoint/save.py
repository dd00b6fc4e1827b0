"""Saving while training continues: copied to host memory, written by a thread, complete when every rank has written."""

import errno
import shutil
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from calm_core.checkpoint.folder import begin, finish, remove, retire
from calm_core.checkpoint.fragments import HostCopy, fragments
from calm_core.checkpoint.tensor_folder import INDEX, Entry, write_file, write_index
from calm_core.distributed.collectives import on_every_rank, on_first_rank
from calm_core.distributed.engine import Engine
from calm_core.errors import UserError

# File system errors that the user can fix: no space, quota, file size limit, permissions.
FOR_THE_USER = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}

T = TypeVar("T")

Written = tuple[str, str, list[Entry]]  # what a rank has written: file name, content hash, boxes


@dataclass(frozen=True)
class Saved:
    """A complete checkpoint.

    Attributes:
        path: its folder.
        step: its training step.
        seconds: from the copy to host memory to completion.
        stall: seconds that training waited for it.
    """

    path: Path
    step: int
    seconds: float
    stall: float


@dataclass(frozen=True)
class SavePolicy:
    """When to save and what to keep.

    Attributes:
        keep: the newest checkpoints to keep.
        every: steps between checkpoints; 0 saves only when told to.
        milestones: further steps at which to save, whose checkpoints are always kept.
        background: write while training continues.
    """

    keep: int
    every: int = 0
    milestones: Collection[int] = ()
    background: bool = True

    def due(self, step: int) -> bool:
        """Whether a checkpoint is due after this step."""
        return step in self.milestones or (self.every > 0 and step % self.every == 0)


@dataclass(frozen=True)
class _Pending:
    """A checkpoint that is being written."""

    step: int
    state: dict[str, Any]
    final: Path
    partial: Path
    began: float
    written: Future


class Saver:
    """Saves checkpoints of an engine into `folder`, at the steps of its policy and when told to.

    `save` copies what this rank's optimizer holds to host memory and returns; `poll` at a later step, or `wait`,
    completes the checkpoint once all ranks have written. Until then it does not exist: if a process dies, the previous
    one is still there. With AdamW the copy takes 12 bytes of host memory for each parameter of this rank's optimizer.

    If writing fails, `poll` or `wait` raises on every rank: `UserError` if the user can fix it.
    """

    def __init__(self, folder: Path, engine: Engine, policy: SavePolicy) -> None:
        self._folder, self._policy, self._device = folder, policy, engine.topology.device
        self._copy = HostCopy(engine)
        self._fragments = [fragment for fragment in fragments(engine.model_parts) if fragment.mine]
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="saver")
        self._pending: _Pending | None = None
        self._last_step: int | None = None
        self._stall = 0.0

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=True)

    def after_step(
        self, step: int, state: Callable[[], dict[str, Any]], now: bool = False, wait: bool = False
    ) -> list[Saved]:
        """Complete the checkpoint being written if it is ready, and save this step if it is due. Collective.

        Args:
            step: the step just done.
            state: makes the plain values to save with it.
            now: save this step in any case, and wait until it is complete.
            wait: wait until what is being written is complete.

        Returns:
            The checkpoints that are now complete.
        """
        began = time.perf_counter()
        completed = [self.poll()]
        if (now or self._policy.due(step)) and step != self._last_step:
            completed.append(self.wait())
            self.save(step, state())
        if now or wait or not self._policy.background:
            completed.append(self.wait())
        self._stall += time.perf_counter() - began
        return [self._with_stall(saved) for saved in completed if saved is not None]

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Begin checkpoint `step-{step}` with weights and optimizer state as they are now. Collective.

        The previous one must be complete: call `wait` first.
        """
        if self._pending is not None:
            raise RuntimeError(f"checkpoint {self._pending.step} is still being written")
        began = time.perf_counter()
        final = self._folder / f"step-{step}"
        partial = on_first_rank(_writing(final, lambda: begin(final)))
        flats = self._copy.take()
        contents = [
            (Entry(f"{kind}/{fragment.name}", fragment.shape, fragment.box), fragment.of(flat))
            for fragment in self._fragments
            for kind, flat in flats[fragment.group].items()
        ]
        written = self._thread.submit(_write, partial / "tensors" / f"rank-{dist.get_rank()}.safetensors", contents)
        self._pending = _Pending(step, state, final, partial, began, written)
        self._last_step = step

    def poll(self) -> Saved | None:
        """Complete the checkpoint that is being written if every rank has written its files. Collective."""
        if self._pending is None:
            return None
        done = torch.tensor(float(self._pending.written.done()), device=self._device)
        dist.all_reduce(done, op=dist.ReduceOp.MIN)
        return self._complete(self._pending) if done.item() else None

    def wait(self) -> Saved | None:
        """Wait for the checkpoint that is being written, if any, and complete it. Collective."""
        if self._pending is None:
            return None
        wait([self._pending.written])
        return self._complete(self._pending)

    def _complete(self, pending: _Pending) -> Saved:
        self._pending = None
        try:
            parts = on_every_rank(_writing(pending.final, pending.written.result))
            on_first_rank(_writing(pending.final, lambda: self._finish(pending, parts)))
        except UserError:
            on_first_rank(lambda: shutil.rmtree(pending.partial, ignore_errors=True))
            raise
        return Saved(pending.final, pending.step, time.perf_counter() - pending.began, 0.0)

    def _finish(self, pending: _Pending, parts: list[Written]) -> None:
        tensors = pending.partial / "tensors"
        index = write_index(tensors, [(file, entries) for file, _, entries in parts])
        finish(
            pending.partial,
            pending.final,
            pending.state,
            {INDEX: index, **{file: checksum for file, checksum, _ in parts}},
        )
        old = retire(pending.final, self._policy.keep, self._policy.milestones)
        self._thread.submit(remove, old)  # not part of the save: in the background

    def _with_stall(self, saved: Saved) -> Saved:
        stall, self._stall = self._stall, 0.0
        return replace(saved, stall=stall)


def explain_file_errors(action: Callable[[], T], problem: str, advice: str) -> Callable[[], T]:
    """`action`, with a file system error raised as a `UserError` if the user can fix it, else as a `RuntimeError`.

    The exit code depends on it: a launcher retries after the latter only.
    """

    def attempt() -> T:
        try:
            return action()
        except OSError as error:
            if error.errno in FOR_THE_USER:
                raise UserError(f"{problem} ({error}): {advice}.") from error
            raise RuntimeError(f"{problem} ({error})") from error

    return attempt


def _writing(final: Path, action: Callable[[], T]) -> Callable[[], T]:
    return explain_file_errors(action, f"checkpoint {final} could not be written", "earlier checkpoints are intact")


def _write(path: Path, contents: list[tuple[Entry, Tensor]]) -> Written:
    return path.name, write_file(path, contents), [entry for entry, _ in contents]
