"""Checks of a ``fit``: what would go wrong while workers train each at their own pace is refused before."""

from __future__ import annotations

from collections.abc import Iterable

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BatchSizeFinder, StochasticWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import Optimizer

from lightning_async_localsgd.trainer.fit import Phase

__all__ = ["check_callbacks", "check_finders", "check_optimizers", "check_phase_of_loading"]


def check_callbacks(trainer: pl.Trainer) -> None:
    """Refuse what a callback would do while workers train and could not do alike on all."""
    averages = any(isinstance(c, StochasticWeightAveraging) for c in trainer.callbacks)  # type: ignore[attr-defined]
    has_batch_norm = StochasticWeightAveraging.pl_module_contains_batch_norm
    if averages and trainer.max_epochs != -1 and has_batch_norm(trainer.lightning_module):
        raise MisconfigurationException(
            "`StochasticWeightAveraging` makes an epoch without training for the statistics of BatchNorm layers, when "
            "the run is over here. Use the callback `WeightAveraging`, which averages them too."
        )


def check_finders(trainer: pl.Trainer) -> None:
    """Refuse the search for a batch size, before its own refusal, which says no way out."""
    if any(isinstance(c, BatchSizeFinder) for c in trainer.callbacks):  # type: ignore[attr-defined]
        raise MisconfigurationException(
            "A batch size is found by failing with others, which workers of a job cannot do together. Find it before, "
            "with a trainer of one device without this strategy: `Tuner(L.Trainer(devices=1)).scale_batch_size(model)`."
        )


def check_optimizers(optimizers: Iterable[Optimizer]) -> None:
    """Refuse an optimizer whose state no worker could save alone."""
    if any(isinstance(optimizer, ZeroRedundancyOptimizer) for optimizer in optimizers):
        raise MisconfigurationException(
            "`ZeroRedundancyOptimizer` gathers its state in a collective call, which checkpoints of workers that "
            "are out of step cannot make. Use the optimizer that it wraps."
        )


def check_phase_of_loading(phase: Phase) -> None:
    """Refuse to load a checkpoint after the workers have started."""
    if phase is not Phase.MEETING:
        raise MisconfigurationException(
            "A checkpoint cannot be loaded while workers train. The learning-rate finder does so: run it at the "
            "start of `fit` alone, in `on_fit_start`, or with `Tuner(trainer).lr_find(model)` before."
        )
