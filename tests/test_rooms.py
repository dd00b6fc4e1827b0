"""The rooms of the library, which are its folders and the files beside them, can be read in an order."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter

from launching import ROOT

LIBRARY = ROOT / "calm_core"
ROOMS = {path.stem for path in LIBRARY.iterdir() if path.is_dir() or path.suffix == ".py"} - {"__init__", "__pycache__"}


def imported(tree: ast.AST) -> Iterator[str]:
    """The modules that a file imports anywhere in it, by their dotted names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{name.name}" for name in node.names)


def test_no_rooms_import_each_other_even_by_way_of_others() -> None:
    graph: dict[str, set[str]] = {}
    for path in LIBRARY.rglob("*.py"):
        room = path.relative_to(LIBRARY).with_suffix("").parts[0]
        names = (name.split(".") for name in imported(ast.parse(path.read_text())))
        used = {name[1] for name in names if name[0] == "calm_core" and len(name) > 1}
        graph.setdefault(room, set()).update(used & ROOMS - {room})
    assert sum(map(len, graph.values())) > 50
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the rooms of a cycle


def test_one_module_imports_megatron_core() -> None:
    """It skips what takes seconds to import, which works only if it is the first to import it."""
    importing = {
        path.name
        for path in LIBRARY.rglob("*.py")
        if any(name.startswith("megatron.") for name in imported(ast.parse(path.read_text())))
    }
    assert importing == {"megatron.py"}
