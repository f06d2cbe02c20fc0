"""Static membership: the fixed set of processes that torchrun, SLURM or Lightning started."""

from __future__ import annotations

import atexit
import json
import os
import sys
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any

from torch.distributed import PrefixStore, Store

from lightning_async_localsgd.errors import AsyncLocalSGDError
from lightning_async_localsgd.membership.attempt import agree
from lightning_async_localsgd.membership.pulse import Phase, Pulse, Watch
from lightning_async_localsgd.membership.store import JobStore, connect
from lightning_async_localsgd.membership.values import as_json, from_json

__all__ = ["StaticJob", "join_job"]

_SLICE = timedelta(seconds=1)  # of a wait, between two checks of the missing processes
_LAST_WORDS = timedelta(seconds=3)


class StaticJob:
    """The processes of one launch and their common store.

    Every process goes through the same stages (a fit, a validation) in the same order. Each stage has a part of the
    store of its own, so that keys left over from one stage are not read in another.

    A wait for a process lasts as long as that process shows signs of life (see
    :class:`~lightning_async_localsgd.membership.pulse.Pulse`): it may prepare data or validate for longer than
    ``timeout``.

    Args:
        store: a store that all processes share, and no other job.
        rank: rank of this process.
        size: number of processes.
        timeout: maximum time without a sign of life of a process, or an answer of the store.
        hosts_store: whether the store ends with this process.
        worker_size: number of processes of a worker, for the names in messages.
        address: the address at which this process is to listen for others; None: gloo's choice.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        timeout: timedelta,
        hosts_store: bool = False,
        worker_size: int = 1,
        address: str | None = None,
    ) -> None:
        self.address = address
        self.rank = rank
        self.size = size
        self.worker_size = worker_size
        self.store = store
        """The stage's part of the store, for groups of ``torch.distributed``."""
        self.calls = JobStore(store, timeout)
        """The same part with bounded calls, for the thread that owns this object."""
        self._everything = JobStore(store, timeout)
        self._hosts_store = hosts_store
        self._pulse = Pulse(self._everything, rank)
        self._stage = -1
        self._messages = 0

    @property
    def timeout(self) -> timedelta:
        """Maximum time without a sign of life of a process, or an answer of the store."""
        return self._everything.timeout

    def set_timeout(self, timeout: timedelta) -> None:
        """Set the timeout, from the next stage on."""
        self._everything.timeout = timeout
        self._pulse.set_timeout(timeout)

    def next_stage(self) -> Store:
        """Go on to the next stage. Returns its part of the store, which is ``store`` from now on."""
        self._stage += 1
        self._messages = 0
        self.store = PrefixStore(f"stage{self._stage}", self._everything.native)
        self.calls = JobStore(self.store, self.timeout)
        self._pulse.publish(self._stage, Phase.HERE)
        return self.store

    # ---- meetings ---------------------------------------------------------------------------------------------------

    def barrier(self) -> None:
        """Wait until every process has called this.

        Raises:
            AsyncLocalSGDError: if a process does not come; tells why.
        """
        key = self._next_key("barrier")
        self.calls.set(f"{key}/{self.rank}", "1")
        self.wait_for({rank: f"{key}/{rank}" for rank in range(self.size)})

    def broadcast(self, value: Any, root: int = 0, key: str | None = None) -> Any:
        """Process ``root``'s ``value`` on every process.

        Args:
            value: on ``root``, a value that :func:`~lightning_async_localsgd.membership.values.as_json` takes; ignored
                on other processes.
            root: rank of the sender.
            key: name of the message in this stage; None: its number, so that all processes must make the same calls in
                the same order.

        Raises:
            TypeError: on every process, if ``value`` is or holds something else. Nothing is pickled.
            AsyncLocalSGDError: if ``root`` does not come; tells why.
        """
        key = key or self._next_key("broadcast")
        if self.rank == root:
            self.tell(key, value)
            return value
        self.wait_for({root: key})
        return self.hear(key)

    def gather(self, value: Any) -> list[Any]:
        """The ``value`` of each process, by rank. All processes must call this, in the same order as other calls.

        Args:
            value: a value that :func:`~lightning_async_localsgd.membership.values.as_json` takes.

        Raises:
            AsyncLocalSGDError: if a process does not come; tells why.
        """
        key = self._next_key("gather")
        self.tell(f"{key}/{self.rank}", value)
        keys = {rank: f"{key}/{rank}" for rank in range(self.size)}
        self.wait_for(keys)
        return [self.hear(key) for key in keys.values()]

    def wait_for(self, keys: Mapping[int, str]) -> None:
        """Wait until each process has set its key in this stage's part of the store.

        Raises:
            AsyncLocalSGDError: if a process will not set it; tells why.
        """
        watch = self._watch()
        while not self._come(keys):
            missing = self._missing(keys)
            try:
                watch.check(missing)
            except AsyncLocalSGDError:
                if self._missing(keys) == missing:  # else one has set its key and left in between
                    raise

    def tell(self, key: str, value: Any) -> None:
        """Set a key to a value. If the value cannot be sent, set the key to the reason and raise the error."""
        try:
            word = json.dumps({"value": as_json(value)})
        except TypeError as error:
            self.calls.set(key, json.dumps({"error": str(error)}))
            raise
        self.calls.set(key, word)

    def hear(self, key: str) -> Any:
        """The value of a key; raises the error if the sender has set one."""
        word = json.loads(self.calls.get(key))
        if "error" in word:
            raise TypeError(word["error"])
        return from_json(word["value"])

    def wait_for_living(self, keys: Mapping[int, str], timeout: timedelta = timedelta.max) -> dict[int, Exception]:
        """Wait until each process has set its key, except for processes that will not.

        Args:
            keys: the key of each process, in this stage's part of the store.
            timeout: maximum time to wait.

        Returns:
            The error of each process that will not set its key, by process.

        Raises:
            PeerLostError: if the store does not answer.
        """
        waiting, lost = dict(keys), dict[int, Exception]()
        watch, end = self._watch(), time.monotonic() + timeout.total_seconds()
        while waiting and not self._come(waiting) and time.monotonic() < end:
            errors = {rank: watch.find(rank) for rank in self._missing(waiting)}
            missing = self._missing(waiting)  # without those that have set their keys and left in between
            lost |= {rank: error for rank in missing if (error := errors[rank]) is not None}
            waiting = {rank: waiting[rank] for rank in missing if rank not in lost}
        return lost

    # ---- the end ----------------------------------------------------------------------------------------------------

    def leave(self) -> None:
        """Release this stage's store. The process that hosts it waits until all processes have released it."""
        try:
            self._go(Phase.LEFT)
            lost = self.wait_for_living(self._gone) if self._hosts_store else {}
        except AsyncLocalSGDError as error:
            lost = {0: error}
        for reason in lost.values():  # a process that has failed says so in its own log
            warnings.warn(f"The run is over, but not all workers have left it. {reason}", stacklevel=2)

    def fail(self, error: BaseException) -> None:
        """Publish that this process has failed, and why, for processes that wait for it; at most once in a stage.

        If it hosts the store, wait a while until all have read it.
        """
        if self._stage < 0 or self._pulse.phase is not Phase.HERE:
            return
        with suppress(AsyncLocalSGDError):  # without a store there is no way to publish it
            self._go(Phase.FAILED, error)
            if self._hosts_store:
                self.wait_for_living(self._gone, _LAST_WORDS)

    def _go(self, phase: Phase, error: BaseException | None = None) -> None:
        self._pulse.publish(self._stage, phase, error)
        self.calls.set(f"gone/{self.rank}", "1")

    @property
    def _gone(self) -> dict[int, str]:
        return {rank: f"gone/{rank}" for rank in range(self.size)}

    def _watch(self) -> Watch:
        return Watch(self._everything, self._stage, self.size, self.worker_size, self.timeout)

    def _come(self, keys: Mapping[int, str]) -> bool:
        """Wait briefly for keys. Returns whether all exist."""
        return self.calls.wait(list(keys.values()), min(_SLICE, self.timeout / 4))

    def _missing(self, keys: Mapping[int, str]) -> list[int]:
        return [rank for rank, key in keys.items() if not self.calls.check([key])]

    def _next_key(self, kind: str) -> str:
        if self._pulse.phase is Phase.LEFT:  # a meeting after a `fit`, for example, is a stage of its own
            self.next_stage()
        self._messages += 1
        return f"{kind}{self._messages}"


