"""The model on one worker: its own replica, and its copy of the global state."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import nn
from torch.optim import Optimizer

from lightning_async_localsgd.codecs import ErrorFeedback
from lightning_async_localsgd.settings import Settings
from lightning_async_localsgd.worker.connections import Connections
from lightning_async_localsgd.worker.replica import Replica

__all__ = ["WorkerModel"]


class WorkerModel:
    """Makes the replica and the global state of a worker, which are the same on all workers before and after a run.

    Args:
        module: the module, on its device.
        optimizers: its inner optimizers.
        size: number of workers.
        settings: settings of the run.

    Raises:
        ValueError: if nothing in the module is trainable.
    """

    def __init__(self, module: nn.Module, optimizers: Sequence[Optimizer], size: int, settings: Settings) -> None:
        self.layout = settings.layout(module)
        """The layout of the exchanged tensors in a flat vector."""
        self.replica = Replica(
            module, optimizers, self.layout, settings.weight_copies, settings.constraint, settings.local_share
        )
        """This worker's own tensors, in the module."""
        self.state = settings.global_model(self.layout, size)
        """The global parameters and the outer optimizer."""
        self.feedbacks = [ErrorFeedback(part.numel, self.state.flat.device) for part in self.layout.fragments]
        """Errors of the codec, of each fragment, which its next delta of this worker makes up for."""

    def take_from_leader(self, connections: Connections) -> None:
        """Take worker 0's tensors before the run, and begin from them."""
        replica = self.replica
        named = dict(zip((slot.name for slot in self.layout.slots), replica.in_module, strict=True))
        with replica.copies.moving_along():
            connections.broadcast(named | replica.others)
        odd = self.state.begin(replica.in_module)
        if odd:
            warnings.warn(
                f"{', '.join(map(repr, odd))} have elements that are not finite. These stay as they are and are not "
                "exchanged; if they are no mask, look at how the parameters are initialized.",
                stacklevel=3,
            )

    def become_global(self, connections: Connections) -> None:
        """Put the final global parameters into the module after the run, and worker 0's tensors that are its own."""
        with self.replica.copies.moving_along():
            self.replica.load(self.state.flat)
        connections.broadcast(self.replica.others)
