"""Learning-rate schedulers that count the job's steps, or follow worker 0's metrics."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_async_localsgd.trainer.mixing import mix_in, mix_out

__all__ = ["JobSchedulers"]


class JobSchedulers:
    """Steps learning-rate schedulers that count steps: by the job's steps instead of this worker's batches.

    A ``frequency`` that is never reached switches off Lightning's own stepping. The ``interval`` is unchanged, because
    ``LearningRateMonitor`` reads it. Schedulers that the module steps itself, once in each of its steps, also count the
    job's steps.

    Args:
        trainer: the trainer of the schedulers.
        job_steps: steps of the job that the schedulers have counted before.
        follow: whether schedulers that watch a metric once per epoch are stepped at worker 0's messages, with its
            value.
        progress: returns this worker's local steps and the job's steps in this run.
        budget: steps of the job in the run; None: unknown.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        job_steps: int,
        follow: bool,
        progress: Callable[[], tuple[int, int]],
        budget: int | None,
    ) -> None:
        self._trainer = trainer
        automatic = trainer.lightning_module.automatic_optimization
        configs = trainer.lr_scheduler_configs if automatic else []
        plateaus = [config for config in configs if config.reduce_on_plateau]
        self._taken = [c for c in configs if not c.reduce_on_plateau and self._steps_of(c) > 0]
        self._by_metric = [c for c in plateaus if c.interval == "step"]
        self._followed = [c for c in plateaus if c.interval == "epoch" and follow]
        # A list: configurations compare by value and cannot be keys.
        self._frequencies = [(c, c.frequency) for c in [*self._taken, *self._by_metric, *self._followed]]
        self._every = [c.frequency * self._steps_of(c) for c in self._taken]
        self._metric_every = [c.frequency for c in self._by_metric]
        for config, _ in self._frequencies:
            config.frequency = sys.maxsize
        self._by_hand = list(_stepped_by_hand(trainer, automatic))
        for scheduler in self._by_hand:
            mix_in(scheduler, _SteppedByHand, hand=_Hand(trainer, progress, budget))
        self._follow = follow
        self._metrics_at = job_steps
        self.steps = job_steps

    def _steps_of(self, config: LRSchedulerConfig) -> int:
        """Steps of the job in an interval of a scheduler; 0: Lightning steps it.

        Shared epochs end at about the same time on all workers. A pass of a worker's own would end sooner on a fast
        worker.
        """
        if config.interval == "step":
            return 1
        batches = self._trainer.num_training_batches
        if self._trainer.max_epochs != -1 or batches == float("inf"):
            return 0
        return math.ceil(batches / self._trainer.accumulate_grad_batches)

    def advance(self, job_steps: int) -> None:
        """Step the schedulers by the job's steps since the last call."""
        for step in range(self.steps + 1, job_steps + 1):
            for config, every in zip(self._taken, self._every, strict=True):
                if step % every == 0:
                    self._trainer.lightning_module.lr_scheduler_step(config.scheduler, None)
        self.steps = max(self.steps, job_steps)

    def step_by_metrics(self, validated: bool) -> None:
        """Step schedulers that watch a metric every few steps, if as many have passed, with its current value.

        Args:
            validated: whether a validation has ended, so that its metrics must exist.

        Raises:
            MisconfigurationException: if a metric that must exist by now does not.
        """
        before, self._metrics_at = self._metrics_at, self.steps
        for config, every in zip(self._by_metric, self._metric_every, strict=True):
            if self.steps // every == before // every:
                continue
            metrics = self._trainer.callback_metrics
            value = metrics.get(str(config.monitor))
            if value is not None:
                self._trainer.lightning_module.lr_scheduler_step(config.scheduler, value)
            elif config.strict and validated and not self._follow:
                raise MisconfigurationException(
                    f"ReduceLROnPlateau conditioned on metric {config.monitor} which is not available. Available "
                    f"metrics are: {list(metrics)}. Condition can be set using `monitor` key in lr scheduler dict"
                )

    def step_plateaus(self, values: Sequence[float | None]) -> None:
        """Step schedulers that watch a metric as on worker 0, each with its value; None: no step."""
        for config, value in zip(self._followed, values, strict=False):
            if value is not None:
                self._trainer.lightning_module.lr_scheduler_step(config.scheduler, value)

    def restore(self) -> None:
        """Return the schedulers to Lightning."""
        for config, frequency in self._frequencies:
            config.frequency = frequency
        for scheduler in self._by_hand:
            mix_out(scheduler)


def _stepped_by_hand(trainer: pl.Trainer, automatic: bool) -> Iterator[LRScheduler]:
    """Schedulers that Lightning does not step: all with manual optimization, otherwise those unknown to Lightning."""
    registered = [config.scheduler for config in trainer.lr_scheduler_configs]
    attributes = list(vars(trainer.lightning_module).values())
    known = registered if automatic else []
    for scheduler in attributes if automatic else [*registered, *attributes]:
        plain = isinstance(scheduler, LRScheduler) and not isinstance(scheduler, ReduceLROnPlateau)
        if plain and not any(scheduler is other for other in known):
            known.append(scheduler)
            yield scheduler


class _Hand:
    """Computes the number of steps of a scheduler for one call of its ``step``.

    A call in each step of the module counts the job's steps, as under DDP. Calls at other times (once per epoch, twice
    per step) count as they are.
    """

    def __init__(self, trainer: pl.Trainer, progress: Callable[[], tuple[int, int]], budget: int | None) -> None:
        self._batches = trainer.fit_loop.epoch_loop.batch_progress.total
        self._progress = progress
        self._budget = budget
        self._own_before, self._job_before = progress()
        self._batches_before = self._batches.ready
        self._calls = self._made = 0
        self._in_each_step = True

    def steps_due(self) -> int:
        """Number of steps due with this call."""
        own, job = self._progress()
        self._calls += 1
        steps, batches = own - self._own_before, self._batches.ready - self._batches_before
        self._in_each_step &= steps <= self._calls <= batches
        if not self._in_each_step:
            return 1
        job += self._batches.ready - self._batches.processed  # type: ignore[attr-defined]  # a step under way is not counted yet
        if self._budget is not None:
            job = min(job, self._budget)
        due: int = max(0, job - self._job_before - self._made)
        self._made += due
        return due


class _SteppedByHand(LRScheduler):
    """A mixin for schedulers that the module steps."""

    hand: _Hand

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Step by the job's steps since the last call."""
        for _ in range(self.hand.steps_due()):
            super().step(*args, **kwargs)
