"""Simulated devices of unequal speed: sleep extends every local step to the step time of the device."""

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
    """Makes every local step take ``seconds``, its real computation included, and records the times.

    A step lasts from its batch to the end of the inner optimizer's step. The sleep takes place there, in that
    optimizer's first post-hook. A strategy's work between steps (an exchange, a wait) adds to the time and cannot hide
    in the sleep. DDP's communication within the backward pass can hide, in DDP's favour.

    Times are of ``time.monotonic``, one clock for all processes of a machine.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.begin = 0.0
        """Start of the first step."""
        self.end = 0.0
        """End of the last step so far."""
        self.steps = 0
        self.late_steps = 0
        """Number of steps with a computation longer than the device's step time."""
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
