"""The API pages of the library, from its docstrings, by pdoc; a warning of pdoc is an error."""

import sys
import warnings
from pathlib import Path

import pdoc

ROOT = Path(__file__).parents[2]

ROOMS = sorted(f"calm_core.{path.parent.name}" for path in (ROOT / "calm_core").glob("*/__init__.py"))

# Annotations of its base class in transformers cannot be resolved.
LEFT_OUT = ["!calm_core.integrations.huggingface"]


def write(folder: Path) -> None:
    """Write the pages of all rooms below `folder`."""
    pdoc.render.configure(docformat="google")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module=r"pdoc\..*")
        pdoc.pdoc("calm_core.api", *ROOMS, *LEFT_OUT, output_directory=folder)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
