"""Saving while training goes on: a copy on the host, written by a thread, completed when every rank has written."""

import errno
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from calm_core.checkpoint.folder import begin, finish, remove, retire
from calm_core.checkpoint.fragments import KINDS, HostCopy, fragments
from calm_core.checkpoint.tensor_folder import INDEX, Entry, write_file, write_index
from calm_core.distributed.collectives import on_every_rank, on_first_rank
from calm_core.distributed.engine import Engine
from calm_core.errors import UserError

# Of failures of a file system those that the user can mend: room, quota, and what may be written or read.
FOR_THE_USER = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}

T = TypeVar("T")

Written = tuple[str, str, list[Entry]]  # what a rank has written: the file's name, its content hash, its boxes


@dataclass(frozen=True)
class Saved:
    """A complete checkpoint: its folder, its step, and the seconds from the copy to its completion."""

    path: Path
    step: int
    seconds: float


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
    """Saves checkpoints of an engine into `folder` and keeps the newest `keep`.

    `save` copies this rank's share to the host and returns; `poll` at a later step, or `wait`, completes the checkpoint
    once all ranks have written theirs. Until then it does not exist: a process that dies leaves the one before. The
    copy takes 12 bytes of host memory for each parameter that this rank's optimizer holds.

    A failure to write comes out of `poll` or `wait`, on every rank: a `UserError` if the user can mend it.
    """

    def __init__(self, folder: Path, engine: Engine, keep: int) -> None:
        self._folder, self._keep, self._device = folder, keep, engine.topology.device
        self._copy = HostCopy(engine)
        self._fragments = [fragment for fragment in fragments(engine.chunks) if fragment.mine]
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="saver")
        self._pending: _Pending | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=True)

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Begin checkpoint `step-{step}` with weights and moments as they are now. Collective.

        The one before must be complete: call `wait` first.
        """
        if self._pending is not None:
            raise RuntimeError(f"checkpoint {self._pending.step} is still being written")
        began = time.perf_counter()
        final = self._folder / f"step-{step}"
        partial = on_first_rank(_writing(final, lambda: begin(final)))
        flats = self._copy.take()
        contents = [
            (Entry(f"{kind}/{fragment.name}", fragment.shape, fragment.box), fragment.of(flats[fragment.group][kind]))
            for fragment in self._fragments
            for kind in KINDS
        ]
        written = self._thread.submit(_write, partial / "tensors" / f"rank-{dist.get_rank()}.safetensors", contents)
        self._pending = _Pending(step, state, final, partial, began, written)

    def poll(self) -> Saved | None:
        """Complete the checkpoint that is being written, if every rank has written its share. Collective."""
        if self._pending is None:
            return None
        done = torch.tensor(float(self._pending.written.done()), device=self._device)
        dist.all_reduce(done, op=dist.ReduceOp.MIN)
        return self._complete(self._pending) if done.item() else None

    def wait(self) -> Saved | None:
        """Wait for the checkpoint that is being written, if there is one, and complete it. Collective."""
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
        return Saved(pending.final, pending.step, time.perf_counter() - pending.began)

    def _finish(self, pending: _Pending, parts: list[Written]) -> None:
        tensors = pending.partial / "tensors"
        index = write_index(tensors, [(file, entries) for file, _, entries in parts])
        finish(
            pending.partial,
            pending.final,
            pending.state,
            {INDEX: index, **{file: checksum for file, checksum, _ in parts}},
        )
        self._thread.submit(remove, retire(pending.final, self._keep))  # no part of the save: in its own time


def told_apart(action: Callable[[], T], problem: str, mend: str) -> Callable[[], T]:
    """`action`, whose failures by the file system are a `UserError` if the user can mend them; others are not.

    The exit code follows from it: a launcher tries again after other failures alone.
    """

    def attempt() -> T:
        try:
            return action()
        except OSError as error:
            if error.errno in FOR_THE_USER:
                raise UserError(f"{problem} ({error}): {mend}.") from error
            raise RuntimeError(f"{problem} ({error})") from error

    return attempt


def _writing(final: Path, action: Callable[[], T]) -> Callable[[], T]:
    return told_apart(action, f"checkpoint {final} could not be written", "earlier checkpoints are intact")


def _write(path: Path, contents: list[tuple[Entry, Tensor]]) -> Written:
    return path.name, write_file(path, contents), [entry for entry, _ in contents]
