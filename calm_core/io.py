"""Files that appear whole or not at all, JSON, and content hashes."""

import hashlib
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from calm_core.errors import UserError

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


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
