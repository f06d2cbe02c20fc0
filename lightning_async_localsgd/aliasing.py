"""One Lightning under both of its names: ``pytorch_lightning`` as an alias of ``lightning.pytorch``."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["ALIASES", "alias_pytorch_lightning", "hint_of_other_lightning"]

ALIASES = {"pytorch_lightning": "lightning.pytorch", "lightning_fabric": "lightning.fabric"}
"""Packages with the same source and classes of their own, and the package that replaces each."""


class _Aliases(MetaPathFinder, Loader):
    """Finds modules of one package by the names of another: module objects and classes are the same under both."""

    def __init__(self) -> None:
        self._specs: dict[str, ModuleSpec | None] = {}  # the module's own spec, by alias

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        real = _real_name(fullname)
        found = importlib.util.find_spec(real) if real is not None else None
        if found is None:
            return None
        return ModuleSpec(fullname, self, origin=found.origin, is_package=found.submodule_search_locations is not None)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        real = _real_name(spec.name)
        assert real is not None
        module = importlib.import_module(real)
        self._specs[spec.name] = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Restore the module's spec, which the import has replaced; the module itself has been executed before."""
        assert module.__spec__ is not None
        module.__spec__ = self._specs.pop(module.__spec__.name)


def _real_name(name: str) -> str | None:
    package, dot, rest = name.partition(".")
    return f"{ALIASES[package]}{dot}{rest}" if package in ALIASES else None


def alias_pytorch_lightning() -> None:
    """Make ``pytorch_lightning`` and ``lightning_fabric`` names of the modules of ``lightning``, in this process.

    The strategy then works with the ``Trainer`` of libraries that are written for ``pytorch_lightning``. Importing
    ``lightning_async_localsgd.pytorch_lightning`` has the same effect. A second call has none.

    Raises:
        ImportError: if one of the two has been imported already, or is installed in another version than ``lightning``.
    """
    if any(isinstance(finder, _Aliases) for finder in sys.meta_path):
        return
    if imported := [name for name in ALIASES if name in sys.modules]:
        raise ImportError(
            f"`{imported[0]}` has been imported already, and its classes are others than those of `lightning`. Put "
            "`import lightning_async_localsgd.pytorch_lightning` before all other imports of your script."
        )
    _check_version()
    sys.meta_path.insert(0, _Aliases())


def _check_version() -> None:
    import lightning

    try:
        other = importlib.metadata.version("pytorch-lightning")
    except importlib.metadata.PackageNotFoundError:
        return  # the import already gives `lightning`
    if other.split(".")[:2] != lightning.__version__.split(".")[:2]:
        raise ImportError(
            f"pytorch-lightning {other} is installed beside lightning {lightning.__version__}, which is to stand for "
            f"it. Install the same version of both: `pip install pytorch-lightning=={lightning.__version__}`."
        )


def hint_of_other_lightning() -> str:
    """A hint on ``pytorch_lightning``'s ``Trainer``, if that package has been imported without the alias."""
    if "pytorch_lightning" not in sys.modules or any(isinstance(finder, _Aliases) for finder in sys.meta_path):
        return ""
    return (
        " of `lightning.pytorch`; for a `Trainer` of `pytorch_lightning` put "
        "`import lightning_async_localsgd.pytorch_lightning` before all other imports"
    )
