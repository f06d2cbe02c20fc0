"""The default process group of ``torch.distributed`` in ``fit``: the job's, this worker's, or none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import HashStore, PrefixStore, ProcessGroup, ProcessGroupGloo, ReduceOp, Store

from lightning_async_localsgd.membership import StaticJob
from lightning_async_localsgd.membership.address import listening_at
from lightning_async_localsgd.membership.store import connection_to

__all__ = ["NO_GROUP", "Groups", "JobGroup"]

_BACKEND = "async_localsgd"
_SMALL = 1 << 16  # bytes that go through the job's store
NO_GROUP = (
    "`torch.distributed` has no process group while workers train, each at its own pace: one that waited for another "
    "would hold it up. Who this process is say `trainer.global_rank` and `trainer.world_size`. In steps, "
    "`self.log(..., sync_dist=True)` and `self.all_gather` concern this worker alone. From `setup` to "
    "`on_train_start`, in `on_train_end`, and where data sets and loaders are made and read, `torch.distributed` knows "
    "rank and size."
)
_REDUCTIONS: dict[Any, Callable[[Tensor], Tensor]] = {
    ReduceOp.SUM: lambda stacked: stacked.sum(0),
    ReduceOp.AVG: lambda stacked: stacked.sum(0) / len(stacked),
    ReduceOp.PRODUCT: lambda stacked: stacked.prod(0),
    ReduceOp.MIN: lambda stacked: stacked.amin(0),
    ReduceOp.MAX: lambda stacked: stacked.amax(0),
}


class _Done(dist.Work):
    """A completed collective."""

    def wait(self, timeout: timedelta | None = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


class JobGroup(ProcessGroup):
    """A group of the whole job. Rank, size and small collectives need no connections between the processes.

    Args:
        rank: rank of this process.
        size: number of processes.
        connect: makes the n-th gloo group, given n, for larger collectives.
    """

    def __init__(self, rank: int, size: int, connect: Callable[[int], ProcessGroupGloo]) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]  # as torch's own tests call it
        self._connect = connect
        self._gloo: Any = None
        self._connections = 0
        self.job: StaticJob | None = None
        """The processes and their store; None: this process alone."""
        self.closed_by: str | None = None
        """The reason for which collectives are refused now; None: they are not."""

    def getBackendName(self) -> str:  # noqa: N802  # torch calls it by this name
        """The name of the backend, for torch."""
        return _BACKEND

    def meet(self) -> None:
        """Wait for all processes, with an error that names a lost one; gloo's own errors name none.

        Raises:
            RuntimeError: if collectives are refused now.
            AsyncLocalSGDError: if a process does not come; tells why.
        """
        if self.closed_by is not None:
            raise RuntimeError(self.closed_by)
        if self.job is not None:
            self.job.barrier()

    def gloo(self) -> Any:
        """The gloo group, made when all processes have come."""
        self.meet()
        if self._gloo is None:
            with listening_at(self.job.address if self.job is not None else None):
                self._gloo = self._connect(self._connections)
            self._connections += 1
        return self._gloo

    def disconnect(self) -> None:
        """Close the connections, if any. The next collective that needs connections opens new ones."""
        self._gloo = None

    def barrier(self, *args: Any, **kwargs: Any) -> dist.Work:
        """See torch's."""
        self.meet()
        return _Done()

    def allreduce(self, tensors: Sequence[Tensor], opts: Any = None) -> dist.Work:  # type: ignore[override]
        """See torch's. Means go through the store whatever their size, because gloo does not support them."""
        if self.size() == 1:
            return _Done()
        operation = ReduceOp.SUM if opts is None else opts.reduceOp
        reduction = next((r for op, r in _REDUCTIONS.items() if operation == op), None)
        small = sum(tensor.nbytes for tensor in tensors) <= _SMALL or operation == ReduceOp.AVG
        if self.job is None or reduction is None or not small:
            work: dist.Work = self.gloo().allreduce(tensors, *([] if opts is None else [opts]))
            return work
        for tensor in tensors:
            everyones = torch.stack(self._gather(tensor))
            tensor.copy_(reduction(everyones))
        return _Done()

    def allgather(self, outputs: Any, inputs: Any, *opts: Any) -> dist.Work:
        """See torch's."""
        if self.size() > 1:
            work: dist.Work = self.gloo().allgather(outputs, inputs, *opts)
            return work
        for (output,), tensor in zip(outputs, inputs, strict=True):
            output.copy_(tensor)
        return _Done()

    def _gather(self, tensor: Tensor) -> list[Tensor]:
        if self.closed_by is not None:
            raise RuntimeError(self.closed_by)
        assert self.job is not None
        return self.job.gather(tensor.detach().cpu())


