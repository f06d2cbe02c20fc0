"""The global model as a worker shows it in training: copied, swapped into the module, held still for a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from lightning_async_localsgd.exchange import Mailbox
from lightning_async_localsgd.outer import GlobalModel
from lightning_async_localsgd.protocol.messages import Cut
from lightning_async_localsgd.worker.replica import Replica
from lightning_async_localsgd.worker.round_trip import RoundTrip

__all__ = ["GlobalView"]


class GlobalView:
    """Gives the training thread the global model, which the exchange thread moves. The training thread owns it.

    Args:
        state: the global state.
        replica: the worker's replica.
        mailbox: where the worker's two threads meet.
        trip: adopts new global parameters.
    """

    def __init__(self, state: GlobalModel, replica: Replica, mailbox: Mailbox, trip: RoundTrip) -> None:
        self._state = state
        self._replica = replica
        self._mailbox = mailbox
        self._trip = trip
        self._swapped_for_cut = False

    def tensors(self) -> dict[str, Tensor]:
        """Copies of the global parameters and buffers of now, by name, on the CPU."""
        with self._mailbox.global_state():
            return self._state.tensors()

    def swap_in(self, for_cut: bool) -> None:
        """Put the global parameters and buffers of now into the module, and the worker's own aside.

        Args:
            for_cut: they become those of the next :meth:`hold`.
        """
        self._swapped_for_cut = for_cut
        self._replica.stash_local()
        self._swap_in_latest()

    def _swap_in_latest(self) -> None:
        with self._mailbox.global_state():
            self._replica.swap_in_global(self._state.flat)

    @contextmanager
    def hold(self, what: Cut) -> Iterator[None]:
        """Have the exchange of all workers stand still in the body.

        Args:
            what: what the other workers are to do meanwhile.
        """
        try:
            self._mailbox.send(what)
            self._mailbox.wait_for_cut()
            self._trip.adopt_if_ready()
            if self._replica.global_swapped_in and self._swapped_for_cut:  # an update may have come since
                self._swap_in_latest()
            yield
        finally:
            self._mailbox.release()

    def handle_cut(self, on_cut: Callable[[Cut], None]) -> None:
        """If another worker has the exchange stand still, do what it asks for, and let the exchange go on."""
        what = self._mailbox.cut
        if what is None:
            return
        try:
            self._trip.adopt_if_ready()  # it comes with the turn that carried the cut
            on_cut(what)
        finally:
            self._mailbox.release()
