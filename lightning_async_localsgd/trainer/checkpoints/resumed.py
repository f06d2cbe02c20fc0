"""The state of a resumed ``fit``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_async_localsgd.trainer.fetches import SavedFetches
from lightning_async_localsgd.worker.saved_state import SavedState

__all__ = ["Resumed"]


@dataclass(frozen=True)
class Resumed:
    """The state from which a ``fit`` resumes."""

    state: Mapping[str, Any] | None
    """The global state and shared progress, as ``SavedState.global_state_dict`` gave it.

    None: the file is another strategy's.
    """
    steps_before_fit: int | None
    """Steps of the job not included in the counts of ``state``; None: the trainer's ``global_step``."""
    worker: Mapping[str, Any] | None = None
    """This worker's own state, as ``SavedState.local_state_dict`` gave it; None: workers start from the global one."""
    scheduler_steps: int = 0
    """Steps of the job counted by the learning-rate schedulers."""
    fetches: SavedFetches | None = None
    """The position of this process in its data."""
    settings: Mapping[str, Any] | None = None
    """The settings of the saved run, from ``Settings.fingerprint``."""

    def load_into(self, saved: SavedState) -> None:
        """Have a worker that has not started go on from here.

        Args:
            saved: the saved state of that worker.
        """
        if self.state is None:
            return
        saved.load_global_state_dict(self.state, same_workers=self.worker is not None, settings=self.settings)
        if self.worker is not None:
            saved.load_local_state_dict(self.worker)
