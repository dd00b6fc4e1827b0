"""Manifests: the kind and format of an artefact, and what it was made from."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from calm_core.errors import UserError
from calm_core.io import hash_bytes, hash_file, read_json, write_text

FORMAT_VERSIONS = {"chunks": 2}  # since packed documents run on from shard to shard

MANIFEST = "manifest.json"

CHECKSUM = "checksum"  # of the manifest's other fields; those of earlier versions have none


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
    if checksum is not None and checksum != hash_bytes(_text(manifest).encode()):
        raise UserError(f"{folder / MANIFEST} has changed since it was written (its checksum differs): make it again.")
    return manifest


def write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """Write the manifest of an artefact with its own checksum, atomically."""
    write_text(folder / MANIFEST, _text({CHECKSUM: hash_bytes(_text(content).encode()), **content}))


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


def _text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"
