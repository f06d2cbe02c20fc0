"""The replicas of a simulation: the training, pushes and adoptions of each virtual worker."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple
from weakref import WeakValueDictionary

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_async_localsgd.codecs import Codec, ErrorFeedback
from lightning_async_localsgd.exchange.trade import WireVector
from lightning_async_localsgd.outer import Adopter, GlobalState, Unsendable, write_delta
from lightning_async_localsgd.protocol.ledger import DueDelta
from lightning_async_localsgd.protocol.progress import Progress
from lightning_async_localsgd.protocol.rounds import Rounds
from lightning_async_localsgd.protocol.slices import Span, owned_slices
from lightning_async_localsgd.settings import Settings
from lightning_async_localsgd.simulation.interfaces import Learned
from lightning_async_localsgd.simulation.live import LiveModule, Own
from lightning_async_localsgd.simulation.steps import LocalSteps, MakeBatches
from lightning_async_localsgd.worker.dropped_deltas import Drops
from lightning_async_localsgd.worker.replica import forget_non_finite_state

__all__ = ["TrainingReplicas"]


class _Owed(NamedTuple):
    """A local step that has been counted and not yet computed."""

    shard: int
    job_steps: int


class _Flat:
    """The global parameters and buffers of one version, shared by all workers that adopt it."""

    def __init__(self, values: Tensor) -> None:
        self.values = values


class _Replica:
    """The state of one worker."""

    def __init__(self, steps: LocalSteps, drops: Drops, wire: WireVector) -> None:
        self.own = Own()
        self.wire = wire
        self.drops = drops
        self.steps = steps
        self.owed: list[_Owed] = []
        self.samples = 0  # since its push, as the loss
        self.loss = 0.0
        self.base: _Flat | None = None  # at the start of its round
        self.snapshot: Tensor | None = None  # at its push; kept until the adoption
        self.unsendable = Unsendable()  # of its latest push
        self.adoption: _Flat | None = None
        self.learned_since_push = False


class TrainingReplicas:
    """Trains all virtual workers on one live module; see :class:`Replicas`.

    A step is computed when something depends on it, together with all outstanding steps of its worker. So a worker's
    parameters stay in the processor's cache for a round, and are swapped once per round.

    The memory of each worker is its parameters and buffers, the state of its inner optimizer, a copy of its parameters
    while its delta is in flight, and the global parameters at the start of its round. Workers whose rounds began from
    the same global parameters share one copy of them.

    Args:
        trainer: the trainer; its loop, strategy and precision make the steps. It must be fitting.
        module: the module, on its device.
        state: the global state.
        settings: settings of the run.
        batches: makes the data of each worker.

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
        self._constraint = settings.constraint
        self._largest = settings.largest
        self._device = next(module.parameters()).device
        self._live = LiveModule(module, state.layout)
        self._bases: WeakValueDictionary[int, _Flat] = WeakValueDictionary()
        self._adopter = Adopter(self._layout)
        self._replicas = [
            _Replica(LocalSteps(trainer, make), Drops(f"Worker {worker}", self._layout), self._wire())
            for worker, make in enumerate(batches)
        ]

    def _wire(self) -> WireVector:
        feedback = ErrorFeedback(self._layout.numel, self._state.flat.device)
        return WireVector(self._state.pseudo_gradient, self._layout.parameter_numel, feedback)

    # ---- see `Replicas` ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def join(self, worker: int) -> None:
        """See :meth:`Replicas.join`."""
        replica = self._replicas[worker]
        self._live.adopt(replica.own, like=self._replicas[0].own)
        replica.base = self._own_copy(self._of_now())
        self._adopter.replace(self._live.exchanged(replica.own), replica.base.values)

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

    def finite(self, worker: int) -> bool:
        """See :meth:`Replicas.finite`."""
        replica = self._replicas[worker]
        self._write_delta(replica, self._global_buffers, self._state.pseudo_gradient)
        return not replica.unsendable.parameters

    @torch.no_grad()
    def trade(self, groups: Sequence[Sequence[DueDelta]], codec: Codec) -> Iterator[Sequence[DueDelta]]:
        """See :meth:`Replicas.trade`."""
        target = self._state.pseudo_gradient
        buffers = self._global_buffers.clone()
        before_turn = self._of_now().values if self._state.needs_start else None
        for group in groups:
            arrivals = [due.arrival for due in group if due.accepted]
            for i, arrival in enumerate(arrivals):
                replica = self._replicas[arrival.worker]
                delta = target if i == 0 and codec.lossless else torch.empty_like(target)
                self._write_delta(replica, buffers, delta)
                assert replica.snapshot is not None
                self._state.transform_delta(delta, arrival, replica.snapshot, before_turn)
                for piece in replica.wire.pieces(Span(0, target.numel()), codec):
                    replica.wire.decode(replica.wire.encode(delta, piece), piece, add=i > 0)
            if len(arrivals) > 1 and self._state.sums and not codec.lossless:
                self._write_sum(codec, len(arrivals))
            yield group

    def _write_sum(self, codec: Codec, count: int) -> None:
        """Put the sum of so many deltas in the target through the codec, as the owners of its slices do."""
        size = len(self._replicas)
        for replica, span in zip(self._replicas, owned_slices(self._layout.numel, [1 / size] * size), strict=True):
            for piece in replica.wire.pieces(span, codec):
                replica.wire.encode_sum(piece.of_sum(count))

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
        base = self._own_copy(replica.adoption)
        correction = torch.sub(base.values, replica.snapshot, out=replica.snapshot)
        self._state.clear_holes(correction)
        tensors = self._live.exchanged(replica.own)
        replica.drops.look(replica.unsendable)
        if restart:
            self._adopter.replace(tensors, base.values)
            forget_non_finite_state(replica.steps.optimizers)
            replica.samples, replica.loss = 0, 0.0
        elif not replica.learned_since_push:
            self._adopter.replace(tensors, base.values, correction)
        else:
            left_out = replica.unsendable.buffers
            self._adopter.advance(tensors, base.values, correction.to(self._device), left_out)
        if self._constraint is not None:
            own = zip(self._layout.parameter_slots, self._live.exchanged(replica.own), strict=False)
            self._constraint({slot.name: tensor for slot, tensor in own})
        replica.base, replica.adoption, replica.snapshot = base, None, None

    # ---- around the run ---------------------------------------------------------------------------------------------

    @contextmanager
    def swap_in_global(self) -> Iterator[None]:
        """In the body the live module is the global model, with worker 0's buffers where none are exchanged."""
        with self._live.swap_in(self._state.flat, leader=self._replicas[0].own):
            yield

    def close(self) -> None:
        """Restore the module, with the current global parameters, and release everything else."""
        self._live.close(self._state.flat, leader=self._replicas[0].own)
        self._replicas.clear()

    # ---- deltas and steps -------------------------------------------------------------------------------------------

    @property
    def _global_buffers(self) -> Tensor:
        return self._state.flat[self._layout.parameter_numel :]

    def _write_delta(self, replica: _Replica, buffers: Tensor, delta: Tensor) -> None:
        """Write the delta of a replica's push, as the exchange thread of a real worker does.

        Args:
            replica: the replica.
            buffers: the global buffers before this turn.
            delta: the output.
        """
        assert replica.base is not None and replica.snapshot is not None
        replica.unsendable = write_delta(
            self._state, replica.base.values, replica.snapshot, buffers, delta, self._largest
        )

    def _of_now(self) -> _Flat:
        """The current global parameters and buffers."""
        flat = self._bases.get(self._state.version)
        if flat is None:
            flat = self._bases[self._state.version] = _Flat(self._state.flat.clone())
        return flat

    def _own_copy(self, flat: _Flat) -> _Flat:
        """A copy that a replica may write to, if the module cannot hold ``flat`` exactly."""
        return _Flat(flat.values.clone()) if self._adopter.rounds else flat

    def _catch_up(self, replica: _Replica) -> None:
        """Compute the outstanding local steps of a replica."""
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
