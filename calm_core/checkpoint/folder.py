"""The folder of a checkpoint: complete or absent, whenever a process dies.

`step-N/tensors/` holds the tensors; `step-N/manifest.json` holds plain values, a checksum of every other file and one
of itself. A checkpoint is written under another name, the manifest last, with all files synced, and then renamed.
"""

import json
import os
import re
import shutil
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calm_core.errors import UserError
from calm_core.io import hash_bytes, hash_file, may_pass, sync, write_json

FORMAT_VERSION = 2

_NAME = re.compile(r"step-(\d+)")

_PARTIAL, _DELETING = ".partial", ".deleting"


class DamagedError(UserError):
    """A checkpoint's files differ from what was written; another checkpoint of the run may be usable."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk.

    Attributes:
        path: its folder.
        step: its training step.
        state: plain JSON values that the caller saved with it.
        checksums: content hash of each file below `tensors/`.
    """

    path: Path
    step: int
    state: dict[str, Any]
    checksums: dict[str, str]


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, oldest first."""
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name) and (path / "manifest.json").exists()]
    return sorted(found, key=step_of)


def open_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint's manifest.

    Raises:
        UserError: if there is no complete checkpoint at `path`, or its format is another.
        DamagedError: if the manifest has changed since it was written.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
    except OSError as error:
        if may_pass(error):
            raise
        raise UserError(
            f"{path} is not a complete checkpoint: give a folder step-N that holds a manifest.json."
        ) from error
    except ValueError as error:
        raise _damaged(path / "manifest.json") from error
    if manifest.pop("checksum", None) != _checksum_of_values(manifest):
        raise _damaged(path / "manifest.json")
    if manifest["format_version"] != FORMAT_VERSION:
        raise UserError(
            f"{path} has checkpoint format {manifest['format_version']}, this version reads {FORMAT_VERSION}."
        )
    return Checkpoint(path, manifest["step"], manifest["state"], manifest["files"])


def begin(final: Path) -> Path:
    """Create an empty folder for the files of the checkpoint `final`."""
    partial = final.with_name(final.name + _PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "tensors").mkdir(parents=True)
    return partial


def finish(partial: Path, final: Path, state: dict[str, Any], checksums: dict[str, str]) -> None:
    """Complete a checkpoint whose tensors are written and synced: write its manifest and rename it."""
    manifest = {"format_version": FORMAT_VERSION, "step": step_of(final), "state": state, "files": checksums}
    sync(partial / "tensors")
    write_json(partial / "manifest.json", {"checksum": _checksum_of_values(manifest), **manifest})
    shutil.rmtree(final, ignore_errors=True)  # a damaged checkpoint of the same step
    os.replace(partial, final)
    sync(final.parent)


def retire(newest: Path, keep: int, milestones: Collection[int] = ()) -> list[Path]:
    """Retain the last `keep` checkpoints up to `newest` and those of milestones; the folders to `remove`.

    These are the other checkpoints and what interrupted saves and deletions left behind. A checkpoint after `newest`
    is damaged, or the run would have resumed from it: it is not counted.
    """
    older = [path for path in list_checkpoints(newest.parent) if step_of(path) <= step_of(newest)]
    for path in older[:-keep]:
        if step_of(path) in milestones:
            continue
        deleting = path.with_name(path.name + _DELETING)  # not a checkpoint any more, even when half deleted
        shutil.rmtree(deleting, ignore_errors=True)
        os.replace(path, deleting)
    return [path for path in newest.parent.glob("step-*") if path.suffix in (_PARTIAL, _DELETING)]


def remove(folders: Iterable[Path]) -> None:
    """Delete folders; what cannot be deleted stays until the next call."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def damaged_files(checkpoint: Checkpoint, selection: slice) -> list[Path]:
    """Those tensor files of the checkpoint that are missing or have changed, among a selection by sorted name."""
    tensors = checkpoint.path / "tensors"
    paths = [tensors / name for name in sorted(checkpoint.checksums)[selection]]
    return [path for path in paths if not path.exists() or hash_file(path) != checkpoint.checksums[path.name]]


def step_of(path: Path) -> int:
    """The training step of a checkpoint's folder, by its name."""
    return int(path.name.removeprefix("step-"))


def _checksum_of_values(manifest: dict[str, Any]) -> str:
    return hash_bytes(json.dumps(manifest, sort_keys=True).encode())


def _damaged(path: Path) -> DamagedError:
    return DamagedError(f"{path} is damaged, its bytes have changed: use another checkpoint.")
