"""What `import lightning_async_localsgd` offers, although most of it is imported on first use."""

from __future__ import annotations

import ast
import inspect
import pickle
from pathlib import Path

import pytest

import lightning_async_localsgd as package
from tests.imports import run


@pytest.mark.parametrize("name", package.__all__)
def test_each_public_name_is_there(name: str) -> None:
    assert name in dir(package)
    value = getattr(package, name)
    if inspect.isclass(value):
        assert pickle.loads(pickle.dumps(value)) is value


def test_what_is_imported_late_is_what_type_checkers_see() -> None:
    tree = ast.parse(Path(package.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.name: (node.module or "").removeprefix("lightning_async_localsgd.")
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == package._MODULES


def test_documented_submodules_need_no_import_of_their_own() -> None:
    reads = "import lightning_async_localsgd as package; package.outer.DelayedNesterov; package.simulation.simulate"
    code, output = run(reads)  # in this process other tests may have imported them
    assert code == 0, output


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = package.Nonsense
