"""Building stores: shard by shard, by several processes of a machine, and by several machines."""

import argparse
import multiprocessing
import re
import shutil
import signal
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

from calm_core.data.store import files_of, verify_shards
from calm_core.errors import UserError
from calm_core.io import read_json, remove_partial, write_json
from calm_core.manifest import MANIFEST, format_version, read_manifest, require_same

JOURNAL = "building"

NAMED = 5  # unfinished parts that a refusal names


class StoreBuilder:
    """A store in the making: a folder of shards, and a journal that says which of them are finished.

    The work is cut into numbered parts, and each part into numbered pieces; a piece is at most one shard for each
    split. Pieces may be done in any order, by any number of processes and machines that see the folder: what is in the
    journal is never done again, what is not is written over. `finish` turns the journal into the manifest, whose
    presence says that the store is complete.
    """

    def __init__(
        self, folder: Path, kind: str, made_from: Mapping[str, Any], parts: Sequence[str], **properties: Any
    ) -> None:
        """Begin a store of `kind`, or go on with one that was begun from the same inputs.

        `made_from` holds what decides the store's content, `parts` the names of the parts, `properties` further entries
        of the manifest.

        Raises:
            UserError: if the folder holds something else.
        """
        self.folder = folder
        self.parts = parts
        self.header = {"format_version": format_version(kind), "kind": kind, "made_from": dict(made_from), **properties}
        self._journal = folder / JOURNAL
        self._header = self._journal / "header.json"
        if (folder / MANIFEST).exists():
            require_same(folder, read_manifest(folder, kind)["made_from"], made_from)
            shutil.rmtree(self._journal, ignore_errors=True)  # where a kill came between the manifest and this
        elif self._header.exists():
            require_same(folder, read_json(self._header)["made_from"], made_from)
        elif folder.exists() and (folder.is_file() or any(path != self._journal for path in folder.iterdir())):
            raise UserError(
                f"{folder} holds something else than a store of {kind}: move it away or name another folder."
            )
        self._done: set[tuple[int, int]] = set()
        self._ends: dict[int, int] = {}
        for path in self._journal.glob("*-*.json"):
            part, piece, *last = path.stem.split("-")
            self._enter(int(part), int(piece), bool(last))

    @property
    def is_complete(self) -> bool:
        """Whether the store is finished, made from these very inputs."""
        return (self.folder / MANIFEST).exists()

    def has(self, part: int, piece: int) -> bool:
        """Whether a piece is in the journal."""
        return (part, piece) in self._done

    def is_done(self, part: int) -> bool:
        """Whether all pieces of a part are in the journal."""
        return part in self._ends and all(self.has(part, piece) for piece in range(self._ends[part] + 1))

    def begin(self) -> None:
        """Make the folder and note what the store is made from, before anything else is written into it."""
        if not self._header.exists():
            self._journal.mkdir(parents=True, exist_ok=True)
            write_json(self._header, self.header)

    def add(self, part: int, piece: int, last: bool, shards: Mapping[str, Mapping[str, Any]], **notes: Any) -> None:
        """Enter the shards of a piece, by split, in the journal, and notes; `last` says that it ends its part."""
        self.begin()
        write_json(self._entry(part, piece, last), {"shards": dict(shards), **notes})
        self._enter(part, piece, last)

    def entries(self) -> Iterator[dict[str, Any]]:
        """What the journal holds, piece by piece in order, once all parts are done.

        Raises:
            UserError: naming parts that are not done.
        """
        missing = [part for part in range(len(self.parts)) if not self.is_done(part)]
        if missing:
            named = ", ".join(f"{part} ({self.parts[part]})" for part in missing[:NAMED])
            more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
            raise UserError(
                f"{len(missing)} of the {len(self.parts)} parts of {self.folder} are not done: {named}{more}; "
                "run their shares again (part p is in share p mod n of n), or all without --shard."
            )
        for part, end in sorted(self._ends.items()):
            for piece in range(end + 1):
                yield read_json(self._entry(part, piece, piece == end))

    def finish(self, **totals: Any) -> dict[str, Any]:
        """Write the manifest, which completes the store, and remove the journal; the manifest.

        Raises:
            UserError: naming parts that are not done, or a shard that is missing or truncated.
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
        write_json(self.folder / MANIFEST, manifest)
        shutil.rmtree(self._journal)
        remove_partial(self.folder)
        return manifest

    def discard(self) -> None:
        """Remove the journal of a store that turned out to have no shards, and its folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _enter(self, part: int, piece: int, last: bool) -> None:
        self._done.add((part, piece))
        if last:
            self._ends[part] = piece

    def _entry(self, part: int, piece: int, last: bool) -> Path:
        return self._journal / f"{part:05d}-{piece:05d}{'-last' if last else ''}.json"


