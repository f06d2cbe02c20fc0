"""A worker: counts its local steps, pushes a delta at the end of each round, adopts new global parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.distributed import Store
from torch.optim import Optimizer

from lightning_async_localsgd.exchange import ExchangeThread, Mailbox
from lightning_async_localsgd.protocol.budget import Budget
from lightning_async_localsgd.settings import Settings
from lightning_async_localsgd.worker.base import BaseWorker
from lightning_async_localsgd.worker.connections import Connections

__all__ = ["Worker"]


class Worker(BaseWorker):
    """One replica of a module in an asynchronous Local-SGD run. Needs neither Lightning nor a default process group.

    The training thread owns the module and this object. Between :meth:`start` and :meth:`finish` it calls
    :meth:`step` after every local step, until that returns False::

        worker = Worker(module, [optimizer], store, rank, size, Settings(local_steps=50))
        worker.start(max_steps=1000)
        running = True
        while running:
            loss(module, next(batches)).backward()
            optimizer.step()
            optimizer.zero_grad()
            running = worker.step(samples=32)
        summary = worker.finish()

    Args:
        module: the module to train, on its device. Its trainable parameters and float buffers are overwritten with
            those of worker 0.
        optimizers: its inner optimizers. Their state stays on this worker.
        store: a store of ``torch.distributed`` that all workers share, used by this run alone.
        rank: this worker.
        size: number of workers.
        settings: settings of the run.
        fingerprint: further JSON values, by name, that must be equal on all workers.

    Raises:
        ValueError: if the settings are impossible for ``size`` workers, or nothing in the module is trainable.
        WorkerMismatchError: if the workers were started with different models, settings or library versions.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizers: Sequence[Optimizer],
        store: Store,
        rank: int,
        size: int,
        settings: Settings,
        fingerprint: Mapping[str, Any] | None = None,
    ) -> None:
        settings.check_workers(size)
        self._make_model(module, optimizers, size, settings)
        self._connections = Connections(store, rank, size, self._model.layout, settings, fingerprint or {})
        self._model.take_from_leader(self._connections)
        self._trades = self._connections.make_trades(self._state, self._model.feedbacks)
        self._take_rank(rank, size)

    def start(self, max_steps: int | None = None, open_end: bool = False) -> None:
        """See :meth:`BaseWorker.start`."""
        budget = Budget(max_steps, self.size, self.settings.shares_budget(self.size), open_end)
        progress = self.saved_state.start(budget)
        self._rounds.start(progress, max_steps, open_end)
        mailbox, links = Mailbox(progress, self.rank), self._connections
        exchange = ExchangeThread(
            mailbox, self._state, self._trades, links.transport, links.store, links.roster, self.settings, budget
        )
        self._begin(mailbox, exchange, links.roster.name(self.rank))

    def _become_global(self) -> None:
        self._model.become_global(self._connections)
        self._connections.close()
