"""Asynchronous Local-SGD for PyTorch Lightning: workers of unequal speed, ordinary networks, little communication."""

from lightning_async_localsgd.errors import (
    AsyncLocalSGDError,
    NotFiniteError,
    PeerAbortedError,
    PeerLostError,
    ReplicaDivergedError,
    WorkerMismatchError,
)
from lightning_async_localsgd.loop import AsyncLocalSGD
from lightning_async_localsgd.methods import METHODS, make_method
from lightning_async_localsgd.protocol.progress import OuterUpdate
from lightning_async_localsgd.settings import Settings
from lightning_async_localsgd.settings.advice import SettingsWarning
from lightning_async_localsgd.trainer.monitor import AsyncLocalSGDMonitor
from lightning_async_localsgd.trainer.registration import register_strategy
from lightning_async_localsgd.trainer.strategy import AsyncLocalSGDStrategy
from lightning_async_localsgd.version import __version__
from lightning_async_localsgd.worker.summary import RunSummary
from lightning_async_localsgd.worker.worker import Worker

__all__ = [
    "METHODS",
    "AsyncLocalSGD",
    "AsyncLocalSGDError",
    "AsyncLocalSGDMonitor",
    "AsyncLocalSGDStrategy",
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
