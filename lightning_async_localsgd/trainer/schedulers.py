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
    """Steps the learning-rate schedulers that count steps with the job instead of with this worker's batches.

    Lightning's own stepping is switched off by a ``frequency`` it never reaches; the ``interval`` stays, which
    ``LearningRateMonitor`` reads. Schedulers that the module steps itself, once in every step of its own, step with
    the job as well.

    Args:
        trainer: whose schedulers.
        job_steps: steps of the job that they have made already.
        follow: whether schedulers that watch a metric once per epoch are stepped when worker 0 says, with its value.
        progress: tells this worker's local steps and the steps of the job, of the run so far.
        budget: steps of the job that the run has; None if that is open.
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
        # By place: configurations compare by value, and so cannot be keys.
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
        """Steps of the job in an interval of a scheduler; 0 if Lightning is to step it.

        Epochs that all workers share end at about the same time. A pass that is a worker's own would end sooner on a
        fast worker.
        """
        if config.interval == "step":
            return 1
        batches = self._trainer.num_training_batches
        if self._trainer.max_epochs != -1 or batches == float("inf"):
            return 0
        return math.ceil(batches / self._trainer.accumulate_grad_batches)

    def advance(self, job_steps: int) -> None:
        """Make up for the steps that the job has made since the last call."""
        for step in range(self.steps + 1, job_steps + 1):
            for config, every in zip(self._taken, self._every, strict=True):
                if step % every == 0:
                    self._trainer.lightning_module.lr_scheduler_step(config.scheduler, None)
        self.steps = max(self.steps, job_steps)

    def heed_metrics(self, validated: bool) -> None:
        """Step those that watch a metric every few steps, if as many have passed, with its value of now.

        Args:
            validated: whether a validation is over, so that its metrics must be there.

        Raises:
            MisconfigurationException: if a metric that must be there by now is not.
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
        """Step those that watch a metric as worker 0 has, each with its value; None: not this one."""
        for config, value in zip(self._followed, values, strict=False):
            if value is not None:
                self._trainer.lightning_module.lr_scheduler_step(config.scheduler, value)

    def restore(self) -> None:
        """Give the schedulers back to Lightning."""
        for config, frequency in self._frequencies:
            config.frequency = frequency
        for scheduler in self._by_hand:
            mix_out(scheduler)


def _stepped_by_hand(trainer: pl.Trainer, automatic: bool) -> Iterator[LRScheduler]:
    """Schedulers that Lightning does not step: with manual optimization all, else those that only the module knows."""
    registered = [config.scheduler for config in trainer.lr_scheduler_configs]
    attributes = list(vars(trainer.lightning_module).values())
    known = registered if automatic else []
    for scheduler in attributes if automatic else [*registered, *attributes]:
        plain = isinstance(scheduler, LRScheduler) and not isinstance(scheduler, ReduceLROnPlateau)
        if plain and not any(scheduler is other for other in known):
            known.append(scheduler)
            yield scheduler


class _Hand:
    """Tells how many steps of a scheduler one call of its ``step`` is worth.

    Under DDP a module that calls it in each of its steps has it count the steps of the job. Whoever calls it at other
    times (once per epoch, twice per step) gets what they call.
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
        """Steps of the scheduler that are due with this call."""
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
    """Mixed into a scheduler that the module steps."""

    hand: _Hand

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Step as often as the job has since the last call."""
        for _ in range(self.hand.steps_due()):
            super().step(*args, **kwargs)
