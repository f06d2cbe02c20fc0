"""Tickets: the assignment of the units of an epoch to workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from datetime import timedelta
from functools import partial
from threading import Thread
from typing import Any, Protocol

from torch.distributed import Store

from lightning_async_localsgd.errors import PeerLostError
from lightning_async_localsgd.membership import JobStore

__all__ = [
    "SharedTickets",
    "StridedTickets",
    "Tickets",
]

_MOST_AT_ONCE = 64  # units in a lease
_A_MOMENT = 5.0  # seconds


class Tickets(Protocol):
    """Assigns each unit of an epoch to one worker."""

    def draw(self, epoch: int, left: Sequence[int], comers: Sequence[int]) -> Iterator[int]:
        """This worker's units among ``left``; ``comers`` are all workers that draw from these."""

    def forget(self, epoch: int) -> None:
        """Release earlier epochs: no worker will draw from them again."""

    def close(self) -> None:
        """Release threads and connections."""


class StridedTickets:
    """Every k-th unit for each of k workers, for workers in lockstep.

    Args:
        worker: rank of this worker.
        workers: k, the number of workers.
    """

    def __init__(self, worker: int, workers: int) -> None:
        self._worker = worker
        self._workers = workers

    def draw(self, epoch: int, left: Sequence[int], comers: Sequence[int]) -> Iterator[int]:
        """This worker's units."""
        yield from (unit for unit in left if unit % self._workers == self._worker)

    def forget(self, epoch: int) -> None:
        """Do nothing: no epoch is stored."""

    def close(self) -> None:
        """Do nothing: there is nothing to release."""


class SharedTickets:
    """Leases of units from a counter in the job's store, sized by the worker's pace.

    A lease is half of the worker's share of the remaining units, so leases shrink towards the end of an epoch and all
    workers end it together (guided self-scheduling). At the start of a lease the next one is taken on a thread of its
    own, so that training does not wait for it. The first units are assigned to the workers, one to each: even the
    slowest worker gets a batch of every epoch.

    In a worker of several devices the first takes the leases and the others read them from the store.

    Args:
        store: a part of the job's store, this loader's own.
        worker: rank of this worker.
        pace_share: returns this worker's share of the pace of all, in (0, 1].
        device: rank of this process within its worker.
        devices: number of processes of the worker.
        timeout: maximum time to wait for the first process of the worker.

    References:
        Polychronopoulos and Kuck 1987, Guided Self-Scheduling.
    """

    def __init__(
        self,
        store: Store,
        worker: int,
        pace_share: Callable[[], float],
        device: int = 0,
        devices: int = 1,
        timeout: timedelta = timedelta(minutes=10),
    ) -> None:
        self._store = JobStore(store, timeout)
        self._ahead_store = self._store.clone()
        self._ahead: Thread | None = None  # takes a lease
        self._worker = worker
        self._pace_share = pace_share
        self._device = device
        self._devices = devices
        self._timeout = timeout
        self._leases: dict[int, int] = {}  # number of leases that this worker has taken, by epoch

    def draw(self, epoch: int, left: Sequence[int], comers: Sequence[int]) -> Iterator[int]:
        """This worker's units, one lease after the other."""
        kept = min(len(comers), len(left))
        place = comers.index(self._worker) if self._worker in comers else kept
        take_lease = self._begin_lease(epoch, len(left) - kept)
        if place < kept:
            yield left[place]
        while True:
            start, end = (kept + number for number in take_lease())
            if start >= len(left):
                return
            take_lease = self._begin_lease(epoch, max(0, len(left) - end))
            yield from left[start:end]

    def _begin_lease(self, epoch: int, left: int) -> Callable[[], tuple[int, int]]:
        """Begin to take a lease. Returns a function that waits for it and returns its range of numbers."""
        self._leases[epoch] = self._leases.get(epoch, 0) + 1
        relay = f"{epoch}/{self._worker}/{self._leases[epoch]}"
        if self._device > 0:
            return partial(self._hear, relay)
        size = max(1, min(_MOST_AT_ONCE, int(left * self._pace_share() / 2)))
        lease: Future[tuple[int, int]] = Future()
        # One thread per lease: a permanent one would outlive loaders that are abandoned midway.
        args = (lease, self._lease, f"{epoch}/drawn", size, relay)
        self._ahead = Thread(target=_fulfil, args=args, name="async-localsgd-lease", daemon=True)
        self._ahead.start()
        return lease.result

    def _lease(self, counter: str, size: int, relay: str) -> tuple[int, int]:
        end = self._ahead_store.add(counter, size)
        if self._devices > 1:
            self._ahead_store.set(relay, f"{end - size} {end}")
        return end - size, end

    def _hear(self, relay: str) -> tuple[int, int]:
        if not self._store.wait([relay], self._timeout):
            raise PeerLostError(f"The first process of worker {self._worker} has not shared its lease of batches.")
        start, end = self._store.get(relay).split()
        return int(start), int(end)

    def forget(self, epoch: int) -> None:
        """Delete the store's keys of earlier epochs, except the last, which other devices may still read."""
        for old in [e for e in self._leases if e < epoch - 1]:
            leases = self._leases.pop(old)
            if self._device == 0 and self._devices > 1:
                for lease in range(1, leases + 1):
                    self._store.delete_key(f"{old}/{self._worker}/{lease}")
            if self._device == 0 and self._worker == 0:
                self._store.delete_key(f"{old}/drawn")

    def close(self) -> None:
        """Wait for the thread to end; a store that is alive answers it at once."""
        if self._ahead is not None:
            self._ahead.join(_A_MOMENT)
        self._ahead_store.close()
        self._store.close()


def _fulfil(future: Future[Any], function: Callable[..., Any], *args: Any) -> None:
    try:
        future.set_result(function(*args))
    except Exception as error:
        future.set_exception(error)
