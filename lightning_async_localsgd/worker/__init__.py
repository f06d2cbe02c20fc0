"""The worker: one replica of a module, on one device or several, and its side of the exchange."""

from lightning_async_localsgd.worker.worker import RunSummary, Worker

__all__ = ["RunSummary", "Worker"]
