"""The roster: the workers of a run, after their hosts and settings have been exchanged and compared."""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from torch.distributed import Store

from lightning_async_localsgd.errors import PeerLostError, WorkerMismatchError
from lightning_async_localsgd.membership.address import Route, choose_addresses, route_to
from lightning_async_localsgd.membership.store import JobStore

__all__ = ["Roster"]


class Roster:
    """The workers of a run, by rank.

    Args:
        rank: rank of this worker.
        hosts: the host name of each worker.
        addresses: the address at which each worker listens; None: gloo's choice.
        numbers: the number of each worker in the run, where workers come and go; None: its rank.
        names: what each worker is called; None: its number.
    """

    def __init__(
        self,
        rank: int,
        hosts: Sequence[str],
        addresses: Sequence[str | None] | None = None,
        numbers: Sequence[int] | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        self.rank = rank
        self.hosts = list(hosts)
        self.addresses = list(addresses) if addresses is not None else [None] * len(self.hosts)
        self.numbers = list(numbers) if numbers is not None else list(range(len(self.hosts)))
        self._names = list(names) if names is not None else list(map(str, self.numbers))

    @property
    def number(self) -> int:
        """The number of this worker in the run."""
        return self.numbers[self.rank]

    def ranks_of(self, numbers: Sequence[int]) -> list[int]:
        """The ranks of these workers, in rising order."""
        return sorted(self.numbers.index(number) for number in numbers)

    @property
    def size(self) -> int:
        """Number of workers."""
        return len(self.hosts)

    def name(self, worker: int) -> str:
        """The name of a worker in messages, by its rank: what it is called, and its host."""
        return f"Worker {self._names[worker]} (host {self.hosts[worker]})"

    def silence(self, worker: int, timeout: timedelta) -> PeerLostError:
        """The error about a worker that has not answered."""
        return PeerLostError(
            f"{self.name(worker)} did not answer within {timeout.total_seconds():g} s. It froze, or the network to it "
            "failed; raise `timeout` if it is only slow.",
            silent=worker,
        )

    def store_lost(self, error: BaseException, met: PeerLostError | None = None) -> PeerLostError:
        """The error about a job's store that is gone or does not answer.

        Args:
            error: the error of the store's client.
            met: an error noticed before, if any: probably a consequence.
        """
        lost = PeerLostError(
            f"The job's store does not answer: its host, {self.name(0)} or the launcher beside it, has died or froze, "
            "or the network to it failed. Look for the cause in its log, then start the job again."
            + (f" Noticed before: {met}" if met is not None else "")
        )
        lost.__cause__ = error
        return lost

    @classmethod
    def introduce(
        cls, store: Store, rank: int, size: int, fingerprint: Mapping[str, Any], timeout: timedelta
    ) -> Roster:
        """Exchange and compare the workers' hosts and fingerprint.

        Args:
            store: the run's part of the job's store.
            rank: rank of this worker.
            size: number of workers.
            fingerprint: values that must be equal on all workers: name to JSON value.
            timeout: maximum time to wait for the others.

        Raises:
            PeerLostError: if some workers do not come within ``timeout``.
            WorkerMismatchError: on every worker, if the fingerprint of two differ; names the difference.
        """
        text = json.dumps(dict(fingerprint), sort_keys=True)
        digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        greeting = {"host": socket.gethostname(), "route": route_to(store), "fingerprint": digest}
        calls = JobStore(store, timeout)
        calls.set(f"hello/{rank}", json.dumps(greeting))
        keys = [f"hello/{r}" for r in range(size)]
        _wait_for(calls, dict(enumerate(keys)), timeout)
        greetings = [json.loads(calls.get(key)) for key in keys]
        addresses = choose_addresses([Route(*g["route"]) for g in greetings])
        roster = cls(rank, [g["host"] for g in greetings], addresses)
        digests = [g["fingerprint"] for g in greetings]
        odd = next((worker for worker in range(size) if digests[worker] != digests[0]), None)
        if odd is not None:
            raise WorkerMismatchError(
                f"{roster.name(0)} and {roster.name(odd)} were started differently: "
                f"{_find_difference(calls, rank, text, odd, timeout)}. "
                "Start all workers with the same code, model and settings."
            )
        return roster


def _find_difference(calls: JobStore, rank: int, text: str, odd: int, timeout: timedelta) -> str:
    """The difference between the fingerprint of worker 0 and of ``odd``: both publish theirs, and all compare them."""
    keys = {worker: f"fingerprint/{worker}" for worker in (0, odd)}
    if rank in keys:
        calls.set(keys[rank], text)
    _wait_for(calls, keys, timeout)
    return _difference(*(json.loads(calls.get(key)) for key in keys.values()))


def _wait_for(calls: JobStore, keys: Mapping[int, str], timeout: timedelta) -> None:
    if calls.wait(list(keys.values()), timeout):
        return
    missing = [worker for worker, key in keys.items() if not calls.check([key])]
    raise PeerLostError(
        f"Worker {', '.join(map(str, missing))} of {len(keys)} did not come within {timeout.total_seconds():g} s. "
        "It failed or was not started: look at its log, or raise `timeout`."
    )


def _difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    for name in sorted(ours.keys() | theirs.keys()):
        a, b = ours.get(name), theirs.get(name)
        if a == b:
            continue
        if isinstance(a, list) and isinstance(b, list):
            if len(a) != len(b):
                extra = sorted(set(a) ^ set(b))
                return f"`{name}` has {len(a)} entries against {len(b)}, first difference {extra[:1]}"
            a, b = next((x, y) for x, y in zip(a, b, strict=True) if x != y)
        return f"`{name}` is {a!r} against {b!r}"
    return ""
