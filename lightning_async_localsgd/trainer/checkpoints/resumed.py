"""The state that a ``fit`` goes on from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_async_localsgd.trainer.fetches import SavedFetches
from lightning_async_localsgd.worker.saved_state import SavedState

__all__ = ["Resumed"]


@dataclass(frozen=True)
class Resumed:
    """What a ``fit`` goes on from."""

    state: Mapping[str, Any] | None
    """The global state and shared progress, as ``SavedState.global_state_dict`` gave it.

    None: the file is another strategy's.
    """
    steps_before_fit: int | None
    """Steps of the job that the counts in ``state`` do not hold; None: the trainer's ``global_step``."""
    worker: Mapping[str, Any] | None = None
    """This worker's own state, as ``SavedState.local_state_dict`` gave it; None: workers start from the global one."""
    scheduler_steps: int = 0
    """Steps of the job that the learning-rate schedulers have made."""
    fetches: SavedFetches | None = None
    """Where this process was in its data."""
    settings: Mapping[str, Any] | None = None
    """The settings of then, as ``Settings.credentials`` gave them."""

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
