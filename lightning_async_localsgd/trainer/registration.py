"""The strategy by names: those that it has at once, and names of one's own. Imports neither torch nor Lightning."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_async_localsgd.trainer.strategy import AsyncLocalSGDStrategy

__all__ = ["register_default_names", "register_strategy"]

_REGISTRY_MODULE = "lightning.pytorch.strategies"
_START_METHODS = {
    "async_localsgd": "popen",
    "async_localsgd_fork": "fork",
    "async_localsgd_notebook": "fork",
    "async_localsgd_spawn": "spawn",
}


def register_default_names() -> None:
    """Give Lightning the names that the strategy has without :func:`register_strategy`.

    If Lightning has not been imported, its import registers them.
    """
    if _REGISTRY_MODULE in sys.modules:
        _register()
    elif not any(isinstance(finder, _RegisteringFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisteringFinder())


def register_strategy(name: str, **settings: Any) -> None:
    """Register the strategy with these settings under a name, for ``Trainer(strategy=name)``.

    This is for configuration files and command lines that pass only a name. Each ``Trainer`` gets its own strategy. A
    second registration of a name replaces the first.

    Example::

        register_strategy("two_sites", local_steps=200, codec="bf16")
        trainer = L.Trainer(devices=2, strategy="two_sites")

    Args:
        name: the name, in lower case, because ``Trainer`` looks it up in lower case.
        **settings: arguments of :class:`~lightning_async_localsgd.AsyncLocalSGDStrategy`. All strategies of the name
            share objects among them, such as ``pace`` or ``transforms``.

    Raises:
        ValueError: if Lightning has a strategy of this name, the name is not in lower case, or a setting is outside its
            range.
        TypeError: if there is no such setting.
    """
    from lightning.pytorch.strategies import StrategyRegistry

    if name != name.lower():
        raise ValueError(
            f"`Trainer` looks for strategies in lower case: register {name.lower()!r} instead of {name!r}."
        )
    if name == "auto" or (name in StrategyRegistry and StrategyRegistry[name]["strategy"] is not _make_strategy):
        raise ValueError(f"{name!r} is the name of another strategy: choose one that is not in use.")
    _make_strategy(**settings)  # its own checks speak here, and not when a Trainer is made
    StrategyRegistry.register(name, _make_strategy, description="Asynchronous Local-SGD", override=True, **settings)


def _make_strategy(**settings: Any) -> AsyncLocalSGDStrategy:
    """A strategy. Its module is imported with the first one."""
    from lightning_async_localsgd.trainer.strategy import AsyncLocalSGDStrategy

    return AsyncLocalSGDStrategy(**settings)


def _register() -> None:
    from lightning.pytorch.strategies import StrategyRegistry

    for name, start_method in _START_METHODS.items():
        if name not in StrategyRegistry:
            StrategyRegistry.register(
                name,
                _make_strategy,
                description=f"Asynchronous Local-SGD: one worker per device, each at its own pace ({start_method})",
                start_method=start_method,
            )


class _RegisteringFinder(MetaPathFinder):
    """Finds the module of Lightning's registry, with a loader that registers the names at its end.

    The import system has no other way to act after an import that has yet to come.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path) if fullname == _REGISTRY_MODULE else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
