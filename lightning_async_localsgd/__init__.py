"""Asynchronous Local-SGD for PyTorch Lightning: workers of unequal speed, ordinary networks, little communication."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_async_localsgd.errors import (
    AsyncLocalSGDError,
    NotFiniteError,
    PeerAbortedError,
    PeerLostError,
    ReplicaDivergedError,
    WorkerMismatchError,
)
from lightning_async_localsgd.trainer.registration import register_default_names, register_strategy
from lightning_async_localsgd.version import __version__

# torch and Lightning take seconds to import: the command line is to answer without them. A name that needs them is
# imported when it is first used.
if TYPE_CHECKING:
    from lightning_async_localsgd.loop import AsyncLocalSGD
    from lightning_async_localsgd.membership.elastic import Lighthouse
    from lightning_async_localsgd.methods import METHODS, make_method
    from lightning_async_localsgd.protocol.progress import OuterUpdate
    from lightning_async_localsgd.settings import Settings
    from lightning_async_localsgd.settings.advice import SettingsWarning
    from lightning_async_localsgd.trainer.monitor import AsyncLocalSGDMonitor
    from lightning_async_localsgd.trainer.strategy import AsyncLocalSGDStrategy
    from lightning_async_localsgd.worker.summary import RunSummary
    from lightning_async_localsgd.worker.worker import Worker

__all__ = [
    "METHODS",
    "AsyncLocalSGD",
    "AsyncLocalSGDError",
    "AsyncLocalSGDMonitor",
    "AsyncLocalSGDStrategy",
    "Lighthouse",
    "NotFiniteError",
    "OuterUpdate",
    "PeerAbortedError",
    "PeerLostError",
    "ReplicaDivergedError",
    "RunSummary",
    "Settings",
    "SettingsWarning",
    "Worker",
    "WorkerMismatchError",
    "__version__",
    "make_method",
    "register_strategy",
]

_MODULES = {
    "METHODS": "methods",
    "AsyncLocalSGD": "loop",
    "AsyncLocalSGDMonitor": "trainer.monitor",
    "AsyncLocalSGDStrategy": "trainer.strategy",
    "Lighthouse": "membership.elastic",
    "OuterUpdate": "protocol.progress",
    "RunSummary": "worker.summary",
    "Settings": "settings",
    "SettingsWarning": "settings.advice",
    "Worker": "worker.worker",
    "make_method": "methods",
}
_SUBMODULES = {"fabric", "methods", "outer", "simulation"}


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return import_module(f"{__name__}.{name}")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})


register_default_names()
