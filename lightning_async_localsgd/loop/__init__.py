"""Plain PyTorch loops as workers of a job."""

from lightning_async_localsgd.loop.loop import AsyncLocalSGD

__all__ = ["AsyncLocalSGD"]
