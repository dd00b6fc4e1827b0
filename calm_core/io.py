"""Files: atomic writes, fsync, JSON, content hashes, and manifests, which say what an artefact was made from."""

import errno
import fcntl
import hashlib
import json
import os
import socket
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from calm_core.errors import UserError

HASH_BYTES = 16

PARTIAL = ".partial"

# What a network file system answers while its server or the connection is away: another try may succeed.
_PASSING = {
    errno.EAGAIN,
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.EIO,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.ENOTCONN,
    errno.ESHUTDOWN,
    errno.ESTALE,
    errno.ETIMEDOUT,
}

NO_FLOCK = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)

FORMAT_VERSIONS = {"chunks": 2}  # since packed documents continue across shards

MANIFEST = "manifest.json"

CHECKSUM = "checksum"  # of the manifest's other fields; those of earlier versions have none


def may_pass(error: Exception) -> bool:
    """Whether a file could not be read for a reason that may be gone at the next try, and that no user can correct."""
    return isinstance(error, OSError) and error.errno in _PASSING


def new_hash() -> "hashlib.blake2b":
    """A new content hash; add bytes with `update`."""
    return hashlib.blake2b(digest_size=HASH_BYTES)


def hash_bytes(content: bytes) -> str:
    """The content hash of `content`, in hex."""
    return hashlib.blake2b(content, digest_size=HASH_BYTES).hexdigest()


def hash_file(path: Path) -> str:
    """The content hash of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, new_hash).hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write the content of `path` to: `path` holds all of it or is unchanged.

    When the block ends without an error, the file is fsynced and renamed to `path`; otherwise it is removed. It has the
    mode that the umask asks for, whatever the mode of the library that writes it. The temporary name contains host and
    process, so that several processes may write the same file at once.
    """
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}{PARTIAL}")
    try:
        temporary.touch()
        mode = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary
        temporary.chmod(mode)
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def require_writable(folder: Path) -> None:
    """Refuse a folder that cannot be written to, or made; nothing is made.

    Raises:
        UserError: naming the folder that stands in the way.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"Cannot write to {folder}: {existing} is a file, not a folder; name another folder.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"Cannot write to {folder}: no permission to write to {existing}; name another folder.")


def prepare_output(path: Path) -> None:
    """Make the folder of a file that a long computation is to write, before it begins.

    Raises:
        UserError: if the file cannot be written.
    """
    require_writable(path.parent)
    if path.is_dir():
        raise UserError(f"Cannot write to {path}: it is a folder; name a file.")
    path.parent.mkdir(parents=True, exist_ok=True)


def remove_partial(folder: Path) -> None:
    """Remove the temporary files that killed processes left in `folder`; no other process may be writing there."""
    for path in folder.glob(f".*{PARTIAL}"):
        path.unlink(missing_ok=True)


@contextmanager
def file_lock(path: Path, shared: bool = False, waiting_for: str = "") -> Iterator[None]:
    """Hold a lock on the file `path` (flock) until the block or the process ends; the file is created if missing.

    A shared lock excludes exclusive ones only. With `waiting_for`, wait for other holders and print that text first.
    On a file system without flock, such as Lustre mounted without `-o flock`, a warning is printed and nothing locked.

    Raises:
        BlockingIOError: if another process holds the lock, and `waiting_for` is empty.
    """
    mode = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    with open(path, "a") as file:
        try:
            fcntl.flock(file, mode | fcntl.LOCK_NB)
        except BlockingIOError:
            if not waiting_for:
                raise
            print(f"waiting for {waiting_for}", file=sys.stderr, flush=True)
            fcntl.flock(file, mode)
        except OSError as error:
            if error.errno not in NO_FLOCK:
                raise
            print(
                f"warning: {path} cannot be locked ({error.strerror}): make sure that no other process writes to its "
                "folder; on Lustre, mount the file system with -o flock.",
                file=sys.stderr,
            )
        yield


def sync(path: Path) -> None:
    """Flush a file or the entries of a folder to the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in UTF-8, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write `content` to `path` as JSON, atomically."""
    write_text(path, _json_text(content))


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: if it is missing, unreadable or damaged.
    """
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        if may_pass(error):
            raise
        raise UserError(f"Cannot read {path}: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged, it is not valid JSON ({error}): make it again.") from error


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file that holds one on each line, in order; [] if there is no file. NaN is read as None.

    A line that is not a JSON object is skipped: a crash can cut the last one short, and a later write can follow it.
    """
    records = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with suppress(ValueError):
            record = json.loads(line, parse_constant=lambda name: None)
            if isinstance(record, dict):
                records.append(record)
    return records


def append_json_line(path: Path, record: dict[str, Any]) -> None:
    """Append a line with `record` to a file and fsync it; on a new line even if the last one was cut short."""
    with open(path, "a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(record).encode() + b"\n")
    sync(path)


def format_version(kind: str) -> int:
    """The format version of artefacts of this kind that is written and read."""
    return FORMAT_VERSIONS.get(kind, 1)


def read_manifest(folder: Path, kind: str) -> dict[str, Any]:
    """The manifest of the finished store of `kind` in `folder`.

    Raises:
        UserError: if there is no finished store, one of another kind, or one of another format version.
    """
    if not (folder / MANIFEST).exists():
        raise UserError(f"{folder} holds no finished store of {kind} ({MANIFEST} is missing): make it first.")
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict):
        raise UserError(f"{folder / MANIFEST} is damaged, it holds no fields: make it again.")
    checksum = manifest.pop(CHECKSUM, None)
    if manifest.get("kind") != kind:
        raise UserError(f"{folder} is a store of {manifest.get('kind')}, not of {kind}: give the other folder.")
    if (found := manifest.get("format_version")) != format_version(kind):
        raise UserError(
            f"{folder} has format_version {found}, but this program reads {format_version(kind)}: "
            "remove it and make it again."
        )
    if checksum is not None and checksum != hash_bytes(_json_text(manifest).encode()):
        raise UserError(f"{folder / MANIFEST} has changed since it was written (its checksum differs): make it again.")
    return manifest


def write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """Write the manifest of an artefact with its own checksum, atomically."""
    write_text(folder / MANIFEST, _json_text({CHECKSUM: hash_bytes(_json_text(content).encode()), **content}))


def require_same(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse an artefact that was made from other inputs than `wanted`.

    Raises:
        UserError: naming the first input that differs.
    """
    for name, value in wanted.items():
        if found.get(name) != value:
            raise UserError(
                f"{path} was made from another {name} ({found.get(name)}, now {value}): "
                "remove it to have it made again, or name another folder."
            )


def store_hash(folder: Path) -> str:
    """The content hash of a finished store: of its manifest, which names its inputs and the checksum of every shard.

    The manifest's own checksum does not count, so that a store has the same hash with and without one.
    """
    manifest = read_json(folder / MANIFEST)
    return manifest.get(CHECKSUM) or hash_file(folder / MANIFEST)


def source_hash(made_from: Mapping[str, Any]) -> str:
    """The hash of what a store was made from, whatever bytes its shards hold."""
    return hash_bytes(json.dumps(made_from, sort_keys=True).encode())


def _json_text(content: Any) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"