_jobs: dict[tuple[int, int], StaticJob] = {}


def join_job(rank: int, size: int, timeout: timedelta, worker_size: int = 1) -> StaticJob:
    """Join the other processes at ``MASTER_ADDR:MASTER_PORT``, once per process: later calls return the same job.

    Under torchrun the store is the agent's; elsewhere process 0 hosts it, for as long as it lives.

    Args:
        rank: rank of this process.
        size: number of processes.
        timeout: maximum time to wait for the others.
        worker_size: number of processes of a worker, for the names in messages.

    Raises:
        PeerLostError: if the others cannot be reached within ``timeout``.
    """
    if (rank, size) not in _jobs:
        agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        hosts_store = rank == 0 and not agents
        store = PrefixStore(f"async_localsgd/{size}", connect(hosts_store, timeout))
        attempt = agree(JobStore(store, timeout), rank, size, timeout)
        own = PrefixStore(attempt.name, store)
        address = attempt.addresses[rank]
        _jobs[rank, size] = StaticJob(own, rank, size, timeout, hosts_store, worker_size, address)
        atexit.register(_say_goodbye, _jobs[rank, size], os.getpid())
    job = _jobs[rank, size]
    job.set_timeout(timeout)
    job.worker_size = worker_size
    return job


def _say_goodbye(job: StaticJob, process: int) -> None:
    """Publish the end of the process, because others may wait for it."""
    if os.getpid() == process:  # not in one that was forked from it
        reason = getattr(sys, "last_value", None)  # an uncaught exception
        job.fail(reason if reason is not None else SystemExit("its process has ended"))
