"""Which worker trains on which part of the data: leases of an epoch's batches, and shards drawn by progress.

A *unit* is what a worker trains on in one step: a batch of the data, or one batch for each of its devices. Each pass
over the data has a name, alike on all workers, and numbers its units from 0.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed import Store

from lightning_async_localsgd.errors import PeerLostError

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
    :meth:`units` gives what was drawn in vain again, and a checkpoint holds what was trained.
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
    def check_order(self, name: Pass, fingerprint: str) -> None:
        """Make sure that all workers number the units alike.

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

    def check_order(self, name: Pass, fingerprint: str) -> None:
        """Workers may read their shards in any order."""

    def close(self) -> None:
        """There is nothing to let go of."""


class Tickets(Protocol):
    """Numbers the units of each pass, so that every number comes once, to one of the workers."""

    drawn: int
    """How many numbers all workers together have drawn of the current pass, as far as this one knows."""

    def draw(self, name: Pass, total: int, fresh: bool) -> Iterator[int]:
        """This worker's numbers below ``total``; ``fresh``: nobody has trained on any unit of the pass before."""

    def oldest(self, epoch: int) -> int:
        """The epoch of the worker that is furthest behind; this one begins with ``epoch``."""

    def close(self) -> None:
        """Let go of threads and connections."""


class StridedTickets:
    """Every k-th number for each of k workers, for those who make their steps in lockstep.

    Args:
        worker: this worker.
        workers: k.
    """

    def __init__(self, worker: int, workers: int) -> None:
        self.drawn = 0
        self._worker = worker
        self._workers = workers

    def draw(self, name: Pass, total: int, fresh: bool) -> Iterator[int]:
        """This worker's numbers."""
        for number in range(self._worker, total, self._workers):
            self.drawn = min(total, number - self._worker + self._workers)
            yield number

    def oldest(self, epoch: int) -> int:
        """In lockstep nobody is more than an epoch behind."""
        return epoch - 1

    def close(self) -> None:
        """There is nothing to let go of."""


class SharedTickets:
    """Leases of numbers from a counter in the job's store: as many at a time as suit the worker's pace.

    A lease is half of the worker's share of what is left, so leases shrink towards the end of a pass and all workers
    get there together (guided self-scheduling). The next lease is taken, on a thread of its own, when the worker begins
    with one: nobody waits for the network. The first k numbers of a fresh pass belong to the k workers, so that nobody,
    however slow, finds an epoch over before its first batch.

    In a worker of several devices the first takes the leases and the others find them in the store.

    Args:
        store: a part of the job's store, this loader's own.
        worker: this worker.
        workers: k.
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
        workers: int,
        share: Callable[[], float],
        device: int = 0,
        devices: int = 1,
        timeout: timedelta = timedelta(minutes=10),
    ) -> None:
        self.drawn = 0
        self._store = store
        self._ahead_store: Store = store.clone()  # type: ignore[attr-defined]
        self._ahead = ThreadPoolExecutor(1, "async-localsgd-leases")
        self._worker = worker
        self._workers = workers
        self._share = share
        self._device = device
        self._devices = devices
        self._timeout = timeout
        self._leased: dict[Pass, int] = {}  # leases of this worker in each pass

    def draw(self, name: Pass, total: int, fresh: bool) -> Iterator[int]:
        """This worker's numbers, one lease after the other."""
        reserved = min(self._workers, total) if fresh else 0
        self.drawn = reserved
        lease = self._ahead.submit(self._lease, name, self._size(total - reserved))
        if self._worker < reserved:
            yield self._worker
        while True:
            try:
                start, end = lease.result()
            except RuntimeError as error:
                raise PeerLostError(
                    "The job's store, which leases out the batches of an epoch, does not answer: its host, worker 0 or "
                    "the launcher beside it, has died. Look for the cause in its log, then start the job again."
                ) from error
            start, end = start + reserved, min(end + reserved, total)
            self.drawn = min(end, total)
            if start >= total:
                return
            lease = self._ahead.submit(self._lease, name, self._size(total - end))
            yield from range(start, end)

    def _size(self, left: int) -> int:
        return max(1, min(_MOST_AT_ONCE, int(left * self._share() / 2)))

    def _lease(self, name: Pass, size: int) -> tuple[int, int]:
        self._leased[name] = self._leased.get(name, 0) + 1
        relay = f"{_key(name)}/{self._worker}/{self._leased[name]}"
        if self._device > 0:
            self._ahead_store.wait([relay], self._timeout)
            first, last = self._ahead_store.get(relay).decode().split()
            return int(first), int(last)
        end: int = self._ahead_store.add(f"{_key(name)}/drawn", size)
        if self._devices > 1:
            self._ahead_store.set(relay, f"{end - size} {end}")
        return end - size, end

    def oldest(self, epoch: int) -> int:
        """Tell the others, and forget what nobody asks for any more."""
        self._store.set(f"at/{self._worker}", str(epoch))
        others = [key for w in range(self._workers) if self._store.check([key := f"at/{w}"])]
        oldest = min((int(e) for e in self._store.multi_get(others)), default=0) if len(others) == self._workers else 0
        if self._device == 0:
            for name in [name for name in list(self._leased) if name[0] < oldest]:
                for lease in range(1, self._leased.pop(name) + 1 if self._devices > 1 else 1):
                    self._store.delete_key(f"{_key(name)}/{self._worker}/{lease}")
                if self._worker == 0:
                    self._store.delete_key(f"{_key(name)}/drawn")
        return oldest

    def close(self) -> None:
        """End the thread."""
        self._ahead.shutdown(wait=False, cancel_futures=True)


