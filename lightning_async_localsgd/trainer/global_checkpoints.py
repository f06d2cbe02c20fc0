"""The global parameters in the module during the making of a checkpoint, for hooks that save weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl

from lightning_async_localsgd.trainer.fit import Fit

__all__ = ["GlobalCheckpoints"]


class GlobalCheckpoints:
    """Puts the global parameters into the module for ``trainer.save_checkpoint``, as for validation.

    Callbacks and modules that save selected weights (adapters, an average) in ``on_save_checkpoint`` read them from the
    module, and may return references to its parameters. So it holds the global ones until the file is written.

    Args:
        trainer: the trainer, until :meth:`detach`.
        fit: its ``fit``.
    """

    def __init__(self, trainer: pl.Trainer, fit: Fit) -> None:
        self._trainer = trainer
        self._fit = fit
        self._save = trainer.save_checkpoint
        trainer.save_checkpoint = self._save_global  # type: ignore[method-assign]

    def detach(self) -> None:
        """Restore the trainer."""
        vars(self._trainer).pop("save_checkpoint", None)

    def _save_global(self, *args: Any, **kwargs: Any) -> None:
        with self._global_swapped_in():
            self._save(*args, **kwargs)

    @contextmanager
    def _global_swapped_in(self) -> Iterator[None]:
        worker = self._fit.worker
        if worker is None or not self._fit.own_in_module or worker.global_swapped_in:
            yield
            return
        with worker.paused():
            worker.swap_in_global(for_cut=True)
            try:
                yield
            finally:
                worker.swap_in_local()
