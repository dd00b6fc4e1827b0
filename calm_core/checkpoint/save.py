"""Saving what ZeRO-1 assigns to this rank, as boxes of global tensors, while training continues.

It is copied to host memory and written by a thread; a checkpoint is complete when every rank has written.
"""

import errno
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from calm_core.checkpoint.folder import begin, finish, remove, retire
from calm_core.checkpoint.tensor_folder import INDEX, Box, Entry, boxes_of_range, write_file, write_index
from calm_core.distributed.collectives import on_every_rank, on_first_rank
from calm_core.distributed.engine import Engine
from calm_core.errors import UserError
from calm_core.megatron import MegatronModule, parallel_state
from calm_core.model.parameters import Piece, global_shape, named_parameters, pieces

WEIGHT = "weight"

# File system errors that the user can fix: no space, quota, file size limit, permissions.
FOR_THE_USER = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}

T = TypeVar("T")

Written = tuple[str, str, list[Entry]]  # what a rank has written: file name, content hash, boxes


@dataclass(frozen=True)
class Fragment:
    """Consecutive elements of this rank's flat tensor that are a box of a global tensor.

    Attributes:
        name: of the global tensor, without its kind.
        shape: of the global tensor.
        box: the block of the global tensor.
        group: index of the optimizer's parameter group.
        start: index of the first element in the group's flat tensor.
        mine: whether this rank writes it; all tensor-parallel ranks hold a tensor that is not split, the first writes.
    """

    name: str
    shape: tuple[int, ...]
    box: Box
    group: int
    start: int
    mine: bool

    def of(self, flat: Tensor) -> Tensor:
        """These elements of the group's flat tensor (a view)."""
        return flat.narrow(0, self.start, self.box.numel)


def fragments(model_parts: Sequence[MegatronModule]) -> Iterator[Fragment]:
    """What this rank's optimizer holds, once an engine has been made of the model parts."""
    first = parallel_state.get_tensor_model_parallel_rank() == 0
    for name, parameter in named_parameters(model_parts):
        # DeepSpeed's record of where a parameter's elements (lp) lie in this rank's flat tensor (hp).
        mapping = parameter._hp_mapping
        if mapping is None:
            continue
        held, flat = mapping.lp_fragment_address, mapping.hp_fragment_address
        for piece in pieces(name, parameter):
            begin, end = _range_of(piece, parameter)
            low, high = max(begin, held.start), min(end, held.start + held.numel)
            if low >= high:
                continue
            start = flat.start + low - held.start
            local, whole = piece.of(parameter), box_of(piece, parameter)
            for box in boxes_of_range(tuple(local.shape), low - begin, high - begin):
                shape = tuple(global_shape(piece, local))
                mine = first or piece.dim is not None
                yield Fragment(piece.name, shape, box.moved(whole.start), mapping.param_group_index, start, mine)
                start += box.numel


def box_of(piece: Piece, parameter: nn.Parameter) -> Box:
    """The box of the global tensor that this rank's model holds as `piece` of `parameter`."""
    shape = tuple(piece.of(parameter).shape)
    rank = parallel_state.get_tensor_model_parallel_rank()
    return Box(tuple(rank * size if dim == piece.dim else 0 for dim, size in enumerate(shape)), shape)


def flat_parts(engine: Engine) -> list[dict[str, Tensor]]:
    """What this rank's optimizer holds of each parameter group, float32 `[n]` each: the weights and its state.

    With AdamW: {"weight": ..., "exp_avg": ..., "exp_avg_sq": ...}.
    """
    flats = [group["params"][0] for group in engine.optimizer.param_groups]
    return [{WEIGHT: flat.detach(), **engine.optimizer.moments(flat)} for flat in flats]


class HostCopy:
    """Host memory for one copy of an engine's flat tensors, allocated once; pinned if they are on a GPU."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        pin = engine.topology.device.type == "cuda"
        self._parts = [
            {kind: torch.empty(flat.shape, pin_memory=pin) for kind, flat in part.items()}
            for part in flat_parts(engine)
        ]

    def take(self) -> list[dict[str, Tensor]]:
        """The flat tensors as they are now, valid until the next call."""
        for copy, part in zip(self._parts, flat_parts(self._engine), strict=True):
            for kind, flat in part.items():
                copy[kind].copy_(flat, non_blocking=True)
        if self._engine.topology.device.type == "cuda":
            torch.cuda.synchronize(self._engine.topology.device)
        return self._parts


def _range_of(piece: Piece, parameter: nn.Parameter) -> tuple[int, int]:
    """The range of elements of the flattened local parameter that are `piece`, which consists of whole rows."""
    if piece.view is None:
        return 0, parameter.numel()
    dim, first, count = piece.view
    if dim != 0:
        raise ValueError(f"{piece.name} does not consist of whole rows")
    row = prod(parameter.shape[1:])
    return first * row, (first + count) * row


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
        every: steps between checkpoints; 0 saves only on request.
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
    """Saves checkpoints of an engine into `folder`, at the steps of its policy and on request.

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

    The exit code depends on it: a launcher retries after a `RuntimeError` only.
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
