"""The timeline: rounds of virtual workers and turns of their exchange, under a virtual clock.

``lane.py`` says when a worker trains, pushes and adopts, and ``exchange.py`` when a turn opens and closes, in the order
of the real worker and exchange thread. What is learned meanwhile is the business of
:class:`~lightning_async_localsgd.simulation.interfaces.Replicas`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from lightning_async_localsgd.protocol.budget import Budget
from lightning_async_localsgd.protocol.ledger import Ledger, LedgerState
from lightning_async_localsgd.protocol.progress import Progress
from lightning_async_localsgd.protocol.rounds import Rounds
from lightning_async_localsgd.settings import Settings
from lightning_async_localsgd.simulation.clock import Phase, VirtualClock
from lightning_async_localsgd.simulation.devices import VirtualWorker
from lightning_async_localsgd.simulation.exchange import DeltaCosts, VirtualExchange
from lightning_async_localsgd.simulation.interfaces import FinishedRound, Observer, Replicas
from lightning_async_localsgd.simulation.lane import Lane
from lightning_async_localsgd.simulation.mailbox import VirtualMailbox
from lightning_async_localsgd.simulation.network import Network

__all__ = ["Timeline"]


class Timeline:
    """Lets virtual workers make their rounds, in virtual time.

    Args:
        workers: the workers.
        max_steps: local steps per worker, on average with a shared budget.
        settings: settings of the run.
        state: what outer updates move.
        replicas: what learns.
        observer: what is told of updates and rounds.
        network: what the exchange goes over.
        costs: of a delta.
        seed: seed of what is random in the devices.
    """

    def __init__(
        self,
        workers: Sequence[VirtualWorker],
        max_steps: int,
        settings: Settings,
        state: LedgerState,
        replicas: Replicas,
        observer: Observer,
        network: Network,
        costs: DeltaCosts,
        seed: int = 0,
    ) -> None:
        size = len(workers)
        self.over = False
        self._observer = observer
        self._clock = VirtualClock()
        budget = Budget(max_steps, size, settings.shares_budget(size))
        start = Progress.at_start(size, settings.round_length(max_steps).first())
        late = [worker.joins > 0 for worker in workers]
        start = replace(start, caps=budget.caps(start.steps, start.round_steps, final=late))
        mailboxes = [VirtualMailbox() for _ in workers]
        self.exchange = VirtualExchange(
            mailboxes,
            settings,
            state,
            Ledger(state, settings, budget, start, settings.codec_choice(sum(costs.elements) // len(costs.elements))),
            start,
            replicas,
            observer,
            network,
            costs,
            self._clock,
            self._after_turn,
        )
        self.lanes: list[Lane] = []
        for rank, worker in enumerate(workers):
            rounds = Rounds(rank, size, settings)
            rounds.start(start, max_steps)
            lane = Lane(
                rank,
                worker,
                rounds,
                settings,
                mailboxes[rank],
                self.exchange,
                replicas,
                self._clock,
                lambda: self.local_steps,
                seed,
            )
            self.lanes.append(lane)
            self._clock.after(worker.joins, Phase.DEVICES, lane.join)
            if worker.leaves < math.inf:
                self._clock.after(worker.leaves, Phase.DEVICES, lane.leave)

    @property
    def now(self) -> float:
        """Virtual time in seconds."""
        return self._clock.now

    @property
    def local_steps(self) -> int:
        """Local steps of all workers so far."""
        return sum(lane.rounds.local_steps for lane in self.lanes)

    @property
    def progress(self) -> Progress:
        """Shared progress after the latest turn."""
        return self.exchange.progress

    def run(self, until: Callable[[], bool] = lambda: False) -> None:
        """Let time go on until the run is over, and apply what was learned.

        Args:
            until: asked before each event; the run stands still while it is true.

        Raises:
            RuntimeError: if all wait for each other, which no run should.
        """
        while not self.over and not until():
            if not self._clock.advance():
                waits = {lane.rank: lane.waits_for.value for lane in self.lanes if lane.waits_for is not None}
                raise RuntimeError(f"Nothing happens any more, though the run is not over; workers wait for {waits}.")

    def _after_turn(self, finished: list[FinishedRound]) -> None:
        # Who is still to come finds work, if all others have left before it was done.
        to_come = any(lane.worker.joins > self.now for lane in self.lanes)
        self.over = self.progress.over and (self.progress.exhausted or not to_come)
        self._observer.finished(finished)
        for lane in self.lanes:
            lane.wake()
