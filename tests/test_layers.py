"""The house: imports between rooms, no circle (type-checking imports counted), the size of rooms, and private names."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import lightning_async_localsgd

PACKAGE = "lightning_async_localsgd"
ROOT = Path(lightning_async_localsgd.__file__).parent
LAYERS = (
    ("errors", "version", "aliasing", "internals"),
    ("protocol", "codecs"),
    ("outer", "membership"),
    ("settings", "methods"),
    ("exchange",),
    ("worker", "data"),
    ("loop", "fabric", "trainer", "simulation", "pytorch_lightning"),
    ("demo",),
    ("cli",),
    ("__main__", "__init__"),
)
"""Rooms, from the lowest to the highest: each imports lower ones alone."""
FILE_LINES = 450
CLASS_LINES = 300


def imports(file: Path) -> set[str]:
    """Modules of the package that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            parts = [[node.module or "", alias.name] for alias in node.names]
            assert node.level == 0, f"{file} imports by a relative name"
        elif isinstance(node, ast.Import):
            parts = [[alias.name] for alias in node.names]
        else:
            continue
        for names in parts:
            name = ".".join(names)
            if not name.startswith(f"{PACKAGE}."):
                continue
            while not (module := ROOT / Path(*name.split(".")[1:])).with_suffix(".py").exists() and not module.is_dir():
                name = name.rpartition(".")[0]
            found.add(name.removeprefix(PACKAGE).removeprefix("."))
    return found - {""}


def modules() -> dict[str, Path]:
    names = {file: ".".join(file.relative_to(ROOT).with_suffix("").parts) for file in ROOT.rglob("*.py")}
    return {name.removesuffix(".__init__"): file for file, name in names.items()}


def test_every_room_has_its_layer_and_there_are_at_most_twenty() -> None:
    rooms = {name.split(".")[0] for name in modules()}
    assert rooms == {room for layer in LAYERS for room in layer}
    assert len(rooms - {"__main__", "__init__"}) <= 20


def test_arrows_point_down_only() -> None:
    height = {room: i for i, layer in enumerate(LAYERS) for room in layer}
    upwards = [
        (name, other)
        for name, file in modules().items()
        for other in imports(file)
        if (room := other.split(".")[0]) != name.split(".")[0] and height[room] >= height[name.split(".")[0]]
    ]
    assert upwards == []


def test_there_is_no_circle() -> None:
    graph = {name: imports(file) - {name} for name, file in modules().items()}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


OF_OTHERS = {"_buffers", "_devices", "_replace", "_timeout", "_version"}
"""Private names of torch's objects and of named tuples, which the library uses as well."""


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_names_of_others(file: Path) -> Iterator[str]:
    """What a file imports from Lightning, or looks up on an object that is not its own, by a private name."""
    tree = ast.parse(file.read_text())
    nodes = list(ast.walk(tree))
    own = {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    modules = {
        alias.asname or alias.name.split(".")[0]
        for node in nodes
        if isinstance(node, ast.Import)
        for alias in node.names
        if not alias.name.startswith("lightning")
    }
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if module.split(".")[0] == "lightning":
                yield from (f"{module}.{alias.name}" for alias in node.names if "._" in f"{module}.{alias.name}")
            elif module.split(".")[0] != PACKAGE:
                modules |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Attribute) and private(node.attr) and node.attr not in own | OF_OTHERS:
            root = node.value
            while isinstance(root, ast.Attribute):
                root = root.value
            itself = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            base_class = isinstance(root, ast.Call) and isinstance(root.func, ast.Name) and root.func.id == "super"
            if not (itself or base_class or (isinstance(root, ast.Name) and root.id in modules)):
                yield f"{file.relative_to(ROOT)}:{node.lineno} {ast.unparse(node)}"


def test_private_names_of_lightning_are_in_one_file() -> None:
    """Those that a class inherits are listed there, see `tests/test_internals.py`."""
    found = [
        name for file in modules().values() if file.name != "internals.py" for name in private_names_of_others(file)
    ]
    assert found == []
    assert list(private_names_of_others(ROOT / "internals.py"))


def test_no_file_is_too_long() -> None:
    lines = {name: len(file.read_text().splitlines()) for name, file in modules().items()}
    assert {name: n for name, n in lines.items() if n > FILE_LINES} == {}


def test_no_class_is_too_long() -> None:
    lines = {
        f"{name}.{node.name}": (node.end_lineno or 0) - node.lineno + 1
        for name, file in modules().items()
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ClassDef)
    }
    assert {name: n for name, n in lines.items() if n > CLASS_LINES} == {}
