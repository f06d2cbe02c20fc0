"""Meetings of all processes of a fit: before the first step, to check that all have data, and after the last update."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_async_localsgd.data.loader import WorkerLoader
from lightning_async_localsgd.errors import AsyncLocalSGDError
from lightning_async_localsgd.internals import training_loaders
from lightning_async_localsgd.membership import StaticJob

__all__ = ["check_pass", "learn_decisions", "meet_before_training"]


def meet_before_training(job: StaticJob, trains: bool) -> None:
    """Wait for the other processes, some of which may validate first; all must train, or none.

    Args:
        job: the processes.
        trains: whether Lightning trains on this process. Without data it does not, with hardly a message.

    Raises:
        MisconfigurationException: on every process, if some have data and others none.
        AsyncLocalSGDError: if a process does not come; tells why.
    """
    train = job.gather(trains)
    empty = sorted({rank // job.worker_size for rank, trains in enumerate(train) if not trains})
    if empty and any(train):
        raise MisconfigurationException(
            f"The training data of worker {', '.join(map(str, empty))} is empty: its loader has no batch, while others "
            "have some. Look at how the data is divided (`drop_last`, a filter, a part of the files for each rank)."
        )


def check_pass(trainer: pl.Trainer, rank: int, batches: int) -> None:
    """Make sure that a pass over the worker's own data had batches, if further passes follow until the job ends.

    Raises:
        MisconfigurationException: if it had none; further passes would have none either.
    """
    loaders = training_loaders(trainer)
    if batches > 0 or loaders is None:
        return
    if any(isinstance(loader, WorkerLoader) for loader in loaders.flattened):
        return  # the others have taken all batches of this epoch
    message = (
        f"The training data of worker {rank} gave no batch in epoch {trainer.current_epoch}: it is empty, or it can be "
        "read only once (a generator?). Return a fresh iterator from `__iter__` at each call."
    )
    if trainer.max_epochs in (None, -1):
        raise MisconfigurationException(message)
    warnings.warn(message, stacklevel=2)


def learn_decisions(job: StaticJob, broadcast: Callable[[StaticJob], None]) -> None:
    """Adopt the decisions of worker 0.

    The run is complete: the loss of a process from now on leads to a warning, and fails no other process.

    Args:
        job: the processes.
        broadcast: sends worker 0's decisions to all processes; all call it.
    """
    try:
        broadcast(job)
    except AsyncLocalSGDError as error:
        warnings.warn(
            "The run is complete, but this process could not learn what worker 0 has validated and decided "
            f"(`callback_metrics`, the best checkpoint). {error}",
            stacklevel=2,
        )
