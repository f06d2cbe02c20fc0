"""Static membership: the fixed set of processes that torchrun, SLURM or Lightning started."""

from __future__ import annotations

import json
import os
import warnings
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import PrefixStore, Store

from lightning_async_localsgd.errors import PeerLostError
from lightning_async_localsgd.membership.roster import wait_for
from lightning_async_localsgd.membership.values import as_json, from_json

__all__ = ["StaticJob", "join_job"]


class StaticJob:
    """The processes of one launch, and the store through which they find each other.

    Every process goes through the same stages (a fit, a validation) in the same order; each stage gets a part of the
    store of its own, so that nothing left over from one can be taken for another's.

    Args:
        store: a store that all processes share.
        rank: this process.
        size: number of processes.
        timeout: how long to wait for the others.
        hosts_store: whether the store is gone when this process ends.
    """

    def __init__(self, store: Store, rank: int, size: int, timeout: timedelta, hosts_store: bool = False) -> None:
        self._store = store
        self._hosts_store = hosts_store
        self.rank = rank
        self.size = size
        self.timeout = timeout
        self._stage = -1
        self._messages = 0
        self.store = store

    def next_stage(self) -> Store:
        """Go on to the next stage; returns its part of the store, also found as ``store`` from now on."""
        self._stage += 1
        self._messages = 0
        self.store = PrefixStore(f"stage{self._stage}", self._store)
        return self.store

    def barrier(self) -> None:
        """Wait until every process is here.

        Raises:
            PeerLostError: if some are not within the timeout.
        """
        key = self._next_key("barrier")
        self.store.set(f"{key}/{self.rank}", "1")
        wait_for(self.store, {r: f"{key}/{r}" for r in range(self.size)}, self.timeout)

    def broadcast(self, value: Any, root: int = 0, patient: bool = False, key: str | None = None) -> Any:
        """Worker ``root``'s ``value`` on every process.

        Args:
            value: what :func:`~lightning_async_localsgd.membership.values.as_json` takes; of worker ``root`` alone.
            root: the worker that knows.
            patient: wait as long as it takes, while the store lives.
            key: what the message is called in this stage; None: by its number, so that all must come to it alike.

        Raises:
            TypeError: on every process, if ``value`` is or holds something else. Nothing is pickled.
        """
        key = key or self._next_key("broadcast")
        if self.rank == root:
            self._tell(key, value)
            return value
        while patient and not self._comes(key):
            pass
        wait_for(self.store, {root: key}, self.timeout)
        word = json.loads(self.store.get(key))
        if "error" in word:
            raise TypeError(word["error"])
        return from_json(word["value"])

    def _tell(self, key: str, value: Any) -> None:
        """Set a key to a value; or, before the error is raised here, to why it cannot be sent."""
        try:
            word = json.dumps({"value": as_json(value)})
        except TypeError as error:
            self.store.set(key, json.dumps({"error": str(error)}))
            raise
        self.store.set(key, word)

    def leave(self) -> None:
        """This process needs this stage's store no more. If it hosts it, wait until that is so for all processes."""
        self.store.set(f"left/{self.rank}", "1")
        if not self._hosts_store:
            return
        try:
            wait_for(self.store, {r: f"left/{r}" for r in range(self.size)}, self.timeout)
        except PeerLostError as error:  # it may have failed, which is for its own log to tell
            warnings.warn(f"The run is over, but not all workers have left it. {error}", stacklevel=2)

    def _comes(self, key: str) -> bool:
        try:
            self.store.wait([key], self.timeout)
        except dist.DistStoreError:
            return False
        return True

    def _next_key(self, kind: str) -> str:
        self._messages += 1
        return f"{kind}{self._messages}"


_jobs: dict[tuple[int, int], StaticJob] = {}


def join_job(rank: int, size: int, timeout: timedelta) -> StaticJob:
    """Join the other processes at ``MASTER_ADDR:MASTER_PORT``, once per process: later calls return the same job.

    Under torchrun the store is the agent's; elsewhere process 0 hosts it, for as long as it lives.

    Raises:
        RuntimeError: if the others cannot be reached within ``timeout``.
    """
    if (rank, size) not in _jobs:
        store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=timeout))
        agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        _jobs[rank, size] = StaticJob(store, rank, size, timeout, hosts_store=rank == 0 and not agents)
    job = _jobs[rank, size]
    job.timeout = timeout
    return job
