"""Division of each pass over the data among the workers, and shards that each worker walks through at its own pace.

A *unit* is the data of one step of a worker: one batch, or one batch for each of its devices. Each pass over the data
has a name, which is the same on all workers, and numbers its units from 0.
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
"""A pass over the data: its epoch, and the number of earlier passes in the same epoch (a short loader beside a long one
starts again)."""


class Division(ABC):
    """Divides the units of each pass over the data among the workers, and records the units this worker has trained on.

    A drawn unit is trained on later (loaders draw ahead), or never (the job dies, or a loader starts again). So
    :meth:`units` yields drawn units without a step again, and a checkpoint holds the trained units. One object serves
    all loaders that follow each other in the same place.
    """

    @abstractmethod
    def length(self, total: int) -> int:
        """Mean number of units per worker in a pass of ``total`` units."""

    @abstractmethod
    def units(self, name: Pass, total: int) -> Iterator[int]:
        """This worker's units of the pass, from 0 to ``total`` - 1; the rest of them if the pass has begun."""

    @abstractmethod
    def trained(self, name: Pass, unit: int) -> None:
        """Record that this worker has trained on a unit. Units are trained in the order in which they were drawn."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """The position of this worker in the data."""

    @abstractmethod
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore a position; see :func:`merge_positions`."""

    @abstractmethod
    def check_order(self, name: Pass, batches: Sequence[Any]) -> None:
        """Make sure that all workers number the units alike.

        Args:
            name: the pass.
            batches: all batches of the pass, as lists of indices.

        Raises:
            ValueError: if the numbering differs between workers.
        """

    @abstractmethod
    def close(self) -> None:
        """Release threads and connections."""


class Shards(Division):
    """Each worker reads from the shard that its current round has drawn, in passes of its own.

    Shard ``s`` of ``k`` is every k-th unit from the s-th on. Worker ``w`` enters each shard at w/k of its length and
    later continues at its last position there. Workers that read the same order at different speeds thus seldom read
    the same unit in the same pass. A pass has as many units as a shard.

    Args:
        worker: rank of this worker.
        workers: k, the number of workers and of shards.
        current_shard: returns the shard that the worker's current round has drawn.
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
        """As many units as a shard has, each from the current shard."""
        sizes = [len(range(s, total, self._workers)) for s in range(self._workers)]
        if name != self._pass:
            self._pass, self._cursors = name, [0] * self._workers
        cursors = list(self._cursors)
        for _ in range(self.length(total) - sum(cursors)):
            # With fewer units than workers some shards are empty: shard 0 stands in for them.
            s = self._current_shard() if sizes[self._current_shard()] else 0
            position = sizes[s] * self._worker // self._workers + cursors[s]
            cursors[s] += 1
            yield s + position % sizes[s] * self._workers

    def trained(self, name: Pass, unit: int) -> None:
        """Advance the position in the unit's shard."""
        if name == self._pass:
            self._cursors[unit % self._workers] += 1

    def state_dict(self) -> dict[str, Any]:
        """Number of units read from each shard in the current pass."""
        return {"pass": self._pass, "cursors": list(self._cursors)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on in the same pass; with another number of workers, in a new one."""
        if len(state_dict.get("cursors", ())) == self._workers:
            self._pass, self._cursors = tuple(state_dict["pass"]), list(state_dict["cursors"])

    def check_order(self, name: Pass, batches: Sequence[Any]) -> None:
        """Workers may read their shards in any order."""

    def close(self) -> None:
        """Do nothing: there is nothing to release."""


def merge_positions(states: Sequence[Mapping[str, Any]], own: int) -> dict[str, Any]:
    """The position from which a worker continues, computed from the positions of all workers.

    Args:
        states: ``Division.state_dict()`` of every worker.
        own: rank of the worker that continues.
    """
    merged = dict(states[own])
    if not all("trained" in state for state in states):
        return merged
    trained: dict[int, Tensor] = {}
    for epoch, mask in [item for state in states for item in state["trained"].items()]:
        trained[epoch] = trained[epoch] | mask if epoch in trained and len(trained[epoch]) == len(mask) else mask
    return merged | {"trained": trained, "over": [over for state in states for over in state["over"]]}
