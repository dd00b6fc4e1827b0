"""Verify token or chunk stores: read every byte, compare every checksum and count, and name each bad file."""

from pathlib import Path

from calm_core.config import command
from calm_core.data.verification import faults, store_manifest
from calm_core.errors import ExitCode


def verify() -> ExitCode:
    """Verify the stores on the command line."""
    parser = command.Parser(description=__doc__)
    parser.add_argument("stores", type=Path, nargs="+", help="folders of stores, such as runs/demo/tokens")
    found = 0
    for folder in parser.parse_args().stores:
        manifest = store_manifest(folder)
        for name, split in manifest["splits"].items():
            counts = ", ".join(f"{split[counted]:,} {counted}" for counted in ("rows", "tokens", "documents", "bytes"))
            print(f"{folder}, {name}: {len(split['shards']):,} shards, {counts}")
        bad = 0
        for fault in faults(folder):
            bad += 1
            print(fault, flush=True)
        print(f"{folder}: {bad} faults" if bad else f"{folder}: every checksum and count is correct")
        found += bad
    return ExitCode.USAGE if found else ExitCode.OK


if __name__ == "__main__":
    raise SystemExit(command.guard(verify))
