"""A progress bar that counts the job's batches, and checkpoint names with the job's steps."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar, TQDMProgressBar
from torch import Tensor
from typing_extensions import override

from lightning_async_localsgd.trainer.epochs import JobEpochs
from lightning_async_localsgd.trainer.fit import Fit

__all__ = ["JobBar", "NamedByJob"]


class JobBar(ProgressBar):
    """A mixin for worker 0's bar: it counts the job's batches per worker, and shows the job's steps.

    Worker 0's own batches would exceed the total if it is fast, and not reach it if it is slow.
    """

    fit: Fit
    epochs: JobEpochs

    @property
    @override
    def total_train_batches(self) -> int | float:
        return min(self.trainer.num_training_batches, self.epochs.batches_left)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        made, total = self.epochs.batches_made, self.total_train_batches
        if isinstance(self, TQDMProgressBar) and made < total and self.refresh_rate > 0:
            made -= made % self.refresh_rate  # the bar is drawn at multiples only, and the count may skip them
        super().on_train_batch_end(trainer, pl_module, outputs, batch, int(min(made, total)) - 1)

    @override
    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        of = f"/{trainer.max_steps}" if trainer.max_steps != -1 else ""
        return {**super().get_metrics(trainer, pl_module), "job_steps": f"{self.fit.job_steps}{of}"}


class NamedByJob(ModelCheckpoint):
    """A mixin for worker 0's checkpoint callback: ``{step}`` in file names is the job's step, as under DDP."""

    fit: Fit

    @override
    def _monitor_candidates(self, trainer: pl.Trainer) -> dict[str, Tensor]:
        candidates = super()._monitor_candidates(trainer)
        if not isinstance(trainer.callback_metrics.get("step"), Tensor):  # the user's own takes precedence
            candidates["step"] = torch.tensor(self.fit.job_steps)
        return candidates
