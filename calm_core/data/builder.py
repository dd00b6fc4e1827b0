"""Building stores: shard by shard, by several processes of a machine, and by several machines."""

import argparse
import multiprocessing
import re
import shutil
import signal
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

from calm_core.data.store import files_of, verify_shards
from calm_core.errors import UserError
from calm_core.io import (
    MANIFEST,
    file_lock,
    format_version,
    read_json,
    read_manifest,
    remove_partial,
    require_same,
    require_writable,
    write_json,
    write_manifest,
)

JOURNAL = "building"

HEADER = "header.json"

SHOWN_INPUTS = 5  # unfinished inputs that a refusal names

T = TypeVar("T")

Task = TypeVar("Task")

Result = TypeVar("Result")


class StoreBuilder:
    """A store that is being built: a folder of shards, and a journal of the finished ones.

    The work is divided into numbered inputs (a group of corpus files, a token shard), and each input into numbered
    blocks; a block makes at most one shard of each split. Blocks may be done in any order, by any number of processes
    and machines that see the folder: what is in the journal is not done again, anything else is overwritten. `finish`
    turns the journal into the manifest, whose presence says that the store is complete.
    """

    def __init__(
        self, folder: Path, kind: str, made_from: Mapping[str, Any], inputs: Sequence[str], **properties: Any
    ) -> None:
        """Start a store of `kind`, or continue one that was started from the same inputs; nothing is written yet.

        `made_from` holds what decides the store's content, `inputs` the names of the inputs, `properties` further
        entries of the manifest.

        Raises:
            UserError: if the folder holds something else.
        """
        self.folder = folder
        self.kind = kind
        self.inputs = inputs
        self.header = {"format_version": format_version(kind), "kind": kind, "made_from": dict(made_from), **properties}
        self._journal = folder / JOURNAL
        if (folder / MANIFEST).exists():
            require_same(folder, read_manifest(folder, kind)["made_from"], made_from)
        elif (self._journal / HEADER).exists():
            require_same(folder, read_json(self._journal / HEADER)["made_from"], made_from)
        elif folder.exists() and (folder.is_file() or any(path != self._journal for path in folder.iterdir())):
            raise UserError(
                f"{folder} holds something other than a store of {kind}: move it away or name another folder."
            )
        if not self.is_complete:
            require_writable(folder)
        self._read_journal()

    @property
    def is_complete(self) -> bool:
        """Whether the store is finished, made from these very inputs."""
        return (self.folder / MANIFEST).exists()

    def has(self, input_number: int, block: int) -> bool:
        """Whether a block is in the journal."""
        return (input_number, block) in self._done

    def is_done(self, input_number: int) -> bool:
        """Whether all blocks of an input are in the journal."""
        last = self._last_blocks.get(input_number)
        return last is not None and all(self.has(input_number, block) for block in range(last + 1))

    @contextmanager
    def locked(self, shared: bool = False) -> Iterator[None]:
        """Keep other builds out of the folder until the block ends; with `shared`, only those that are not shared.

        Waits for other builds. What they have built in the meantime counts as done.
        """
        with ExitStack() as stack:
            if not self.is_complete:
                try:
                    self.begin()
                    other = f"another build of {self.folder} to end"
                    stack.enter_context(file_lock(self._journal / "lock", shared=shared, waiting_for=other))
                except FileNotFoundError:  # another build has just completed the store and removed the journal
                    if not self.is_complete:
                        raise
            self._read_journal()
            try:
                yield
            except UserError:
                if not shared and not self._done and list(self.folder.glob("*")) == [self._journal]:
                    self.discard()
                raise
        if self.is_complete:
            shutil.rmtree(self._journal, ignore_errors=True)  # what a kill after the manifest left

    def begin(self) -> None:
        """Make the folder and record what the store is made from, before anything else is written into it."""
        if not (self._journal / HEADER).exists() and not self.is_complete:
            self._journal.mkdir(parents=True, exist_ok=True)
            write_json(self._journal / HEADER, self.header)

    def add(
        self, input_number: int, block: int, last: bool, shards: Mapping[str, Mapping[str, Any]], **notes: Any
    ) -> None:
        """Enter the shards of a block, by split, in the journal, with notes; `last`: it is the last of its input."""
        self.begin()
        write_json(self._entry(input_number, block, last), {"shards": dict(shards), **notes})
        self._enter(input_number, block, last)

    def entries(self) -> Iterator[dict[str, Any]]:
        """The entries of the journal, in the order of the blocks, once all inputs are done.

        Raises:
            UserError: naming inputs that are not done.
        """
        missing = [number for number in range(len(self.inputs)) if not self.is_done(number)]
        if missing:
            named = ", ".join(f"{number} ({self.inputs[number]})" for number in missing[:SHOWN_INPUTS])
            more = f" and {len(missing) - SHOWN_INPUTS} more" if len(missing) > SHOWN_INPUTS else ""
            raise UserError(
                f"{len(missing)} of the {len(self.inputs)} inputs of {self.folder} are not done: {named}{more}; "
                "run their tasks again (input p belongs to task p mod n of n), or all without --shard."
            )
        for number, last in sorted(self._last_blocks.items()):
            for block in range(last + 1):
                yield read_json(self._entry(number, block, block == last))

    def finish(self, **totals: Any) -> dict[str, Any]:
        """Write the manifest, which completes the store, and remove the journal; returns the manifest.

        Raises:
            UserError: naming inputs that are not done, or a shard that is missing or truncated.
        """
        splits: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
        for entry in self.entries():
            for split, shard in entry["shards"].items():
                splits[split].append(shard)
        for shards in splits.values():
            verify_shards(self.folder, files_of(shards), "size")
        manifest = {
            **self.header,
            **totals,
            "splits": {split: {**_totals(splits[split]), "shards": splits[split]} for split in sorted(splits)},
        }
        write_manifest(self.folder, manifest)
        shutil.rmtree(self._journal, ignore_errors=True)
        remove_partial(self.folder)
        return read_manifest(self.folder, self.kind)

    def discard(self) -> None:
        """Remove the folder of a store without shards."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _read_journal(self) -> None:
        self._done: set[tuple[int, int]] = set()
        self._last_blocks: dict[int, int] = {}
        for path in self._journal.glob("*-*.json"):
            number, block, *last = path.stem.split("-")
            self._enter(int(number), int(block), bool(last))

    def _enter(self, input_number: int, block: int, last: bool) -> None:
        self._done.add((input_number, block))
        if last:
            self._last_blocks[input_number] = block

    def _entry(self, input_number: int, block: int, last: bool) -> Path:
        return self._journal / f"{input_number:05d}-{block:05d}{'-last' if last else ''}.json"


def recorded_header(folder: Path) -> dict[str, Any] | None:
    """What a store was started with: its manifest, or the header in the journal of an unfinished one."""
    paths = [path for path in (folder / MANIFEST, folder / JOURNAL / HEADER) if path.exists()]
    return read_json(paths[0]) if paths else None


def shard_name(split: str, input_number: int, block: int) -> str:
    """The file name of the shard that a block makes for a split."""
    return f"{split}-{input_number:05d}-{block:05d}.arrow"


def _totals(shards: list[Mapping[str, Any]]) -> dict[str, int]:
    """The sums over the shards of a split."""
    return {name: sum(shard[name] for shard in shards) for name in ("rows", "tokens", "documents", "bytes")}


@dataclass(frozen=True)
class ArrayTask:
    """Task `index` (from 0) of `count` that divide the work: it takes every `count`-th input, from `index` on."""

    index: int = 0
    count: int = 1

    def of(self, inputs: Sequence[T]) -> Sequence[T]:
        """The inputs of this task."""
        return inputs[self.index :: self.count]

    @classmethod
    def parse(cls, text: str) -> "ArrayTask":
        """The task that `i/n` names, for argparse."""
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if not match or int(match[1]) >= int(match[2]):
            raise argparse.ArgumentTypeError(f"{text!r} is not a task: write i/n with i from 0 to n - 1, such as 0/8")
        return cls(int(match[1]), int(match[2]))


WHOLE_TASK = ArrayTask()

# The options of the scripts whose work can be divided, as `command.run` takes them.
OPTIONS: dict[str, dict[str, Any]] = {
    "--shard": {
        "type": ArrayTask.parse,
        "metavar": "i/n",
        "help": "do only task i (from 0) of n, for an array: $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT",
    },
    "--finish": {"action": "store_true", "help": "check that all tasks are done, and complete the store"},
}


def carry_out(
    builder: StoreBuilder,
    run: Callable[[ArrayTask], None],
    complete: Callable[[], Any],
    shard: ArrayTask | None = None,
    finish: bool = False,
) -> bool:
    """What `--shard` and `--finish` ask for: `run` one task, or `complete` the store, or both without either.

    Returns whether the store is complete.

    Raises:
        UserError: if both are given.
    """
    if shard and finish:
        raise UserError("--shard and --finish are two steps: run every task first, then --finish alone.")
    with builder.locked(shared=shard is not None):
        if builder.is_complete:
            return True
        if not finish:
            run(shard or WHOLE_TASK)
        if shard:
            print(f"finished task {shard.index} of {shard.count}: {builder.folder}")
            return False
        complete()
        return True


def spread(function: Callable[[Task], Result], tasks: Iterable[Task], workers: int) -> Iterator[Result]:
    """Yield `function(task)` for each task in order of completion, computed by `workers` processes (1: this one).

    The processes are forks: `function` need not pickle, tasks and results must. Tasks are taken from the iterable only
    as they are needed, one ahead of those in progress.

    Raises:
        UserError: that a task raised.
        RuntimeError: with the trace of any other exception of a task, or if a process died.
    """
    if workers == 1:
        yield from map(function, tasks)
        return
    context = multiprocessing.get_context("fork")
    processes, idle, busy, done = [], [], [], []
    try:
        for _ in range(workers):
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(function, there, [*idle, here]), daemon=True)
            process.start()
            there.close()  # so that the pipe ends when the process does
            processes.append(process)
            idle.append(here)
        remaining = iter(tasks)
        upcoming = next(remaining, None)
        while upcoming is not None or busy:
            while idle and upcoming is not None:
                connection = idle.pop()
                connection.send(upcoming)
                busy.append(connection)
                upcoming = next(remaining, None)
            yield from done  # the processes work on while the caller handles their results
            finished = wait(busy)
            done = [_result(connection) for connection in finished]
            busy = [connection for connection in busy if connection not in finished]
            idle += finished
        yield from done
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def _work(function: Callable[[Task], Result], connection: Connection, inherited: Iterable[Connection]) -> None:
    """Do tasks until the other end of the pipe is closed."""
    for end in inherited:
        end.close()  # copies of the other ends: open here, they would outlive the parent
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles an interrupt
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the parent's handler: this is how it ends a worker
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        try:
            answer = function(task), None
        except UserError as error:
            answer = None, error
        except Exception:
            answer = None, RuntimeError(f"in a worker process:\n{traceback.format_exc()}")
        try:
            connection.send(answer)
        except BrokenPipeError:
            return


def _result(connection: Connection) -> Result:
    try:
        result, error = connection.recv()
    except EOFError:
        raise RuntimeError("A worker process was killed, perhaps because memory ran out: use fewer workers.") from None
    if error is not None:
        raise error
    return result
