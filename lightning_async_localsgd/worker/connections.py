"""The connections of a worker: how it meets the other workers of a run, and shares tensors before and after it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed import Store

from lightning_async_localsgd.errors import PeerLostError
from lightning_async_localsgd.exchange import GlooTransport
from lightning_async_localsgd.exchange.causes import Causes
from lightning_async_localsgd.exchange.share import share
from lightning_async_localsgd.membership import Roster
from lightning_async_localsgd.outer.layout import Layout
from lightning_async_localsgd.protocol.header import PROTOCOL
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
        credentials: further JSON values, by name, that must be equal on all workers.

    Raises:
        WorkerMismatchError: if the workers were started with different models, settings or library versions.
    """

    def __init__(
        self, store: Store, rank: int, size: int, layout: Layout, settings: Settings, credentials: Mapping[str, Any]
    ) -> None:
        self.store = store
        self.roster = Roster.introduce(
            store,
            rank,
            size,
            {"protocol": PROTOCOL, "torch": torch.__version__.split("+")[0]}
            | settings.credentials()
            | dict(credentials)
            | {"model": list(layout.describe())},
            settings.timeout,
        )
        self.transport = GlooTransport(store, self.roster, settings.timeout)
        self._rank = rank
        self._size = size
        self._timeout = settings.timeout

    def share(self, tensors: Mapping[str, Tensor]) -> None:
        """Give all workers worker 0's values.

        Raises:
            PeerLostError: if a worker is lost. It names the lost one, also to a worker that waits for a third one.
        """
        try:
            share(self.transport, tensors, self._rank, self._size)
        except PeerLostError as error:
            raise Causes(self.store, self.roster, self._timeout).first(error) from None

    def close(self) -> None:
        """Give up the connections."""
        self.transport.close()
