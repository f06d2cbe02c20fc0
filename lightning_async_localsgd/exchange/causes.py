"""Why a run ends: the first error that any worker met, written to the job's store, where all find it.

When one worker is lost, the others lose each other a moment later: whoever has waited in vain closes its connections.
All are to raise the same error, about the worker that was lost and not about a messenger.
"""

from __future__ import annotations

import json
from datetime import timedelta

from torch.distributed import Store

from lightning_async_localsgd.errors import AsyncLocalSGDError, PeerAbortedError, PeerLostError, error_by_name
from lightning_async_localsgd.membership import JobStore, Roster

__all__ = ["LOOK_UP", "Causes"]

_STORE = timedelta(seconds=2)  # for an answer of the store
_SILENT = timedelta(seconds=2)  # for the word of a worker that has not answered in time
_GONE = timedelta(seconds=1)  # for that of one that has closed its connections, and had said it before
LOOK_UP = 4 * _STORE.total_seconds()
"""Seconds that finding a cause takes at the most, as a rule."""


class Causes:
    """One worker's view of the causes in the store. Belongs to one thread.

    Args:
        store: the run's part of the job's store.
        roster: who takes part.
        timeout: how long a worker may take to answer.
    """

    def __init__(self, store: Store, roster: Roster, timeout: timedelta) -> None:
        self._store = JobStore(store, min(timeout, _STORE))
        self._roster = roster
        self._timeout = timeout

    def first(self, error: BaseException) -> BaseException:
        """The error to raise here: the first that any worker met. Unless there was one, the others will find this one.

        Whatever goes wrong in the look-up, ``error`` is better than nothing.

        Args:
            error: what this worker has met.
        """
        try:
            return self._first(error)
        except PeerLostError as store_error:
            return self._without_store(error, store_error)
        except Exception:
            return error

    def _first(self, error: BaseException) -> BaseException:
        suspect = error.suspect if isinstance(error, PeerLostError) else None
        if suspect is not None:
            self._store.set(f"waits-for/{self._roster.rank}", str(suspect))
            if not self._store.check(["cause"]):
                error = self._find_silent(error, suspect)
        own = error if isinstance(error, AsyncLocalSGDError) else self.stopped(error)
        written = self._store.compare_set("cause", "", json.dumps([type(own).__name__, str(own)]))
        kind, text = json.loads(written)
        if not isinstance(error, AsyncLocalSGDError) or text == str(own):
            return error
        return error_by_name(kind, text) or error

    def stopped(self, error: BaseException) -> PeerAbortedError:
        """What the others are to raise because of an error of this worker's own."""
        reason = ": ".join(filter(None, (type(error).__name__, str(error))))
        return PeerAbortedError(f"{self._roster.name(self._roster.rank)} stopped: {reason}")

    def _find_silent(self, error: BaseException, suspect: int) -> BaseException:
        """Follow the chain of workers that wait for one another to the one that says nothing at all.

        When a wait has been in vain, gloo closes all connections of that worker, before it can say for whom it waited.
        """
        limit = _SILENT if getattr(error, "silent", None) is not None else _GONE
        chain, worker = [self._roster.rank], suspect
        while worker not in chain:
            chain.append(worker)
            key = f"waits-for/{worker}"
            if not self._store.wait([key], min(limit, self._timeout)):
                break
            worker = int(self._store.get(key))
        return error if worker == suspect else self._roster.silence(worker, self._timeout)

    def _without_store(self, error: BaseException, store_error: PeerLostError) -> BaseException:
        """Whoever is only known to have left may have done so because of the store's host, which does not answer."""
        if not isinstance(error, PeerLostError) or error.suspect in (None, 0):
            return error
        return self._roster.store_lost(store_error, error)
