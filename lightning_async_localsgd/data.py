"""Which worker trains on which part of the data: leases of an epoch's batches, and shards drawn by progress.

A *unit* is what a worker trains on in one step: a batch of the data, or one batch for each of its devices. Each pass
over the data has a name, alike on all workers, and numbers its units from 0.
"""

from __future__ import annotations

import json
import warnings
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from datetime import timedelta
from functools import partial
from threading import Thread
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed import Store

from lightning_async_localsgd.errors import PeerLostError
from lightning_async_localsgd.membership import JobStore

__all__ = [
    "Division",
    "Leases",
    "Pass",
    "Shards",
    "SharedTickets",
    "StridedTickets",
    "Tickets",
    "draw_shard",
    "merge_positions",
    "shard_probabilities",
]

Pass = tuple[int, int]
"""A pass over the data: its epoch, and how many passes of the same epoch came before (a short loader beside a long one
is begun anew)."""
_MOST_AT_ONCE = 64  # units in a lease
_COMPARED = 256  # batches of a pass that workers compare
_A_MOMENT = 5.0  # seconds


def shard_probabilities(sizes: Sequence[int], samples: Sequence[int]) -> list[float]:
    """Probability of each shard: ``p_i ∝ max(|D_i| / Σ|D_j| - n_i / Σ n_j, 0)``.

    Where every shard is exactly as far as its size asks for (also before the first sample), shards are drawn by size.

    Args:
        sizes: samples in each shard, |D_i|.
        samples: samples learned so far from each shard, n_i.

    References:
        Liu et al. 2024 (arXiv 2401.09135), Eq. 2.
    """
    size, learned = sum(sizes), sum(samples)
    shares = [d / size for d in sizes]
    if learned == 0:
        return shares
    lag = [max(share - n / learned, 0.0) for share, n in zip(shares, samples, strict=True)]
    total = sum(lag)
    return [x / total for x in lag] if total > 0 else shares


def draw_shard(sizes: Sequence[int], samples: Sequence[int], generator: torch.Generator) -> int:
    """Draw the shard that a worker trains on in its next round."""
    probabilities = torch.tensor(shard_probabilities(sizes, samples), dtype=torch.float64)
    return int(torch.multinomial(probabilities, 1, generator=generator))


