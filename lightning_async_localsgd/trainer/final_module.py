"""The module after ``fit``: worker 0's final module, on every process."""

from __future__ import annotations

import warnings

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_async_localsgd.errors import AsyncLocalSGDError
from lightning_async_localsgd.exchange.broadcast import as_bytes
from lightning_async_localsgd.membership import StaticJob
from lightning_async_localsgd.trainer.relay import Relay

__all__ = ["FinalModule"]

_WORD = 8  # bytes


class FinalModule(pl.Callback):
    """Copies worker 0's final module to every process after ``fit``.

    After the last outer update all modules are equal. Then callbacks that average weights (EMA, SWA) may write an
    average of their worker's own parameters into the module, or update an average in the module once more. The strategy
    attaches this callback at the end of ``fit``. It acts in its ``teardown``, after all ``on_fit_end`` hooks, and then
    leaves the trainer. Only tensors that differ are sent; for equal modules the cost is a checksum of each tensor.

    Args:
        job: the processes.
    """

    def __init__(self, job: StaticJob) -> None:
        self._job = job

    def attach(self, trainer: pl.Trainer) -> None:
        """Attach this callback to a trainer, at the end of its ``fit``."""
        _set_callbacks(trainer, [*_callbacks(trainer), self])

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._leave(trainer)
        try:
            self._level(_named_tensors(pl_module))
        except AsyncLocalSGDError as error:
            warnings.warn(
                "The run is complete, but this process could not learn with which module worker 0 has ended, and keeps "
                f"its own: the two differ if a callback has changed them (to an average of weights). {error}",
                stacklevel=2,
            )
        self._job.leave()

    def _level(self, tensors: dict[str, Tensor]) -> None:
        """Make all modules equal: worker 0 publishes checksums, the others request tensors, worker 0 sends these.

        Only worker 0 waits for the others. If a process is lost, worker 0 continues with the rest.
        """
        own = {name: _checksum(tensor) for name, tensor in tensors.items()}
        leaders: dict[str, int] = self._job.broadcast(own, key="final_module/checksums")
        if self._job.rank == 0:
            self._give(tensors)
            return
        wanted = [name for name in own if name in leaders and own[name] != leaders[name]]
        odd = sorted(set(own) ^ set(leaders))
        self._job.tell(f"final_module/wanted/{self._job.rank}", [wanted, odd])
        _warn_of(odd)
        sent, lost = self._job.broadcast(None, key="final_module/sent")
        _tell_of(lost)
        Relay(self._job, "final_module").take([(tensors.get(name), size) for name, size in sent])

    def _give(self, tensors: dict[str, Tensor]) -> None:
        asked = {rank: f"final_module/wanted/{rank}" for rank in range(1, self._job.size)}
        lost = self._job.wait_for_living(asked)
        answers = {rank: self._job.hear(key) for rank, key in asked.items() if rank not in lost}
        _warn_of(sorted({name for _, odd in answers.values() for name in odd}))
        wanted = {name for names, _ in answers.values() for name in names}
        sent = [name for name in tensors if name in wanted]
        sizes = [(name, tensors[name].numel() * tensors[name].element_size()) for name in sent]
        words = [str(error) for error in lost.values()]
        self._job.broadcast([sizes, words], key="final_module/sent")
        lost_later = Relay(self._job, "final_module").give([tensors[name] for name in sent], list(answers))
        _tell_of([*words, *map(str, lost_later.values())])

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._leave(trainer)
        self._job.fail(exception)

    def _leave(self, trainer: pl.Trainer) -> None:
        # A new list, because Lightning iterates over the old one.
        _set_callbacks(trainer, [c for c in _callbacks(trainer) if c is not self])


def _tell_of(lost: list[str]) -> None:
    for reason in lost:
        warnings.warn(f"The run is complete, but not all processes have seen its end. {reason}", stacklevel=2)


def _warn_of(odd: list[str]) -> None:
    if odd:
        warnings.warn(
            f"Processes end with modules of different tensors: {', '.join(odd)} are not on all of them, or in "
            "another shape. Worker 0 has the module to go on with.",
            stacklevel=2,
        )


def _named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, type and shape: only tensors that agree in all of these can be sent."""
    named = (*module.named_parameters(), *module.named_buffers())
    return {
        f"{name}: {str(t.dtype).removeprefix('torch.')}{list(t.shape)}": t
        for name, t in named
        if t.numel() > 0 and t.layout is torch.strided
    }


def _checksum(tensor: Tensor) -> int:
    """Sum of the data as 64-bit integers; different for any two tensors of a single word."""
    data = as_bytes(tensor).cpu()
    if data.storage_offset() % _WORD:  # a view of a larger tensor, not aligned to words
        data = data.clone()
    words = data.numel() // _WORD * _WORD
    rest = int.from_bytes(bytes(data[words:].tolist()), "little")
    return int(data[:words].view(torch.int64).sum()) + rest


def _callbacks(trainer: pl.Trainer) -> list[pl.Callback]:
    return trainer.callbacks  # type: ignore[attr-defined, no-any-return]  # set by a connector, where mypy does not look


def _set_callbacks(trainer: pl.Trainer, callbacks: list[pl.Callback]) -> None:
    trainer.callbacks = callbacks  # type: ignore[attr-defined]
