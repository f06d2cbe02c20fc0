"""A run of workers that learn nothing, measured once it is in full swing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from lightning_async_localsgd.codecs import Codec
from lightning_async_localsgd.outer import GlobalModel
from lightning_async_localsgd.outer.layout import Layout
from lightning_async_localsgd.protocol.ledger import Group
from lightning_async_localsgd.protocol.progress import OuterUpdate, Progress
from lightning_async_localsgd.protocol.rounds import Rounds
from lightning_async_localsgd.settings import Settings
from lightning_async_localsgd.simulation.costs import Costs
from lightning_async_localsgd.simulation.devices import VirtualWorker
from lightning_async_localsgd.simulation.interfaces import FinishedRound, Learned
from lightning_async_localsgd.simulation.network import Network
from lightning_async_localsgd.simulation.timeline import Timeline

__all__ = ["ROUNDS", "MeasuredRun", "Moment"]

_WARM_UP_ROUNDS = 4  # of every worker, in which unequal ones fall in step
_MEASURED_ROUNDS = 6
ROUNDS = _WARM_UP_ROUNDS + _MEASURED_ROUNDS
"""Rounds that every worker makes at least."""


class Moment(NamedTuple):
    """How far all workers are, each at the same time."""

    time: float
    pushes: list[int]
    waited: list[float]
    sent: list[int]
    received: list[int]


class MeasuredRun:
    """Runs workers that learn nothing, and notes two moments, each just after a delta was applied.

    Args:
        workers: the workers.
        settings: settings of the run.
        network: between the workers.
        costs: of a delta.
        seed: of the devices' noise.
    """

    def __init__(
        self, workers: Sequence[VirtualWorker], settings: Settings, network: Network, costs: Costs, seed: int
    ) -> None:
        self.stalenesses: list[int] = []
        """Of the outer updates between the two moments."""
        self.finished_rounds: list[FinishedRound] = []
        """Rounds, or with fragments parts of them, that ended between the two moments."""
        self._pushes = [0] * len(workers)
        self._fragments = settings.fragments
        self._first: Moment | None = None
        self._last: Moment | None = None
        self._timeline = Timeline(
            workers,
            10**12,  # far off: planned is the middle of a run
            settings,
            _small_state(settings, len(workers)),
            _Nothing(),
            self,
            network,
            costs.delta,
            seed,
        )

    @property
    def codec(self) -> str:
        """Name of the codec of the latest turn."""
        return self._timeline.progress.codec

    def run(self) -> tuple[Moment, Moment]:
        """Run until the second moment; returns both."""
        self._timeline.run(until=lambda: self._last is not None)
        assert self._first is not None and self._last is not None
        return self._first, self._last

    # ---- see `Observer` ---------------------------------------------------------------------------------------------

    def updated(self, time: float, updates: Sequence[OuterUpdate]) -> None:
        """See :meth:`Observer.updated`."""
        if self._first is not None:
            self.stalenesses += [update.staleness for update in updates]

    def finished(self, rounds: Sequence[FinishedRound]) -> None:
        """See :meth:`Observer.finished`."""
        for round_ in rounds:
            self._pushes[round_.worker] += 1
        if self._first is not None:
            self.finished_rounds += rounds
        fewest = min(self._pushes) // self._fragments
        if self._first is None and fewest >= _WARM_UP_ROUNDS:
            self._first = self._moment()
        if self._last is None and fewest >= ROUNDS:
            self._last = self._moment()

    def _moment(self) -> Moment:
        now, lanes = self._timeline.now, self._timeline.lanes
        return Moment(
            now,
            list(self._pushes),
            [lane.waited_until(now) for lane in lanes],
            list(self._timeline.exchange.bytes_sent),
            list(self._timeline.exchange.bytes_received),
        )


class _Nothing:
    """Replicas that learn nothing; see :class:`~lightning_async_localsgd.simulation.interfaces.Replicas`."""

    def join(self, worker: int) -> None: ...

    def step(self, worker: int, rounds: Rounds, progress: Progress) -> None: ...

    def push(self, worker: int, fragment: int) -> Learned:
        return Learned(samples=0, loss=0.0)

    def finite(self, worker: int) -> bool:
        return True

    def trade(self, groups: Sequence[Group], codec: Codec) -> Iterator[Group]:
        yield from groups

    def publish(self, workers: Sequence[int]) -> None: ...

    def adopt(self, worker: int, restart: bool) -> None: ...


def _small_state(settings: Settings, workers: int) -> GlobalModel:
    """A global model of one parameter per fragment: it takes the deltas of a turn as any other does."""
    plain = replace(settings, constraint=None, outer_device="cpu")  # a constraint knows the model's names
    small = nn.ParameterList(torch.zeros(1) for _ in range(settings.fragments))
    return plain.global_model(Layout(small, fragments=settings.fragments), workers)
