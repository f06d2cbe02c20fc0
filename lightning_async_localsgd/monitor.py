"""A callback that logs how the asynchronous run goes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_async_localsgd.exchange import OuterUpdate
from lightning_async_localsgd.strategy import AsyncLocalSGDStrategy
from lightning_async_localsgd.worker import RunSummary

__all__ = ["AsyncLocalSGDMonitor"]


class AsyncLocalSGDMonitor(pl.Callback):
    """Logs the state of the exchange to all loggers of the trainer, every ``log_every_n_steps`` with news.

    Under ``async_localsgd/``:

    - ``version``: outer updates so far;
    - ``staleness``, ``delta_norm``, ``alignment``: mean over the updates since the last time of the versions that
      passed between the start of a round and the application of its delta, of the delta's L2 norm, and of its cosine
      with the outer momentum;
    - ``local_steps/<worker>``, ``steps_per_second/<worker>``: of each worker, as of the latest exchange;
    - ``bytes_sent``, ``bytes_received``, ``blocked_seconds``: of the worker that logs, worker 0, since the start;
    - ``goodput``: local steps of all workers since the last time, over those that all could have made at their speeds.

    The step on the axis is worker 0's own, as for everything else that it logs.

    Example::

        L.Trainer(strategy=AsyncLocalSGDStrategy(), callbacks=[AsyncLocalSGDMonitor()])

    Raises:
        MisconfigurationException: at the start, if the trainer has no logger or another strategy.
    """

    def __init__(self) -> None:
        self._updates: list[OuterUpdate] = []
        self._last: tuple[float, int] = (0.0, 0)  # when it was logged, and all workers' local steps then

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not isinstance(trainer.strategy, AsyncLocalSGDStrategy):
            raise MisconfigurationException(
                "`AsyncLocalSGDMonitor` watches an `AsyncLocalSGDStrategy`. Pass one to `Trainer(strategy=...)`, or "
                "leave the callback out."
            )
        if not trainer.loggers:
            raise MisconfigurationException(
                "`AsyncLocalSGDMonitor` has nowhere to log to: pass `Trainer(logger=...)`, or leave the callback out."
            )
        worker = trainer.strategy.worker
        assert worker is not None
        worker.measure_updates()
        self._updates.clear()
        self._last = (time.monotonic(), worker.summary().total_local_steps)

    def on_outer_update(self, trainer: pl.Trainer, pl_module: pl.LightningModule, update: OuterUpdate) -> None:
        """Called by the strategy for every outer update."""
        self._updates.append(update)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer._logger_connector.should_update_logs:
            self._log(trainer)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._log(trainer)

    def _log(self, trainer: pl.Trainer) -> None:
        strategy = trainer.strategy
        assert isinstance(strategy, AsyncLocalSGDStrategy) and strategy.worker is not None
        if not self._updates:
            return
        summary = strategy.worker.summary()
        metrics = _metrics(self._updates, summary, strategy.worker.speeds)
        now = time.monotonic()
        possible = (now - self._last[0]) * sum(strategy.worker.speeds)
        if possible > 0:
            metrics["goodput"] = (summary.total_local_steps - self._last[1]) / possible
        self._last = (now, summary.total_local_steps)
        self._updates.clear()
        named = {f"async_localsgd/{name}": float(value) for name, value in metrics.items()}
        for logger in trainer.loggers:
            logger.log_metrics(named, step=trainer.fit_loop.epoch_loop._batches_that_stepped)


def _metrics(updates: Sequence[OuterUpdate], summary: RunSummary, speeds: Sequence[float]) -> dict[str, float]:
    return {
        "version": summary.version,
        "staleness": fmean(update.staleness for update in updates),
        **_mean("delta_norm", [update.norm for update in updates]),
        **_mean("alignment", [update.alignment for update in updates]),
        **{f"local_steps/{worker}": steps for worker, steps in enumerate(summary.local_steps)},
        **{f"steps_per_second/{worker}": speed for worker, speed in enumerate(speeds)},
        "bytes_sent": summary.bytes_sent,
        "bytes_received": summary.bytes_received,
        "blocked_seconds": summary.blocked_seconds,
    }


def _mean(name: str, values: Sequence[float | None]) -> dict[str, float]:
    """The mean of the values that there are; NaN is none."""
    known = [value for value in values if value is not None and value == value]
    return {name: fmean(known)} if known else {}
