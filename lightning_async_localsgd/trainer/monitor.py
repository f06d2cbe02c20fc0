"""A callback that logs the state of the asynchronous run."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_async_localsgd.internals import batches_that_stepped, should_update_logs
from lightning_async_localsgd.protocol.progress import OuterUpdate
from lightning_async_localsgd.trainer.strategy import AsyncLocalSGDStrategy
from lightning_async_localsgd.worker.summary import RunSummary

__all__ = ["AsyncLocalSGDMonitor"]

_GOODPUT_ROUNDS = 4  # of the fastest worker, times the number of workers


class AsyncLocalSGDMonitor(pl.Callback):
    """Logs the state of the exchange to all loggers of the trainer, every ``log_every_n_steps`` with news.

    The metrics under ``async_localsgd/`` are:

    - ``version``: outer updates so far;
    - ``staleness``, ``delta_norm``, ``alignment``: means over the updates since the last entry. Staleness is the number
      of versions between the start of a round and the application of its delta, the norm is the delta's L2 norm, and
      the alignment is its cosine with the outer momentum;
    - ``local_steps/<worker>``, ``steps_per_second/<worker>``: of each worker, at the latest exchange;
    - ``bytes_sent``, ``bytes_received``, ``blocked_seconds``: of worker 0, which logs, since the start;
    - ``goodput``: local steps of all workers over those possible at their speeds, both between two exchanges: the
      latest and one a few rounds before it. 1 if no worker waits.

    The step of each entry is worker 0's own, as for its other entries.

    Example::

        L.Trainer(strategy=AsyncLocalSGDStrategy(), callbacks=[AsyncLocalSGDMonitor()])

    Raises:
        MisconfigurationException: at the start, if the trainer has no logger or another strategy.
    """

    def __init__(self) -> None:
        self._updates: list[OuterUpdate] = []
        self._goodput = Goodput(0)

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
        settings = trainer.strategy.settings
        self._goodput = Goodput(_GOODPUT_ROUNDS * settings.round_length(None).usual * trainer.strategy.workers)

    def on_outer_update(self, trainer: pl.Trainer, pl_module: pl.LightningModule, update: OuterUpdate) -> None:
        """Called by the strategy for every outer update."""
        self._updates.append(update)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        worker = trainer.strategy.worker  # type: ignore[attr-defined]
        self._goodput.note(worker.exchanged_at, worker.summary().total_local_steps)
        if should_update_logs(trainer):
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
        goodput = self._goodput.of(strategy.worker.speeds)
        if goodput is not None:
            metrics["goodput"] = goodput
        self._updates.clear()
        named = {f"async_localsgd/{name}": float(value) for name, value in metrics.items()}
        for logger in trainer.loggers:
            logger.log_metrics(named, step=batches_that_stepped(trainer))


class Goodput:
    """Local steps made over those possible, between two exchanges, so that both counts cover the same time.

    Args:
        window: minimum number of local steps of all workers between the two, if there are as many. A short window is
            imprecise: workers count whole steps, and exchanges come at any time within a step.
    """

    def __init__(self, window: int) -> None:
        self._window = window
        self._exchanges: deque[tuple[float, int]] = deque()

    def note(self, time: float, steps: int) -> None:
        """Record the latest exchange; recording it twice has no effect.

        Args:
            time: time of the exchange in seconds.
            steps: local steps of all workers at that time.
        """
        if steps == 0 or (self._exchanges and steps <= self._exchanges[-1][1]):
            return
        self._exchanges.append((time, steps))
        while len(self._exchanges) > 2 and steps - self._exchanges[1][1] >= self._window:
            self._exchanges.popleft()

    def of(self, speeds: Sequence[float]) -> float | None:
        """The goodput of workers at these speeds, in local steps per second; None while unknown."""
        if not self._exchanges:
            return None
        (began, before), (ended, after) = self._exchanges[0], self._exchanges[-1]
        possible = (ended - began) * sum(speeds)
        return (after - before) / possible if possible > 0 else None


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
    """The mean of the values that are neither None nor NaN."""
    known = [value for value in values if value is not None and value == value]
    return {name: fmean(known)} if known else {}