class Division(ABC):
    """Divides the units of each pass over the data among the workers, and knows which ones this worker has made.

    What is drawn is trained later (loaders draw ahead), or never (the job dies, or a loader begins anew). So
    :meth:`units` gives what was drawn in vain again, and a checkpoint holds what was trained. One object serves all
    loaders that come one after the other in the same place.
    """

    @abstractmethod
    def length(self, total: int) -> int:
        """Units per worker of a pass with ``total``, on average."""

    @abstractmethod
    def units(self, name: Pass, total: int) -> Iterator[int]:
        """This worker's units, from 0 to ``total`` - 1, of the pass; from where it is, if it has begun with it."""

    @abstractmethod
    def trained(self, name: Pass, unit: int) -> None:
        """Note that this worker has trained on a unit. Units are trained in the order in which they were drawn."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Where this worker is."""

    @abstractmethod
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from there; see :func:`merge_positions`."""

    @abstractmethod
    def check_order(self, name: Pass, batches: Sequence[Any]) -> None:
        """Make sure that all workers number the units alike.

        Args:
            name: the pass.
            batches: all of its batches, as lists of indices.

        Raises:
            ValueError: if they do not.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of threads and connections."""


class Shards(Division):
    """Each worker reads from whichever shard its current round has drawn, in passes of its own.

    Shard ``s`` of ``k`` is every k-th unit from the s-th on. Worker ``w`` enters each shard at w/k of its length and
    goes on from where it left it, so that workers who walk the same order at different speeds seldom meet the same unit
    in the same pass. A pass has as many units as a shard.

    Args:
        worker: this worker.
        workers: k, the number of workers and of shards.
        current_shard: tells the shard that the worker's current round has drawn.
    """

    def __init__(self, worker: int, workers: int, current_shard: Callable[[], int]) -> None:
        self._worker = worker
        self._workers = workers
        self._current_shard = current_shard
        self._pass: Pass | None = None
        self._cursors: list[int] = []

    def length(self, total: int) -> int:
        """Units of a shard."""
        return -(-total // self._workers)

    def units(self, name: Pass, total: int) -> Iterator[int]:
        """One shard's length of units, each from the shard of the moment."""
        sizes = [len(range(s, total, self._workers)) for s in range(self._workers)]
        if name != self._pass:
            self._pass, self._cursors = name, [0] * self._workers
        cursors = list(self._cursors)
        for _ in range(self.length(total) - sum(cursors)):
            # Data with fewer units than there are workers leaves shards empty: their units come from shard 0.
            s = self._current_shard() if sizes[self._current_shard()] else 0
            position = sizes[s] * self._worker // self._workers + cursors[s]
            cursors[s] += 1
            yield s + position % sizes[s] * self._workers

    def trained(self, name: Pass, unit: int) -> None:
        """Move on in the unit's shard."""
        if name == self._pass:
            self._cursors[unit % self._workers] += 1

    def state_dict(self) -> dict[str, Any]:
        """Units read from each shard in the current pass."""
        return {"pass": self._pass, "cursors": list(self._cursors)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on in the same pass; with another number of workers, in a new one."""
        if len(state_dict.get("cursors", ())) == self._workers:
            self._pass, self._cursors = tuple(state_dict["pass"]), list(state_dict["cursors"])

    def check_order(self, name: Pass, batches: Sequence[Any]) -> None:
        """Workers may read their shards in any order."""

    def close(self) -> None:
        """There is nothing to let go of."""


class Tickets(Protocol):
    """Who gets which unit of an epoch, so that each goes to one of the workers."""

    def draw(self, epoch: int, left: Sequence[int], comers: Sequence[int]) -> Iterator[int]:
        """This worker's units among those that are ``left``; ``comers`` are the workers that draw of them."""

    def forget(self, epoch: int) -> None:
        """Nobody will draw of earlier epochs any more."""

    def close(self) -> None:
        """Let go of threads and connections."""


class StridedTickets:
    """Every k-th unit for each of k workers, for those who make their steps in lockstep.

    Args:
        worker: this worker.
        workers: k.
    """

    def __init__(self, worker: int, workers: int) -> None:
        self._worker = worker
        self._workers = workers

    def draw(self, epoch: int, left: Sequence[int], comers: Sequence[int]) -> Iterator[int]:
        """This worker's units."""
        yield from (unit for unit in left if unit % self._workers == self._worker)

    def forget(self, epoch: int) -> None:
        """There is nothing to forget."""

    def close(self) -> None:
        """There is nothing to let go of."""


class SharedTickets:
    """Leases of units from a counter in the job's store: as many at a time as suit the worker's pace.

    A lease is half of the worker's share of what is left, so leases shrink towards the end of an epoch and all workers
    get there together (guided self-scheduling). The next lease is taken, on a thread of its own, when the worker begins
    with one: nobody waits for it. The first units belong to the workers, one to each, so that nobody, however slow,
    finds an epoch over before its first batch.

    In a worker of several devices the first takes the leases and the others find them in the store.

    Args:
        store: a part of the job's store, this loader's own.
        worker: this worker.
        share: this worker's share of the pace of all, in (0, 1].
        device: rank of this process within its worker.
        devices: processes of the worker.
        timeout: how long to wait for the first process of the worker.

    References:
        Polychronopoulos and Kuck 1987, Guided Self-Scheduling.
    """

    def __init__(
        self,
        store: Store,
        worker: int,
        share: Callable[[], float],
        device: int = 0,
        devices: int = 1,
        timeout: timedelta = timedelta(minutes=10),
    ) -> None:
        self._store = JobStore(store, timeout)
        self._ahead_store = self._store.clone()
        self._ahead: Thread | None = None  # takes a lease
        self._worker = worker
        self._share = share
        self._device = device
        self._devices = devices
        self._timeout = timeout
        self._leases: dict[int, int] = {}  # how many this worker has taken of each epoch

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
        """Begin to take a lease; returns what waits for it. It is a range of numbers."""
        self._leases[epoch] = self._leases.get(epoch, 0) + 1
        relay = f"{epoch}/{self._worker}/{self._leases[epoch]}"
        if self._device > 0:
            return partial(self._hear, relay)
        size = max(1, min(_MOST_AT_ONCE, int(left * self._share() / 2)))
        lease: Future[tuple[int, int]] = Future()
        # A thread for each: one that waits for the next lease would outlive the loaders that are given up midway.
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
        """Delete what the store holds of earlier epochs, but for the last, which other devices may still look up."""
        for old in [e for e in self._leases if e < epoch - 1]:
            leases = self._leases.pop(old)
            if self._device == 0 and self._devices > 1:
                for lease in range(1, leases + 1):
                    self._store.delete_key(f"{old}/{self._worker}/{lease}")
            if self._device == 0 and self._worker == 0:
                self._store.delete_key(f"{old}/drawn")

    def close(self) -> None:
        """End the thread, which a store that is alive answers at once."""
        if self._ahead is not None:
            self._ahead.join(_A_MOMENT)
        self._ahead_store.close()
        self._store.close()


def _fulfil(future: Future[Any], function: Callable[..., Any], *args: Any) -> None:
    try:
        future.set_result(function(*args))
    except Exception as error:
        future.set_exception(error)


class Leases(Division):
    """Workers draw units as they need them, so that each unit of an epoch is drawn exactly once whatever their speeds.

    Further passes within an epoch are a worker's own, and through all of the data.

    Args:
        tickets: who gets which unit.
        worker: this worker.
        workers: number of workers.
        store: a part of the job's store, this loader's own.
        store: a part of the job's store, this loader's own.
        timeout: how long the store may give no answer.
        local_steps: tells this worker's local steps.
    """

    def __init__(
        self,
        tickets: Tickets,
        worker: int,
        workers: int,
        store: Store,
        timeout: timedelta = timedelta(minutes=10),
        local_steps: Callable[[], int] = int,
    ) -> None:
        self.limit: int | None = None
        """At most that many units make an epoch."""
        self.workers = workers
        self.begun: list[tuple[int, int]] = []
        """The epoch that each worker was in when this one began with its own, and its local steps as it began with it.
        Empty while some worker had not begun at all."""
        self._tickets = tickets
        self._local_steps = local_steps
        self._worker = worker
        self._store = JobStore(store, timeout)
        self._pass: Pass | None = None
        self._drawing: Iterator[int] = iter(())
        self._drawn: list[int] = []  # not trained yet
        self._over: int | None = None  # the last epoch of which this worker has nothing more to draw
        self._trained: dict[int, Tensor] = {}  # by this worker, by epoch
        self._before: dict[int, Tensor] = {}  # by all workers, in what this run goes on from
        self._over_before: list[int | None] = [None] * workers

    def length(self, total: int) -> int:
        """A worker's part, if all were equal."""
        return -(-total // self.workers)

    def trained_before(self, epoch: int) -> int:
        """Units of an epoch that all workers together had trained in what this run goes on from."""
        return int(self._before[epoch].sum()) if epoch in self._before else 0

    def _limited(self, total: int) -> int:
        return total if self.limit is None else min(total, self.limit)

    def units(self, name: Pass, total: int) -> Iterator[int]:
        """What was drawn in vain, then leases until the epoch is over."""
        epoch, earlier = name
        if name != self._pass:
            self._pass, self._drawn = name, []
            if earlier == 0:
                self._drawing = self._begin(epoch, self._limited(total))
            else:
                first = total * self._worker // self.workers
                self._drawing = iter([*range(first, total), *range(first)])
        yield from list(self._drawn)
        for unit in self._drawing:
            self._drawn.append(unit)
            yield unit
        if earlier == 0:
            self._over = epoch

    def _begin(self, epoch: int, total: int) -> Iterator[int]:
        self._forget(epoch)
        before = self._before.get(epoch)
        if before is not None and len(before) != total:
            warnings.warn(
                f"The checkpoint knows {len(before)} batches of this epoch, and there are {total} now: which of them "
                "were trained cannot be told, and the epoch begins anew.",
                stacklevel=2,
            )
            del self._before[epoch]
        self._trained.setdefault(epoch, torch.zeros(total, dtype=torch.bool))
        left: Sequence[int] = range(total)
        if epoch in self._before:
            left = self._before[epoch].logical_not().nonzero().flatten().tolist()
        # Whose part was over when the checkpoint was written, for it is so now.
        comers = [worker for worker, over in enumerate(self._over_before) if over is None or over < epoch]
        return self._tickets.draw(epoch, left, comers) if self._worker in comers else iter(())

    def _forget(self, epoch: int) -> None:
        """Tell the others that this worker begins with an epoch, and forget those that all are through with."""
        at = [f"at/{worker}" for worker in range(self.workers)]
        self._store.set(at[self._worker], f"{epoch} {self._local_steps()}")
        if not self._store.check(at):
            return
        others = [other.split() for other in self._store.multi_get(at)]
        self.begun = [(int(other), int(steps)) for other, steps in others]
        oldest = min(other for other, _ in self.begun)
        for masks in (self._trained, self._before):
            for old in [e for e in masks if e < oldest]:
                del masks[old]
                self._store.delete_key(f"order/{old}")
        self._tickets.forget(oldest)

    def trained(self, name: Pass, unit: int) -> None:
        """Mark the unit."""
        epoch, earlier = name
        if earlier == 0 and epoch in self._trained:
            self._trained[epoch][unit] = True
        if name == self._pass:
            self._drawn.remove(unit)

    def state_dict(self) -> dict[str, Any]:
        """What this worker has trained on, by epoch, and what all had before."""
        masks = dict(self._before)
        for epoch, mask in self._trained.items():
            masks[epoch] = masks[epoch] | mask if epoch in masks else mask.clone()
        over = self._over
        if over is not None and self._pass == (over, 0) and self._drawn:
            over -= 1  # drawn ahead: it will be over when that is trained
        return {"trained": masks, "over": [over]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Leave out what was trained."""
        if "trained" not in state_dict:
            return
        self._before = dict(state_dict["trained"])
        over = state_dict["over"]
        if len(over) == self.workers:
            self._over_before, self._over = list(over), over[self._worker]

    def check_order(self, name: Pass, batches: Sequence[Any]) -> None:
        """Compare with the worker that came first, through the job's store."""
        if name[1] > 0:
            return
        own = _describe_order(batches)
        first = json.loads(self._store.compare_set(f"order/{name[0]}", "", json.dumps(own)))
        if first == own:
            return
        if first["samples"] != own["samples"]:
            differs = (
                f"is cut into batches of another size on this worker: {own['batches']} batches, the largest of "
                f"{own['samples']} samples, against {first['batches']} and {first['samples']}. Give your loader the "
                "same `batch_size` everywhere"
            )
        elif first["batches"] != own["batches"]:
            differs = (
                f"has {own['batches']} batches on this worker and {first['batches']} on another one. Give all the same "
                "data"
            )
        else:
            differs = "is in another order on this worker than on others. Give your sampler the same seed everywhere"
        raise ValueError(
            f"The training data {differs}: each batch of an epoch goes to one worker, by its number, and not every "
            "sample would be seen once per epoch. Or pass `Trainer(use_distributed_sampler=False)` and divide the data "
            "by `trainer.global_rank` yourself."
        )

    def close(self) -> None:
        """End the tickets, and the thread of the store."""
        self._tickets.close()
        self._store.close()


def _describe_order(batches: Sequence[Any]) -> dict[str, int]:
    """What tells two orders of the batches of a pass apart."""
    compared = batches[:: max(1, len(batches) // _COMPARED)]
    sizes = [len(batch) for batch in compared if isinstance(batch, (list, tuple))]
    return {
        "batches": len(batches),
        "samples": max(sizes, default=1),
        "order": zlib.crc32(repr(compared).encode()),
    }


def merge_positions(states: Sequence[Mapping[str, Any]], own: int) -> dict[str, Any]:
    """Where a worker goes on, from where all were.

    Args:
        states: ``Division.state_dict()`` of every worker.
        own: the worker in whose place it goes on.
    """
    merged = dict(states[own])
    if not all("trained" in state for state in states):
        return merged
    trained: dict[int, Tensor] = {}
    for epoch, mask in [item for state in states for item in state["trained"].items()]:
        trained[epoch] = trained[epoch] | mask if epoch in trained and len(trained[epoch]) == len(mask) else mask
    return merged | {"trained": trained, "over": [over for state in states for over in state["over"]]}
