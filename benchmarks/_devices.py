"""Devices of unequal speed, simulated: every local step is filled up with sleep to the time the device would take."""

import time
from typing import Any

import lightning as L
from torch.optim import Optimizer

TOY_SECONDS_PER_STEP = (0.58, 0.75, 1.51, 3.33)
"""The device speeds of the toy experiment of Liu et al. 2024 (arXiv 2401.09135), "very heterogeneous"."""


def scaled(scale: float) -> list[float]:
    """Seconds per local step of each worker, the toy's times ``scale``."""
    return [seconds * scale for seconds in TOY_SECONDS_PER_STEP]


class SimulatedDevice(L.Callback):
    """Makes every local step take ``seconds``, what it really computes included, and keeps the time.

    The step counts from its batch to the end of the inner optimizer's step. It is filled up there, as that optimizer's
    first post-hook: what a strategy does between steps (an exchange, a wait) adds to it and cannot hide in the sleep.
    What DDP does within the backward pass can, which is in DDP's favour.

    Times are of ``time.monotonic``, one clock for all processes of a machine.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.begin = 0.0
        """When the first step began."""
        self.end = 0.0
        """When the last step so far ended."""
        self.steps = 0
        self.late_steps = 0
        """Steps whose computation alone took longer than the device would."""
        self._step_begin = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.optimizers[0].register_step_post_hook(self._fill_up)

    def on_train_batch_start(self, *_: Any) -> None:
        self._step_begin = time.monotonic()
        if not self.steps:
            self.begin = self._step_begin

    def _fill_up(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        left = self._step_begin + self.seconds - time.monotonic()
        if left > 0:
            time.sleep(left)
        else:
            self.late_steps += 1
        self.steps += 1
        self.end = time.monotonic()
