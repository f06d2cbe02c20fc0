"""The worker: one replica of a module, on one device or several, and its side of the exchange."""

from lightning_async_localsgd.worker.summary import RunSummary
from lightning_async_localsgd.worker.worker import Worker

__all__ = ["RunSummary", "Worker"]