class Leases(Division):
    """Workers draw units as they need them, so that each unit of a pass is drawn exactly once whatever their speeds.

    Args:
        tickets: who gets which unit.
        workers: number of workers.
        store: a part of the job's store, this loader's own.
    """

    def __init__(self, tickets: Tickets, workers: int, store: Store) -> None:
        self.tickets = tickets
        self.limit: int | None = None
        """At most that many units make a pass."""
        self.workers = workers
        self._store = store
        self._compared: list[Pass] = []
        self._drawing: tuple[Pass, Iterator[int]] | None = None
        self._drawn: list[int] = []  # of that pass, not trained yet
        self._over: Pass | None = None
        self._trained: dict[Pass, Tensor] = {}
        self._before: dict[Pass, Tensor] = {}  # by all workers, in what this run goes on from

    def length(self, total: int) -> int:
        """A worker's part, if all were equal."""
        return -(-total // self.workers)

    def position(self, total: int) -> float:
        """How much of the current pass is drawn, from 0 to 1."""
        return self.tickets.drawn / max(1, self._limited(total))

    def _limited(self, total: int) -> int:
        return total if self.limit is None else min(total, self.limit)

    def units(self, name: Pass, total: int) -> Iterator[int]:
        """What was drawn in vain, then leases until the pass is over."""
        if self._drawing is None or self._drawing[0] != name:
            self._begin(name, self._limited(total))
        assert self._drawing is not None
        yield from list(self._drawn)
        for unit in self._drawing[1]:
            self._drawn.append(unit)
            yield unit
        self._over = name

    def _begin(self, name: Pass, total: int) -> None:
        oldest = self.tickets.oldest(name[0])
        for masks in (self._trained, self._before):
            for old in [n for n in masks if n[0] < oldest]:
                del masks[old]
        for old in [n for n in self._compared if n[0] < oldest]:
            self._compared.remove(old)
            self._store.delete_key(f"order/{_key(old)}")
        before = self._before.get(name)
        if before is not None and len(before) != total:
            warnings.warn(
                f"The checkpoint knows {len(before)} batches of this epoch, and there are {total} now: which of them "
                "were trained cannot be told, and the epoch begins anew.",
                stacklevel=2,
            )
            before = None
        self._trained.setdefault(name, torch.zeros(total, dtype=torch.bool))
        # Where this worker's part was over when the checkpoint was written, it is so now.
        numbers: Iterable[int] = self.tickets.draw(name, total, before is None) if name != self._over else ()
        self._drawing = name, (number for number in numbers if before is None or not before[number])
        self._drawn = []

    def trained(self, name: Pass, unit: int) -> None:
        """Mark the unit."""
        self._trained[name][unit] = True
        if self._drawing is not None and self._drawing[0] == name:
            self._drawn.remove(unit)

    def state_dict(self) -> dict[str, Any]:
        """What this worker has trained on, by pass, and what all had before."""
        masks = {name: mask.clone() for name, mask in self._trained.items()}
        for name, before in self._before.items():
            masks[name] = masks[name] | before if name in masks and len(masks[name]) == len(before) else before
        over = self._over if self._drawing is not None and self._over == self._drawing[0] and not self._drawn else None
        return {"trained": {_key(name): mask for name, mask in masks.items()}, "over": over}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Leave out what was trained."""
        self._before = {_pass(key): mask for key, mask in state_dict.get("trained", {}).items()}
        self._over = tuple(state_dict["over"]) if state_dict.get("over") is not None else None

    def check_order(self, name: Pass, fingerprint: str) -> None:
        """Compare with the worker that came first, through the job's store."""
        self._compared.append(name)
        if self._store.compare_set(f"order/{_key(name)}", "", fingerprint).decode() != fingerprint:
            raise ValueError(
                "The training data is in another order on this worker than on the others, and not every sample would "
                "be seen once per epoch. Give your sampler the same seed everywhere; or pass "
                "`Trainer(use_distributed_sampler=False)` and divide the data by `trainer.global_rank` yourself."
            )

    def close(self) -> None:
        """End the tickets."""
        self.tickets.close()


def merge_positions(states: Sequence[Mapping[str, Any]], own: int) -> dict[str, Any]:
    """Where a worker goes on, from where all were.

    Args:
        states: ``Division.state_dict()`` of every worker.
        own: the worker in whose place it goes on.
    """
    merged = dict(states[own])
    trained: dict[str, Tensor] = {}
    for key, mask in [item for state in states for item in state.get("trained", {}).items()]:
        trained[key] = trained[key] | mask if key in trained and len(trained[key]) == len(mask) else mask
    return merged | {"trained": trained} if "trained" in merged else merged


def _key(name: Pass) -> str:
    return f"{name[0]}.{name[1]}"


def _pass(key: str) -> Pass:
    epoch, earlier = key.split(".")
    return int(epoch), int(earlier)