def shard_name(split: str, part: int, piece: int) -> str:
    """The file name of the shard that a piece writes for a split."""
    return f"{split}-{part:05d}-{piece:05d}.arrow"


def _totals(shards: list[Mapping[str, Any]]) -> dict[str, int]:
    """The sums of what every shard of a split counts."""
    return {name: sum(shard[name] for shard in shards) for name in ("rows", "tokens", "documents", "bytes")}


T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """Share `index` of `count`, counted from 0: every `count`-th part of the work from number `index` on."""

    index: int = 0
    count: int = 1

    def of(self, parts: Sequence[T]) -> Sequence[T]:
        """The parts that are this share's."""
        return parts[self.index :: self.count]

    @classmethod
    def parse(cls, text: str) -> "Share":
        """The share that `i/n` writes, for argparse."""
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if not match or int(match[1]) >= int(match[2]):
            raise argparse.ArgumentTypeError(f"{text!r} is no share: write i/n with i from 0 to n - 1, such as 0/8")
        return cls(int(match[1]), int(match[2]))


WHOLE = Share()


def carry_out(
    builder: StoreBuilder, run: Callable[[Share], None], complete: Callable[[], Any], shard: Share | None, finish: bool
) -> bool:
    """Do what `--shard` and `--finish` ask for: `run` a share, or `complete` the store, or without them both.

    Returns whether the store is complete.

    Raises:
        UserError: if both are given.
    """
    if shard and finish:
        raise UserError("--shard and --finish are two steps: run every share first, then --finish alone.")
    if builder.is_complete:
        return True
    if not finish:
        run(shard or WHOLE)
    if shard:
        print(f"finished share {shard.index} of {shard.count}: {builder.folder}")
        return False
    complete()
    return True


# The options of the scripts that can share their work, as `command.run` takes them.
OPTIONS: dict[str, dict[str, Any]] = {
    "--shard": {
        "type": Share.parse,
        "metavar": "i/n",
        "help": "do share i (from 0) of n alone, as one task of an array: $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT",
    },
    "--finish": {"action": "store_true", "help": "check that all shares are done, and complete the store"},
}

Task = TypeVar("Task")

Result = TypeVar("Result")


def spread(function: Callable[[Task], Result], tasks: Iterable[Task], workers: int) -> Iterator[Result]:
    """`function` of each task, in the order they get done; `workers` processes do them, or this one if it is one.

    The processes are forks: `function` may be anything, only tasks and results must pickle. Tasks are drawn as they are
    needed, one ahead of those that are being done, and none is kept here.

    Raises:
        UserError: that a task has raised.
        RuntimeError: with the trace of anything else that a task has raised, or that a process has died.
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
            there.close()  # or the end of the process would not end the pipe
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
            yield from done  # the processes are at work again while the caller looks at what they have done
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
    """Do tasks until the other end is gone."""
    for end in inherited:
        end.close()  # a copy of the other end: kept here, it would outlive the parent
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for the parent to answer
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
        raise RuntimeError("A worker process was killed, perhaps for want of memory: use fewer workers.") from None
    if error is not None:
        raise error
    return result
