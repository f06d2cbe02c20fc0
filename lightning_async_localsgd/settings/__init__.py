"""The settings of a run, their checks, and advice on better ones."""

from lightning_async_localsgd.settings.settings import Settings

__all__ = ["Settings"]
