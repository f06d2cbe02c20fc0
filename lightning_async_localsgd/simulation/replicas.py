"""The replicas of a simulation: what each virtual worker learns, pushes and adopts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple
from weakref import WeakValueDictionary

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_async_localsgd.codecs import make_codec
from lightning_async_localsgd.exchange.header import Header
from lightning_async_localsgd.exchange.ledger import Progress
from lightning_async_localsgd.outer import GlobalState
from lightning_async_localsgd.rounds import Rounds
from lightning_async_localsgd.settings import Settings
from lightning_async_localsgd.simulation.live import LiveModule, Own
from lightning_async_localsgd.simulation.steps import LocalSteps, MakeBatches
from lightning_async_localsgd.simulation.timeline import Learned
from lightning_async_localsgd.worker import forget_non_finite_state

__all__ = ["TrainingReplicas"]


class _Owed(NamedTuple):
    """A local step that is still to be made."""

    shard: int
    job_steps: int


class _Flat:
    """The global parameters and buffers of one version, shared by all who adopt it: gone when none needs it."""

    def __init__(self, values: Tensor) -> None:
        self.values = values


class _Replica:
    """What is one worker's own."""

    def __init__(self, steps: LocalSteps) -> None:
        self.own = Own()
        self.steps = steps
        self.owed: list[_Owed] = []
        self.samples = 0  # since its push, as the loss
        self.loss = 0.0
        self.base: _Flat | None = None  # what its round began from
        self.snapshot: Tensor | None = None  # at its push, until the adoption
        self.adoption: _Flat | None = None
        self.learned_since_push = False


