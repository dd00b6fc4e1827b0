"""Manifests: what an artefact is, which format it has, and what it was made from."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from calm_core.errors import UserError
from calm_core.io import hash_bytes, hash_file, read_json

FORMAT_VERSIONS = {"chunks": 2}  # since packed documents run on from shard to shard

MANIFEST = "manifest.json"


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
