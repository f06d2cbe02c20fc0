"""The tests run with the versions that the package declares."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    tomllib = pytest.importorskip("tomli")

PROJECT = Path(__file__).parent.parent / "pyproject.toml"


def declared(name: str) -> Requirement:
    texts = tomllib.loads(PROJECT.read_text())["project"]["dependencies"]
    return next(requirement for requirement in map(Requirement, texts) if requirement.name == name)


@pytest.mark.parametrize("name", ["lightning", "torch"])
def test_the_installed_version_is_within_bounds_on_both_sides(name: str) -> None:
    requirement = declared(name)
    installed = Version(Version(version(name)).public)  # without the local part, such as "+cpu"
    assert installed in requirement.specifier
    assert {"<", ">="} == {bound.operator for bound in requirement.specifier}
    assert Version(f"{installed.major}.{installed.minor + 1}") not in requirement.specifier, "not tested"


def test_lightning_begins_where_resuming_works() -> None:
    assert "2.5.6" not in declared("lightning").specifier  # its loops do not say at which point of an epoch they go on
    assert "2.6.0" in declared("lightning").specifier
