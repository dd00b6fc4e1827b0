"""Manifests of stores, content hashes, and files that appear whole or not at all."""

import hashlib
import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from calm_core.errors import UserError

FORMAT_VERSIONS = {"chunks": 2}  # since packed documents run on from shard to shard
MANIFEST = "manifest.json"
HASH_BYTES = 16
PARTIAL = ".partial"


def new_hash() -> "hashlib.blake2b":
    """An empty content hash, to be fed by `update`."""
    return hashlib.blake2b(digest_size=HASH_BYTES)


def hash_bytes(content: bytes) -> str:
    """The content hash of `content`, in hex."""
    return hashlib.blake2b(content, digest_size=HASH_BYTES).hexdigest()


def hash_file(path: Path) -> str:
    """The content hash of a file, in hex; reads it once, in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, new_hash).hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name to write `path` under: fsynced and renamed when the block ends well, removed when it fails.

    The name is this process's own: two that make the same file, on one machine or two, each make it whole.
    """
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}{PARTIAL}")
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def remove_partial(folder: Path) -> None:
    """Remove what killed processes left of files they had not finished, where no other process is at work."""
    for path in folder.glob(f".*{PARTIAL}"):
        path.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write `content` as JSON, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: if it is missing, unreadable or damaged.
    """
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged, it is not valid JSON ({error}): make it again.") from error


def format_version(kind: str) -> int:
    """The version of the format of the artefacts of this kind that is written and read."""
    return FORMAT_VERSIONS.get(kind, 1)


def read_manifest(folder: Path, kind: str) -> dict[str, Any]:
    """The manifest of the finished store of `kind` in `folder`.

    Raises:
        UserError: if there is no finished store, one of another kind, or one of another format version.
    """
    if not (folder / MANIFEST).exists():
        raise UserError(f"{folder} holds no finished store of {kind} ({MANIFEST} is missing): make it first.")
    manifest = read_json(folder / MANIFEST)
    if manifest.get("kind") != kind:
        raise UserError(f"{folder} is a store of {manifest.get('kind')}, not of {kind}: give the other folder.")
    if (found := manifest.get("format_version")) != format_version(kind):
        raise UserError(
            f"{folder} has format_version {found}, but this program reads {format_version(kind)}: "
            "remove it, and make it again."
        )
    return manifest


def require_same(place: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse an artefact that was made from something else than is wanted now.

    Raises:
        UserError: naming the first input that differs.
    """
    for name, value in wanted.items():
        if found.get(name) != value:
            raise UserError(
                f"{place} was made from another {name} ({found.get(name)}, now {value}): "
                "remove it to make it anew, or name another place."
            )


def store_hash(folder: Path) -> str:
    """The content hash of a finished store: its manifest's, and so of all it was made from and of every byte in it."""
    return hash_file(folder / MANIFEST)


def source_hash(made_from: Mapping[str, Any]) -> str:
    """The hash of what a store was made from, whatever the bytes it came to."""
    return hash_bytes(json.dumps(made_from, sort_keys=True).encode())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
