"""The module after ``fit``: what worker 0's callbacks have made of the global one, on every process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore, ProcessGroupGloo
from typing_extensions import override

from lightning_async_localsgd.errors import PeerLostError
from lightning_async_localsgd.membership import StaticJob

__all__ = ["FinalModule"]


class FinalModule(pl.Callback):
    """Gives every process the module that worker 0 has ended with, if that is not the global one any more.

    Callbacks that average weights (EMA, SWA) write their average into the module when training ends, and each worker
    has averaged parameters of its own. The strategy attaches this one at the end of ``fit``; it acts in its
    ``teardown``, after all ``on_fit_end``, and leaves the trainer. Where nothing was changed, one short message is all
    it costs.

    Args:
        job: the processes.
        holds_global: whether worker 0's module still holds the global parameters; called on worker 0 alone.
    """

    def __init__(self, job: StaticJob, holds_global: Callable[[], bool]) -> None:
        self._job = job
        self._holds_global = holds_global

    def attach(self, trainer: pl.Trainer) -> None:
        """Act at the end of this ``fit``."""
        _set_callbacks(trainer, [*_callbacks(trainer), self])

    def give_up(self) -> None:
        """This process has failed: nobody is to wait for it."""
        self._say(self._job.rank, None if self._job.rank == 0 else ["it has failed"])

    def _say(self, rank: int, value: list[str] | None) -> Any:
        """What process ``rank`` says, on every process: worker 0 its tensors if they go to all, the others problems."""
        return self._job.broadcast(value, rank, patient=True, key=f"final_module/{rank}")

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._leave(trainer)
        changed = list(_describe(pl_module)) if self._job.rank == 0 and not self._holds_global() else None
        theirs = self._say(0, changed)
        if theirs is None:
            return
        differences = sorted({*_describe(pl_module)} ^ {*theirs})
        for rank in range(1, self._job.size):
            if problem := self._say(rank, differences):
                raise RuntimeError(
                    "A callback has changed the module of worker 0 at the end of `fit` (to an average of weights?), "
                    f"and process {rank} cannot take it over: {', '.join(problem)}. Change the module alike everywhere."
                )
        self._copy_from_leader(pl_module)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._leave(trainer)
        self.give_up()

    def _leave(self, trainer: pl.Trainer) -> None:
        # A list of its own, for Lightning is walking through the old one.
        _set_callbacks(trainer, [c for c in _callbacks(trainer) if c is not self])

    @torch.no_grad()
    def _copy_from_leader(self, module: nn.Module) -> None:
        """All parameters and buffers, one after the other, so that memory does not grow with the model."""
        try:
            group: Any = ProcessGroupGloo(
                PrefixStore("final_module", self._job.store), self._job.rank, self._job.size, self._job.timeout
            )
            options = dist.BroadcastOptions()
            options.rootRank = options.rootTensor = 0
            for _, tensor in _tensors(module):
                wire = tensor.detach().to("cpu").contiguous().view(-1)
                group.broadcast([wire.view(torch.uint8)], options).wait()
                tensor.copy_(wire.view(tensor.shape))
        except RuntimeError as error:
            raise PeerLostError(
                "A process was lost while all were given the final module of worker 0, which a callback has changed "
                f"(an average of weights?): {error}. Look for the cause in the other processes' logs. The last "
                "checkpoint is whole.",
            ) from error


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.numel() > 0:
            yield name, tensor


def _describe(module: nn.Module) -> Iterator[str]:
    for name, tensor in _tensors(module):
        yield f"{name}: {str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _callbacks(trainer: pl.Trainer) -> list[pl.Callback]:
    return trainer.callbacks  # type: ignore[attr-defined]  # set by a connector, where mypy does not look


def _set_callbacks(trainer: pl.Trainer, callbacks: list[pl.Callback]) -> None:
    trainer.callbacks = callbacks  # type: ignore[attr-defined]
