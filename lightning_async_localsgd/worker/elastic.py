"""A worker of a run whose workers come and go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_async_localsgd.exchange import Mailbox
from lightning_async_localsgd.exchange.elastic import ElasticExchange
from lightning_async_localsgd.exchange.elastic_turns import ElasticTurns
from lightning_async_localsgd.membership.elastic import Lighthouse, worker_name
from lightning_async_localsgd.outer import GlobalState
from lightning_async_localsgd.protocol.accounts import Accounts
from lightning_async_localsgd.protocol.budget import Budget
from lightning_async_localsgd.protocol.header import PROTOCOL
from lightning_async_localsgd.protocol.machine import Reason
from lightning_async_localsgd.protocol.progress import Progress
from lightning_async_localsgd.settings import Settings
from lightning_async_localsgd.worker.base import BaseWorker
from lightning_async_localsgd.worker.summary import RunSummary

__all__ = ["ElasticWorker"]


class ElasticWorker(BaseWorker):
    """A worker that finds the others by a Lighthouse, and goes on when some of them are lost or others come.

    :meth:`start` takes over what the others hold, the module's parameters included, or begins a run with those that are
    there. Everything else is as with a :class:`~lightning_async_localsgd.Worker`; a run is over for all at once.

    Args:
        module: the module to train, on its device.
        optimizers: its inner optimizers. Their state stays on this worker.
        lighthouse: where the workers of the job find each other.
        settings: settings of the run.
        name: the name of this worker, which it keeps after a restart; None: that of the environment, or one of its own.
        address: the address at which the others reach this process; None: found out by the route to the Lighthouse.
        fingerprint: further JSON values, by name, that must be equal on all workers.

    Raises:
        ValueError: if nothing in the module is trainable, or the settings ask for workers that all stay to the end.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizers: Sequence[Optimizer],
        lighthouse: Lighthouse,
        settings: Settings,
        name: str | None = None,
        address: str | None = None,
        fingerprint: Mapping[str, Any] | None = None,
    ) -> None:
        if settings.budget != "shared":
            raise ValueError(
                "`budget='per_worker'` needs workers that stay to the end, and these come and go. "
                "Leave `budget` at 'shared'."
            )
        self.name = name or worker_name()
        self._lighthouse = lighthouse
        self._address = address or lighthouse.own_address()
        self._make_model(module, optimizers, 1, settings)
        self._fingerprint = {"protocol": PROTOCOL, "torch": torch.__version__.split("+")[0]}
        self._fingerprint |= settings.fingerprint() | dict(fingerprint or {})
        self._fingerprint |= {"model": list(self._model.layout.describe())}
        if any(group.get("momentum_activation") for state in self._state.fragments for group in _open_groups(state)):
            raise ValueError(
                "`momentum_activation` may be at most 1 over the length of the buffer, which is the number of workers, "
                "and that may grow. Pass a `buffer_size`."
            )
        self._take_rank(0, 1)
        self._books = Accounts()

    def start(self, max_steps: int | None = None, open_end: bool = False) -> None:
        """Find the others, take over what they hold or begin a run with them, and start the first round.

        Args:
            max_steps: local steps per worker that the run is planned for: ``max_workers``, or those that it begins
                with. All together make that many times ``max_steps``, however many there are meanwhile. None: until
                :meth:`step` is no longer called.
            open_end: ``max_steps`` is only what is expected.

        Raises:
            PeerLostError: if the others, or the Lighthouse, are not found within the timeout.
            WorkerMismatchError: if this worker was started with another model, other settings or another version.
        """
        model, replica = self._model, self._replica
        mailbox = Mailbox(Progress.at_start(1, self.settings.round_length(max_steps).first()))
        self._state.begin(replica.in_module)
        lighthouse, settings = self._lighthouse, self.settings
        turns = ElasticTurns(
            mailbox,
            self._state,
            model.feedbacks,
            settings,
            Budget(max_steps, lighthouse.max_workers or 1, True, open_end),
            lighthouse.max_workers,
            self._fingerprint | {"max_steps": max_steps},
            lambda: replica.others,
        )
        exchange = ElasticExchange(lighthouse, self.name, self._address, mailbox, turns, settings.timeout)
        exchange.come()
        self._books = exchange.turns.books
        try:
            self._take_rank(exchange.turns.number, exchange.turns.planned_workers)
            with replica.copies.moving_along():
                replica.load(self._state.flat)
            self._rounds.start(mailbox.progress, max_steps, open_end)
            self._rounds.reference_turn = mailbox.progress.reference_turn
            self._rounds.shard %= self.size
            self._begin(mailbox, exchange, f"Worker {self.name}")
        except BaseException as error:
            exchange.abort(error)
            raise

    @property
    def leads(self) -> bool:
        """Whether this worker is the first of those that are there, as of the latest view."""
        return self.rank == self._books.leader

    @property
    def present(self) -> list[bool]:
        """Whether each worker is there that ever was, by number."""
        return self._books.present

    def leave(self) -> RunSummary:
        """End this worker's part alone: push what it has not pushed, and go when that is applied. The others go on.

        Returns:
            The run in numbers, as of now.

        Raises:
            PeerLostError: if no other worker is found within the timeout.
        """
        assert isinstance(self._exchange, ElasticExchange)
        trip = self._steps.trip
        while self._replica.in_flight or self._rounds.unsent_fragments > 0:
            if not self._replica.in_flight:
                trip.push()
            trip.wait_for_adoption()
            self._after_wait(Reason.ADOPTION)
        self._exchange.leave()
        self._become_global()
        return self.summary()

    def _become_global(self) -> None:
        with self._mailbox.global_state(), self._replica.copies.moving_along():
            self._replica.load(self._state.flat)


def _open_groups(state: GlobalState) -> list[dict[str, Any]]:
    """Parameter groups of the outer optimizer whose buffer is as long as there are workers."""
    return [state.optimizer.param_groups[i] for i in getattr(state.optimizer, "left_open", ())]
