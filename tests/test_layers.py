"""The house: which room may import which, and no circle anywhere, type-checking imports counted."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import lightning_async_localsgd

PACKAGE = "lightning_async_localsgd"
ROOT = Path(lightning_async_localsgd.__file__).parent
LAYERS = (
    ("errors", "version", "aliasing"),
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
