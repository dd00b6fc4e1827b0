"""The folder of a checkpoint, complete or absent whenever a process dies.

`step-N/tensors/` holds the tensors and `step-N/manifest.json` plain values, a checksum of every other file and one of
itself. A checkpoint is written under another name, the manifest last, everything synced, and then renamed.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calm_core.errors import UserError
from calm_core.io import hash_bytes, hash_file, sync, write_json

FORMAT_VERSION = 2

_NAME = re.compile(r"step-(\d+)")

_PARTIAL, _DELETING = ".partial", ".deleting"


class DamagedError(UserError):
    """A checkpoint's files are not those that were written; another checkpoint of the run may do."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk.

    Attributes:
        path: its folder.
        step: the training step after which it was saved.
        state: what the caller saved with it (plain JSON values).
        checksums: content hash of each file below `tensors/`.
    """

    path: Path
    step: int
    state: dict[str, Any]
    checksums: dict[str, str]


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, oldest first."""
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name) and (path / "manifest.json").exists()]
    return sorted(found, key=_step)


def open_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint's manifest.

    Raises:
        UserError: if there is no complete checkpoint at `path`, or one of another format.
        DamagedError: if the manifest is not as it was written.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
    except OSError as error:
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
    """An empty folder for the files of the checkpoint that is to become `final`."""
    partial = final.with_name(final.name + _PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "tensors").mkdir(parents=True)
    return partial


def finish(partial: Path, final: Path, state: dict[str, Any], checksums: dict[str, str]) -> None:
    """Complete a checkpoint whose tensors are written and synced: it exists once this has renamed it."""
    manifest = {"format_version": FORMAT_VERSION, "step": _step(final), "state": state, "files": checksums}
    sync(partial / "tensors")
    write_json(partial / "manifest.json", {"checksum": _checksum_of_values(manifest), **manifest})
    shutil.rmtree(final, ignore_errors=True)  # where the run came by here before, and found it damaged
    os.replace(partial, final)
    sync(final.parent)


def retire(newest: Path, keep: int) -> list[Path]:
    """Leave the last `keep` checkpoints up to `newest`; the folders to `remove`: others, and what was left half done.

    A checkpoint beyond `newest` is damaged, or the run would have gone on from it: it counts for nothing.
    """
    older = [path for path in list_checkpoints(newest.parent) if _step(path) <= _step(newest)]
    for path in older[:-keep]:
        doomed = path.with_name(path.name + _DELETING)  # half removed, it would be no checkpoint
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(path, doomed)
    return [path for path in newest.parent.glob("step-*") if path.suffix in (_PARTIAL, _DELETING)]


def remove(folders: Iterable[Path]) -> None:
    """Delete folders; what cannot be deleted stays, for the next time."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def damaged_files(checkpoint: Checkpoint, share: slice) -> list[Path]:
    """Those of a share of the checkpoint's tensor files that are missing or have changed."""
    tensors = checkpoint.path / "tensors"
    paths = [tensors / name for name in sorted(checkpoint.checksums)[share]]
    return [path for path in paths if not path.exists() or hash_file(path) != checkpoint.checksums[path.name]]


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _checksum_of_values(manifest: dict[str, Any]) -> str:
    return hash_bytes(json.dumps(manifest, sort_keys=True).encode())


def _damaged(path: Path) -> DamagedError:
    return DamagedError(f"{path} is damaged, its bytes have changed: use another checkpoint.")
