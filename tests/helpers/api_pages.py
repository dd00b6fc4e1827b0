"""The API pages of the library, from its docstrings, by pdoc; a warning of pdoc about ours is an error."""

import sys
import warnings
from pathlib import Path

import pdoc

ROOT = Path(__file__).parents[2]

ROOMS = sorted(f"calm_core.{path.parent.name}" for path in (ROOT / "calm_core").glob("*/__init__.py"))

# Its base class in transformers has an annotation of a name that it does not import, and has no docstring of ours.
INHERITED = r".*calm_core\.integrations\.huggingface\.CalmConfig\.__init__"


def write(folder: Path) -> None:
    """Write the pages of all rooms below `folder`."""
    pdoc.render.configure(docformat="google")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module=r"pdoc\..*")
        warnings.filterwarnings("ignore", INHERITED, module=r"pdoc\..*")
        pdoc.pdoc("calm_core.api", *ROOMS, output_directory=folder)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
