"""Division of each pass over the data among the workers, and shards that each worker walks through at its own pace.

A *unit* is what a worker trains on in one step: a batch of the data, or one batch for each of its devices. Each pass
over the data has a name, alike on all workers, and numbers its units from 0.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

__all__ = [
    "Division",
    "Pass",
    "Shards",
    "merge_positions",
]

Pass = tuple[int, int]
"""A pass over the data: its epoch, and how many passes of the same epoch came before (a short loader beside a long one
is begun anew)."""


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
