"""Leases: every unit of an epoch is drawn by exactly one worker, whatever the workers' speeds."""

from __future__ import annotations

import json
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import Store

from lightning_async_localsgd.data.division import Division, Pass
from lightning_async_localsgd.data.tickets import Tickets
from lightning_async_localsgd.membership import JobStore

__all__ = ["Leases"]

_COMPARED = 256  # batches of a pass that workers compare


class Leases(Division):
    """Workers draw units as they need them. Each unit of an epoch is drawn exactly once, whatever the workers' speeds.

    Further passes within an epoch are each worker's own, over all of the data.

    Args:
        tickets: assigns units to workers.
        worker: rank of this worker.
        workers: number of workers.
        store: a part of the job's store, this loader's own.
        timeout: maximum time for an answer of the store.
        local_steps: returns the number of this worker's local steps.
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
        """Maximum number of units of an epoch."""
        self.workers = workers
        self.begun: list[tuple[int, int]] = []
        """The epoch of each worker when this worker began its own, and its local steps at the start of that epoch.
        Empty if some worker had not begun."""
        self._tickets = tickets
        self._local_steps = local_steps
        self._worker = worker
        self._store = JobStore(store, timeout)
        self._pass: Pass | None = None
        self._drawing: Iterator[int] = iter(())
        self._drawn: list[int] = []  # not trained yet
        self._over: int | None = None  # the last epoch that this worker has drawn to its end
        self._trained: dict[int, Tensor] = {}  # by epoch: the units trained by this worker
        self._before: dict[int, Tensor] = {}  # by epoch: the units trained by all workers, in the resumed checkpoint
        self._over_before: list[int | None] = [None] * workers

    def length(self, total: int) -> int:
        """Number of units of a worker if all workers were equally fast."""
        return -(-total // self.workers)

    def trained_before(self, epoch: int) -> int:
        """Number of units of an epoch that all workers together had trained in the resumed checkpoint."""
        return int(self._before[epoch].sum()) if epoch in self._before else 0

    def _limited(self, total: int) -> int:
        return total if self.limit is None else min(total, self.limit)

    def units(self, name: Pass, total: int) -> Iterator[int]:
        """Units drawn without a step, then leases until the end of the epoch."""
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
        # A worker that was at the end of the epoch in the checkpoint is still there.
        comers = [worker for worker, over in enumerate(self._over_before) if over is None or over < epoch]
        return self._tickets.draw(epoch, left, comers) if self._worker in comers else iter(())

    def _forget(self, epoch: int) -> None:
        """Tell the others that this worker begins with an epoch, and forget those that nobody goes back to."""
        at = [f"at/{worker}" for worker in range(self.workers)]
        self._store.set(at[self._worker], f"{epoch} {self._local_steps()}")
        if not self._store.check(at):
            return
        others = [other.split() for other in self._store.multi_get(at)]
        self.begun = [(int(other), int(steps)) for other, steps in others]
        oldest = min(other for other, _ in self.begun)
        # Worker 0 may have saved its shard of a checkpoint in the epoch before. This worker saves its own after a step.
        for masks in (self._trained, self._before):
            for old in [e for e in masks if e < oldest - 1]:
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
        """Units trained by this worker, by epoch, and units trained by all workers before."""
        masks = dict(self._before)
        for epoch, mask in self._trained.items():
            masks[epoch] = masks[epoch] | mask if epoch in masks else mask.clone()
        over = self._over
        if over is not None and self._pass == (over, 0) and self._drawn:
            over -= 1  # drawn ahead: the epoch ends when these units are trained
        return {"trained": masks, "over": [over]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Leave out the units that were trained."""
        if "trained" not in state_dict:
            return
        self._before = dict(state_dict["trained"])
        over = state_dict["over"]
        if len(over) == self.workers:
            self._over_before, self._over = list(over), over[self._worker]

    def check_order(self, name: Pass, batches: Sequence[Any]) -> None:
        """Compare the order with the first worker's, through the job's store."""
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
    """A fingerprint of the order of the batches of a pass."""
    compared = batches[:: max(1, len(batches) // _COMPARED)]
    sizes = [len(batch) for batch in compared if isinstance(batch, (list, tuple))]
    return {
        "batches": len(batches),
        "samples": max(sizes, default=1),
        "order": zlib.crc32(repr(compared).encode()),
    }