class TrainingReplicas:
    """Trains all virtual workers on one live module; see :class:`Replicas`.

    A step is made when something depends on it, together with all that its worker owes by then. So a worker's
    parameters stay in the processor's cache for a round, and change places once per round.

    Of each worker there is in memory: its parameters and buffers, the state of its inner optimizer, a copy of its
    parameters while its delta is on its way, and the global parameters that its round began from, of which there is one
    copy for all who began from the same.

    Args:
        trainer: whose loop, strategy and precision make the steps. It must be fitting.
        module: the module, on its device.
        state: the global state.
        settings: settings of the run.
        batches: what makes the data of each worker.

    Raises:
        ValueError: if a learning-rate schedule watches a metric.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        state: GlobalState,
        settings: Settings,
        batches: Sequence[MakeBatches],
    ) -> None:
        self._state = state
        self._layout = state.layout
        self._codec = make_codec(settings.codec)
        self._device = next(module.parameters()).device
        self._live = LiveModule(module, state.layout)
        self._bases: WeakValueDictionary[int, _Flat] = WeakValueDictionary()
        self._replicas = [_Replica(LocalSteps(trainer, make)) for make in batches]

    # ---- see `Replicas` ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def join(self, worker: int) -> None:
        """See :meth:`Replicas.join`."""
        replica = self._replicas[worker]
        self._live.adopt(replica.own, like=self._replicas[0].own)
        replica.base = self._of_now()
        self._copy(replica, replica.base)

    def step(self, worker: int, rounds: Rounds, progress: Progress) -> None:
        """See :meth:`Replicas.step`."""
        self._replicas[worker].owed.append(_Owed(rounds.shard, rounds.job_steps(progress)))

    @torch.no_grad()
    def push(self, worker: int) -> Learned:
        """See :meth:`Replicas.push`."""
        replica = self._replicas[worker]
        self._catch_up(replica)
        if replica.snapshot is None:
            replica.snapshot = self._layout.empty(self._state.flat.device)
        torch._foreach_copy_(self._layout.views(replica.snapshot), self._live.exchanged(replica.own))
        learned = Learned(replica.samples, replica.loss)
        replica.samples, replica.loss, replica.learned_since_push = 0, 0.0, False
        return learned

    @torch.no_grad()
    def finite(self, worker: int) -> bool:
        """See :meth:`Replicas.finite`."""
        scratch = self._state.pseudo_gradient
        self._write_delta(self._replicas[worker], self._global_buffers, scratch)
        low, high = torch.aminmax(scratch)
        return bool(torch.maximum(-low, high) <= self._codec.largest)  # False for NaN

    @torch.no_grad()
    def trade(self, groups: Sequence[Sequence[Header]]) -> Iterator[Sequence[Header]]:
        """See :meth:`Replicas.trade`."""
        target = self._state.pseudo_gradient
        buffers = self._global_buffers.clone()
        for group in groups:
            for i, header in enumerate(group):
                delta = target if i == 0 else torch.empty_like(target)
                self._write_delta(self._replicas[header.worker], buffers, delta)
                received = self._codec.decode(self._codec.encode(delta))
                if i > 0:
                    target.add_(received)
                elif received.data_ptr() != target.data_ptr():
                    target.copy_(received)
            yield group

    def publish(self, workers: Sequence[int]) -> None:
        """See :meth:`Replicas.publish`."""
        for worker in workers:
            self._replicas[worker].adoption = self._of_now()

    @torch.no_grad()
    def adopt(self, worker: int, restart: bool) -> None:
        """See :meth:`Replicas.adopt`."""
        replica = self._replicas[worker]
        self._catch_up(replica)
        assert replica.adoption is not None and replica.snapshot is not None
        if restart:
            self._copy(replica, replica.adoption)
            forget_non_finite_state(replica.steps.optimizers)
            replica.samples, replica.loss = 0, 0.0
        elif not replica.learned_since_push:
            self._copy(replica, replica.adoption)
        else:
            correction = torch.sub(replica.adoption.values, replica.snapshot, out=replica.snapshot).to(self._device)
            torch._foreach_add_(self._live.exchanged(replica.own), self._layout.views(correction))
        replica.base, replica.adoption, replica.snapshot = replica.adoption, None, None

    # ---- around the run ---------------------------------------------------------------------------------------------

    @contextmanager
    def lend_global(self) -> Iterator[None]:
        """Have the live module be the global model, with worker 0's buffers where none are exchanged."""
        with self._live.lend(self._state.flat, leader=self._replicas[0].own):
            yield

    def close(self) -> None:
        """Give the module back with the global parameters of now, and let go of all else."""
        self._live.close(self._state.flat, leader=self._replicas[0].own)
        self._replicas.clear()

    # ---- deltas and steps -------------------------------------------------------------------------------------------

    @property
    def _global_buffers(self) -> Tensor:
        return self._state.flat[self._layout.parameter_numel :]

    def _write_delta(self, replica: _Replica, buffers: Tensor, delta: Tensor) -> None:
        """Write what a replica has pushed, as the exchange thread of a real worker does.

        Args:
            replica: whose.
            buffers: the global buffers before this turn.
            delta: where to.
        """
        assert replica.base is not None and replica.snapshot is not None
        torch.sub(replica.base.values, replica.snapshot, out=delta)
        if buffers.numel():
            start = self._layout.parameter_numel
            torch.sub(buffers, replica.snapshot[start:], out=delta[start:])

    def _of_now(self) -> _Flat:
        """The global parameters and buffers of now."""
        flat = self._bases.get(self._state.version)
        if flat is None:
            flat = self._bases[self._state.version] = _Flat(self._state.flat.clone())
        return flat

    def _copy(self, replica: _Replica, flat: _Flat) -> None:
        torch._foreach_copy_(self._live.exchanged(replica.own), self._layout.views(flat.values))

    def _catch_up(self, replica: _Replica) -> None:
        """Make the local steps that a replica owes."""
        if not replica.owed:
            return
        if self._live.enter(replica.own):
            replica.steps.enter()
        with torch.enable_grad():
            for owed in replica.owed:
                samples, loss = replica.steps.make(owed.shard, owed.job_steps)
                replica.samples += samples
                replica.loss += loss
        self._live.check_unshared()
        replica.owed.clear()
        replica.learned_since_push = True
