"""The bell: wakes every worker's exchange thread when one of them opens a turn, so that none of them polls."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

from torch.distributed import DistStoreError

from lightning_async_localsgd.errors import PeerLostError
from lightning_async_localsgd.membership import JobStore
from lightning_async_localsgd.membership.store import connection_to

__all__ = ["Bell"]

_A_DAY = timedelta(days=1)


class Bell:
    """One store key per turn, and a thread that sleeps in the store until the next one is set.

    ``ring`` and ``clear`` belong to the exchange thread; the listener thread blocks on a connection of its own.

    Args:
        store: the run's part of the job's store.
        on_ring: called on the listener thread with the number of the turn that was opened.
        on_lost: called on the listener thread with the error when the store is gone. (One that does not answer is
            noticed by whoever waits for a bell that it has rung.)
    """

    def __init__(
        self,
        store: JobStore,
        on_ring: Callable[[int], None],
        on_lost: Callable[[Exception], None],
    ) -> None:
        self._store = store.within("bell")
        self._on_ring = on_ring
        self._on_lost = on_lost
        self._closed = False
        self._turn = 0
        self._thread = threading.Thread(target=self._listen, name="async-localsgd-bell", daemon=True)

    def start(self) -> None:
        """Begin to listen for turn 0."""
        self._thread.start()

    def ring(self, turn: int) -> None:
        """Open ``turn``. Ringing twice is the same as once."""
        self._store.set(str(turn), "1")

    def clear(self, turn: int) -> None:
        """Forget a turn that every worker has heard, so that the store does not grow."""
        self._store.delete_key(str(turn))

    def close(self) -> None:
        """Stop listening. The listener is woken by a turn that will not take place."""
        self._closed = True
        if self._thread.is_alive():
            try:
                self.ring(self._turn)
            except PeerLostError:
                return  # the store is gone, and the listener with it
            self._thread.join(timeout=1)

    def _listen(self) -> None:
        """Sleep in the store itself: its wait costs nothing and ends at once, as looking again and again does not."""
        try:
            store = connection_to(self._store.native)
            while not self._closed:
                with suppress(DistStoreError):  # a day without a turn
                    store.wait([str(self._turn)], _A_DAY)
                    if not self._closed:
                        self._on_ring(self._turn)
                        self._turn += 1
        except RuntimeError as error:
            if not self._closed:
                self._on_lost(error)
