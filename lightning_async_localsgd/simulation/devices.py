"""Virtual devices: the duration of each local step of a virtual worker, and the times at which it joins and leaves."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

__all__ = ["ChangingDevice", "ConstantDevice", "Device", "NoisyDevice", "VirtualWorker", "make_workers"]


class Device(Protocol):
    """The durations of a worker's local steps."""

    def step_seconds(self, now: float, chance: random.Random) -> float:
        """Virtual seconds of the local step that begins at ``now``.

        Args:
            now: virtual time in seconds.
            chance: this worker's own source of random numbers.
        """


@dataclass(frozen=True)
class ConstantDevice:
    """Every step takes the same time.

    Args:
        speed: local steps per second.

    Raises:
        ValueError: if ``speed`` is not positive and finite.
    """

    speed: float

    def __post_init__(self) -> None:
        _check_speed(self.speed)

    def step_seconds(self, now: float, chance: random.Random) -> float:
        """See :meth:`Device.step_seconds`."""
        return 1 / self.speed


@dataclass(frozen=True)
class NoisyDevice:
    """Steps whose time varies at random: log-normal, with the device's step time as its mean.

    Args:
        speed: local steps per second, the inverse of the mean time.
        deviation: standard deviation of a step's time over its mean, at least 0.

    Raises:
        ValueError: if an argument is outside its range.
    """

    speed: float
    deviation: float = 0.1

    def __post_init__(self) -> None:
        _check_speed(self.speed)
        if not 0 <= self.deviation < math.inf:
            raise ValueError(f"A device's `deviation` must be at least 0, got {self.deviation}.")

    def step_seconds(self, now: float, chance: random.Random) -> float:
        """See :meth:`Device.step_seconds`."""
        variance = math.log1p(self.deviation**2)
        return math.exp(chance.gauss(-variance / 2, math.sqrt(variance))) / self.speed


@dataclass(frozen=True)
class ChangingDevice:
    """A device whose speed changes during the run: throttled, shared, moved.

    Args:
        speeds: pairs of virtual time in seconds and the speed in local steps per second from then on; the first at 0.

    Raises:
        ValueError: if the times do not begin at 0 and rise, or a speed is not positive.
    """

    speeds: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "speeds", tuple((float(time), float(speed)) for time, speed in self.speeds))
        times = [time for time, _ in self.speeds]
        if not times or times[0] != 0 or any(b <= a for a, b in pairwise(times)):
            raise ValueError(f"The times of a changing device must begin at 0 and rise, got {times}.")
        for _, speed in self.speeds:
            _check_speed(speed)

    def step_seconds(self, now: float, chance: random.Random) -> float:
        """See :meth:`Device.step_seconds`."""
        return 1 / next(speed for time, speed in reversed(self.speeds) if time <= now)


@dataclass(frozen=True, init=False)
class VirtualWorker:
    """A worker that joins late or leaves early.

    A worker that joins starts from the global parameters of that time. When a worker leaves, its steps that have not
    been applied are lost, as with a spot instance that is reclaimed; the others continue without it.

    Args:
        device: its device, or its speed in local steps per second.
        joins: virtual time in seconds at which it begins.
        leaves: virtual time in seconds at which it leaves.

    Raises:
        ValueError: if it leaves before it joins.
    """

    device: Device
    joins: float = 0.0
    leaves: float = math.inf

    def __init__(self, device: Device | float, joins: float = 0.0, leaves: float = math.inf) -> None:
        object.__setattr__(self, "device", ConstantDevice(device) if isinstance(device, (int, float)) else device)
        object.__setattr__(self, "joins", joins)
        object.__setattr__(self, "leaves", leaves)
        if not callable(getattr(self.device, "step_seconds", None)):
            raise ValueError(f"A worker is a speed in local steps per second or a device, got {device!r}.")
        if not 0 <= self.joins < self.leaves:
            raise ValueError(f"A worker must join, at 0 or later, before it leaves: {self.joins} s, {self.leaves} s.")


def make_workers(workers: Sequence[float | Device | VirtualWorker]) -> list[VirtualWorker]:
    """All workers in one form: numbers are speeds in local steps per second.

    Raises:
        ValueError: if there is no worker, or one is of another type.
    """
    if not workers:
        raise ValueError("A simulation needs at least one worker: pass their speeds in local steps per second.")
    return [worker if isinstance(worker, VirtualWorker) else VirtualWorker(worker) for worker in workers]


def _check_speed(speed: float) -> None:
    if not 0 < speed < math.inf:
        raise ValueError(f"A worker's speed must be positive and finite (local steps per second), got {speed:g}.")
