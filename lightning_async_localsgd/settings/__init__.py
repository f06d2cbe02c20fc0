"""The settings of a run: what they are, what is wrong with them, and what is better."""

from lightning_async_localsgd.settings.settings import Settings

__all__ = ["Settings"]
