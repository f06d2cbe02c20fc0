"""The connections of a worker: how it meets the other workers of a run, and broadcasts tensors before and after it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed import Store

from lightning_async_localsgd.codecs import ErrorFeedback
from lightning_async_localsgd.errors import PeerLostError
from lightning_async_localsgd.exchange import GlooTransport, Transport
from lightning_async_localsgd.exchange.broadcast import broadcast
from lightning_async_localsgd.exchange.causes import Causes
from lightning_async_localsgd.exchange.links import measure_links
from lightning_async_localsgd.exchange.trade import Gather, Reduce, Trade
from lightning_async_localsgd.membership import Roster
from lightning_async_localsgd.outer import GlobalModel
from lightning_async_localsgd.outer.layout import Layout
from lightning_async_localsgd.protocol.header import PROTOCOL
from lightning_async_localsgd.protocol.slices import slice_shares
from lightning_async_localsgd.settings import Settings

__all__ = ["Connections"]


class Connections:
    """Connects a worker with the others, once all are found to train the same model in the same way.

    Args:
        store: a store that all workers share, used by this run alone.
        rank: this worker.
        size: number of workers.
        layout: the layout of the model.
        settings: settings of the run.
        fingerprint: further JSON values, by name, that must be equal on all workers.

    Raises:
        WorkerMismatchError: if the workers were started with different models, settings or library versions.
    """

    def __init__(
        self, store: Store, rank: int, size: int, layout: Layout, settings: Settings, fingerprint: Mapping[str, Any]
    ) -> None:
        self.store = store
        self.roster = Roster.introduce(
            store,
            rank,
            size,
            {"protocol": PROTOCOL, "torch": torch.__version__.split("+")[0]}
            | settings.fingerprint()
            | dict(fingerprint)
            | {"model": list(layout.describe())},
            settings.timeout,
        )
        self.transport: Transport = GlooTransport(store, self.roster, settings.timeout)
        self._rank = rank
        self._size = size
        self._timeout = settings.timeout

    def broadcast(self, tensors: Mapping[str, Tensor]) -> None:
        """Give all workers worker 0's values.

        Raises:
            PeerLostError: if a worker is lost. It names the lost one, also to a worker that waits for a third one.
        """
        with self._naming_the_lost():
            broadcast(self.transport, tensors, self._rank, self._size)

    def make_trades(self, state: GlobalModel, feedbacks: Sequence[ErrorFeedback]) -> list[Trade]:
        """Make what brings the workers' deltas of each fragment together; for that all measure their links.

        Args:
            state: the global state.
            feedbacks: take up the errors of the codec, for each fragment.

        Raises:
            PeerLostError: see :meth:`broadcast`.
        """
        targets = [(part.pseudo_gradient, part.layout.parameter_numel) for part in state.fragments]
        if not state.sums:
            return [Gather(self.transport, self._rank, *t, f) for t, f in zip(targets, feedbacks, strict=True)]
        with self._naming_the_lost():
            links = measure_links(self.transport, self._rank, self._size, 4 * state.flat.numel())
        shares = slice_shares(links)
        trades = [Reduce(self.transport, self._rank, *t, f, shares) for t, f in zip(targets, feedbacks, strict=True)]
        self.transport.let_trail(trades[0].trailing)
        return list(trades)

    @contextmanager
    def _naming_the_lost(self) -> Iterator[None]:
        try:
            yield
        except PeerLostError as error:
            raise Causes(self.store, self.roster, self._timeout).first(error) from None

    def close(self) -> None:
        """Give up the connections."""
        self.transport.close()
