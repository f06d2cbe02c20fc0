"""The module after ``fit``: what worker 0's callbacks have made of the global one, on every process."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore, ProcessGroupGloo
from typing_extensions import override

from lightning_async_localsgd.errors import PeerLostError
from lightning_async_localsgd.exchange.share import as_bytes, from_bytes
from lightning_async_localsgd.membership import StaticJob

__all__ = ["FinalModule"]

_WORD = 8  # bytes


class FinalModule(pl.Callback):
    """Gives every process the parameters and buffers that worker 0 has ended with, where they differ.

    After the last outer update all modules are alike. Then callbacks that average weights (EMA, SWA) may write their
    average into the module, on each worker that of its own parameters; or an average that is kept in the module is
    brought up to date once more. The strategy attaches this callback at the end of ``fit``; it acts in its
    ``teardown``, after all ``on_fit_end``, and leaves the trainer. Where modules are alike, a checksum of each tensor
    is all that it costs.

    Args:
        job: the processes.
    """

    def __init__(self, job: StaticJob) -> None:
        self._job = job

    def attach(self, trainer: pl.Trainer) -> None:
        """Act at the end of this ``fit``."""
        _set_callbacks(trainer, [*_callbacks(trainer), self])

    def give_up(self) -> None:
        """This process has failed: nobody is to wait for it."""
        self._hear(self._job.rank, None)
        self._job.leave()

    def _hear(self, rank: int, checksums: dict[str, int] | None) -> dict[str, int] | None:
        """The checksums of process ``rank``, once it has come to the end; None if it has failed."""
        heard: dict[str, int] | None = self._job.broadcast(checksums, rank, key=f"final_module/{rank}")
        return heard

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._leave(trainer)
        self._level(pl_module)
        self._job.leave()

    def _level(self, pl_module: pl.LightningModule) -> None:
        tensors = _named_tensors(pl_module)
        checksums = {name: _checksum(tensor) for name, tensor in tensors.items()}
        heard = [self._hear(self._job.rank, checksums), *(self._hear(r, None) for r in self._others)]
        everyones = [c for c in heard if c is not None]
        if len(everyones) < len(heard):
            return  # the job has failed: no process can count on the others
        common = set(checksums).intersection(*everyones)
        if odd := sorted(set().union(*everyones) - common):
            warnings.warn(
                f"Processes end with modules of different tensors: {', '.join(odd)} are not on all of them, or in "
                "another shape. Worker 0 has the module to go on with.",
                stacklevel=2,
            )
        differing = [n for n in sorted(common) if any(other[n] != checksums[n] for other in everyones)]
        if differing:
            self._copy_from_leader([tensors[name] for name in differing])

    @property
    def _others(self) -> list[int]:
        return [rank for rank in range(self._job.size) if rank != self._job.rank]

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._leave(trainer)
        self.give_up()

    def _leave(self, trainer: pl.Trainer) -> None:
        # A list of its own, for Lightning is walking through the old one.
        _set_callbacks(trainer, [c for c in _callbacks(trainer) if c is not self])

    @torch.no_grad()
    def _copy_from_leader(self, tensors: Sequence[Tensor]) -> None:
        """One after the other, so that memory does not grow with the model."""
        try:
            group: Any = ProcessGroupGloo(
                PrefixStore("final_module", self._job.store), self._job.rank, self._job.size, self._job.timeout
            )
            options = dist.BroadcastOptions()
            options.rootRank = options.rootTensor = 0
            for tensor in tensors:
                wire = as_bytes(tensor).cpu()
                group.broadcast([wire], options).wait()
                from_bytes(tensor, wire)
        except RuntimeError as error:
            raise PeerLostError(
                "A process was lost while all took over the module that worker 0 has ended with (a callback has "
                f"changed it, to an average of weights?): {error}. Look for the cause in the other processes' logs."
            ) from error


def _named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, type and shape, which must agree to send them."""
    named = (*module.named_parameters(), *module.named_buffers())
    return {
        f"{name}: {str(t.dtype).removeprefix('torch.')}{list(t.shape)}": t
        for name, t in named
        if t.numel() > 0 and t.layout is torch.strided
    }


def _checksum(tensor: Tensor) -> int:
    """Sum of the bits, as 64-bit integers: different for any two tensors of a single word."""
    data = as_bytes(tensor).cpu()
    if data.storage_offset() % _WORD:  # a part of a larger tensor, between two words
        data = data.clone()
    words = data.numel() // _WORD * _WORD
    rest = int.from_bytes(bytes(data[words:].tolist()), "little")
    return int(data[:words].view(torch.int64).sum()) + rest


def _callbacks(trainer: pl.Trainer) -> list[pl.Callback]:
    return trainer.callbacks  # type: ignore[attr-defined]  # set by a connector, where mypy does not look


def _set_callbacks(trainer: pl.Trainer, callbacks: list[pl.Callback]) -> None:
    trainer.callbacks = callbacks  # type: ignore[attr-defined]
