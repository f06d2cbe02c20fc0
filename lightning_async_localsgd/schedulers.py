"""Learning-rate schedulers that count the job's steps, or follow worker 0's metrics."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import lightning.pytorch as pl

__all__ = ["JobSchedulers"]


class JobSchedulers:
    """Steps the learning-rate schedulers that count steps with the job instead of with this worker's batches.

    Lightning's own stepping is switched off by a ``frequency`` it never reaches; the ``interval`` stays, which
    ``LearningRateMonitor`` reads.

    Args:
        trainer: whose schedulers.
        job_steps: steps of the job that they have made already.
        follow: whether schedulers that watch a metric once per epoch are stepped when worker 0 says, with its value.
    """

    def __init__(self, trainer: pl.Trainer, job_steps: int, follow: bool) -> None:
        self._trainer = trainer
        configs = trainer.lr_scheduler_configs if trainer.lightning_module.automatic_optimization else []
        plateaus = [c for c in configs if c.reduce_on_plateau and c.interval == "epoch"] if follow else []
        self._taken = [
            (config, config.frequency)
            for config in configs
            if config.interval == "step" and not config.reduce_on_plateau
        ]
        self._followed = [(config, config.frequency) for config in plateaus]
        for config, _ in self._taken + self._followed:
            config.frequency = sys.maxsize
        self.steps = job_steps

    def advance(self, job_steps: int) -> None:
        """Make up for the steps that the job has made since the last call."""
        for step in range(self.steps + 1, job_steps + 1):
            for config, frequency in self._taken:
                if step % frequency == 0:
                    self._trainer.lightning_module.lr_scheduler_step(config.scheduler, None)
        self.steps = max(self.steps, job_steps)

    def step_plateaus(self, values: Sequence[float | None]) -> None:
        """Step those that watch a metric as worker 0 has, each with its value; None: not this one."""
        for (config, _), value in zip(self._followed, values, strict=False):
            if value is not None:
                self._trainer.lightning_module.lr_scheduler_step(config.scheduler, value)

    def restore(self) -> None:
        """Give the schedulers back to Lightning."""
        for config, frequency in self._taken + self._followed:
            config.frequency = frequency
