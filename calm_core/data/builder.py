"""Building stores: shard by shard, each one kept as soon as it is written, so that a killed build goes on."""

import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from calm_core.data.manifest import (
    MANIFEST,
    format_version,
    read_json,
    read_manifest,
    remove_partial,
    require_same,
    write_json,
)
from calm_core.data.shards import files_of, verify_shards
from calm_core.errors import UserError

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