def _by_gloo(name: str) -> Callable[..., Any]:
    def collective(self: JobGroup, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.gloo(), name)(*args, **kwargs)

    collective.__name__ = name
    return collective


for _name in (
    *("_allgather_base", "allgather_coalesced", "allgather_into_tensor_coalesced", "allreduce_coalesced"),
    *("alltoall", "alltoall_base", "broadcast", "gather", "monitored_barrier", "recv", "recv_anysource", "reduce"),
    *("_reduce_scatter_base", "reduce_scatter", "reduce_scatter_tensor_coalesced", "scatter", "send"),
):
    setattr(JobGroup, _name, _by_gloo(_name))


def _make(store: Store, rank: int, size: int, timeout: timedelta) -> JobGroup:
    def connect(number: int) -> ProcessGroupGloo:
        """A gloo group under new keys: an earlier group's keys hold addresses that are closed."""
        return ProcessGroupGloo(connection_to(PrefixStore(f"gloo{number}", store)), rank, size, timeout)

    return JobGroup(rank, size, connect)


dist.Backend.register_backend(_BACKEND, _make, devices=["cpu", "cuda"])


def _init(store: Store, rank: int, size: int, timeout: timedelta) -> JobGroup:
    """A group registered with torch, and not the default one."""
    dist.init_process_group(_BACKEND, store=store, rank=rank, world_size=size, timeout=timeout)
    group = dist.group.WORLD
    assert isinstance(group, JobGroup)
    dist.group.WORLD = None
    return group


class Groups:
    """The default process group in the different phases of a ``fit``.

    In step, when all processes make the same calls, it is the job's. Workers that train at their own pace have their
    own, or none with one device: no call of Lightning, torchmetrics or the module can wait for another worker. While
    data sets and loaders are made and read, rank and size are the job's, because data is divided by these; collectives
    are refused meanwhile.

    Args:
        job: the processes.
        worker: the group of this worker's devices; None: it has one device.
    """

    def __init__(self, job: StaticJob, worker: ProcessGroup | None) -> None:
        dist.group.WORLD = None
        self._everyone = _init(PrefixStore("job_group", job.store), job.rank, job.size, job.timeout)
        self._everyone.job = job
        self.worker = worker
        """The group of this worker's devices; None: it has one device."""
        self._alone: ProcessGroup = worker if worker is not None else _init(HashStore(), 0, 1, job.timeout)
        dist.group.WORLD = worker

    def begin_in_step(self) -> None:
        """From now on the default group is the job's."""
        self._everyone.closed_by = None
        dist.group.WORLD = self._everyone

    def begin_out_of_step(self) -> None:
        """From now on the default group is this worker's, or there is none."""
        self._everyone.closed_by = _OUT_OF_STEP
        self._everyone.disconnect()  # processes forked by loaders would keep the connections open
        dist.group.WORLD = self.worker

    @contextmanager
    def of_job(self) -> Iterator[None]:
        """In the body the default group is the job's, for calls of all processes, and for training data."""
        with _default(self._everyone):
            yield

    @contextmanager
    def of_devices(self) -> Iterator[None]:
        """In the body the default group is this worker's, or there is none."""
        with _default(self.worker):
            yield

    @contextmanager
    def of_worker(self) -> Iterator[None]:
        """In the body rank and size are within the worker, also for a single device: for its validation."""
        with _default(self._alone):
            yield

    def end(self) -> None:
        """Remove the default group; the job's stays available for :meth:`of_job`."""
        dist.group.WORLD = None

    def close(self) -> None:
        """Remove all groups from torch."""
        dist.group.WORLD = self._everyone
        dist.destroy_process_group()


@contextmanager
def _default(group: ProcessGroup | None) -> Iterator[None]:
    before, dist.group.WORLD = dist.group.WORLD, group
    try:
        yield
    finally:
        dist.group.WORLD = before


_OUT_OF_STEP = (
    "A collective of `torch.distributed` was called while training data is made or read, which every worker does at "
    "its own pace: the others may never come to it. Rank and size are all that can be asked for here."
)
