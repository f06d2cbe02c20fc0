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
from lightning_async_localsgd.outer import Adopter, GlobalModel, GlobalState, Unsendable, write_delta
from lightning_async_localsgd.protocol.ledger import Group
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
    """The global parameters and buffers of one version of a fragment, shared by all workers that adopt it."""

    def __init__(self, values: Tensor) -> None:
        self.values = values


class _Replica:
    """The state of one worker."""

    def __init__(self, steps: LocalSteps, drops: Drops, wires: Sequence[WireVector]) -> None:
        self.own = Own()
        self.wires = wires  # of each fragment, as the bases
        self.drops = drops
        self.steps = steps
        self.owed: list[_Owed] = []
        self.samples = 0  # since its push, as the loss
        self.loss = 0.0
        self.bases: list[_Flat] = []  # at the start of its progress
        self.fragment = 0  # of its latest push, as what follows
        self.snapshot: Tensor | None = None  # kept until the adoption
        self.unsendable = Unsendable()
        self.adoption: list[_Flat] = []  # of the pushed fragment, or of all
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
        state: GlobalModel,
        settings: Settings,
        batches: Sequence[MakeBatches],
    ) -> None:
        self._state = state
        self._layout = state.layout
        self._constraint = settings.constraint
        self._largest = settings.largest
        self._local_share = settings.local_share
        self._device = next(module.parameters()).device
        self._live = LiveModule(module, state.layout)
        self._bases: WeakValueDictionary[tuple[int, int], _Flat] = WeakValueDictionary()
        self._adopters = [Adopter(part) for part in self._layout.fragments]
        self._replicas = [
            _Replica(LocalSteps(trainer, make), Drops(f"Worker {worker}", self._layout), self._wires())
            for worker, make in enumerate(batches)
        ]

    def _wires(self) -> list[WireVector]:
        device = self._state.flat.device
        return [
            WireVector(state.pseudo_gradient, part.parameter_numel, ErrorFeedback(part.numel, device))
            for state, part in zip(self._state.fragments, self._layout.fragments, strict=True)
        ]

    # ---- see `Replicas` ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def join(self, worker: int) -> None:
        """See :meth:`Replicas.join`."""
        replica = self._replicas[worker]
        self._live.adopt(replica.own, like=self._replicas[0].own)
        self._replace(replica, [self._of_now(fragment) for fragment in range(len(self._adopters))])

    def step(self, worker: int, rounds: Rounds, progress: Progress) -> None:
        """See :meth:`Replicas.step`."""
        self._replicas[worker].owed.append(_Owed(rounds.shard, rounds.job_steps(progress)))

    @torch.no_grad()
    def push(self, worker: int, fragment: int) -> Learned:
        """See :meth:`Replicas.push`."""
        replica = self._replicas[worker]
        self._catch_up(replica)
        part = self._layout.fragments[fragment]
        if replica.snapshot is None or replica.fragment != fragment:
            replica.snapshot = part.empty(self._state.flat.device)
        replica.fragment = fragment
        torch._foreach_copy_(part.views(replica.snapshot), self._live.exchanged(replica.own)[part.members])
        learned = Learned(replica.samples, replica.loss)
        replica.samples, replica.loss, replica.learned_since_push = 0, 0.0, False
        return learned

    def finite(self, worker: int) -> bool:
        """See :meth:`Replicas.finite`."""
        replica = self._replicas[worker]
        state = self._state.fragments[replica.fragment]
        self._write_delta(replica, _buffers(state), state.pseudo_gradient)
        return not replica.unsendable.parameters

    @torch.no_grad()
    def trade(self, groups: Sequence[Group], codec: Codec) -> Iterator[Group]:
        """See :meth:`Replicas.trade`."""
        before_turn = [
            (_buffers(state).clone(), self._of_now(fragment).values if state.needs_start else None)
            for fragment, state in enumerate(self._state.fragments)
        ]
        for group in groups:
            self._add_up(group, codec, *before_turn[group.fragment])
            yield group

    def _add_up(self, group: Group, codec: Codec, buffers: Tensor, before_turn: Tensor | None) -> None:
        """Write the sum of a group's accepted deltas into the pseudo-gradient, in the form that the codec gives it.

        Args:
            group: the group.
            codec: the codec.
            buffers: the global buffers before this turn.
            before_turn: the global parameters and buffers before this turn, if transformations look at them.
        """
        state = self._state.fragments[group.fragment]
        target = state.pseudo_gradient
        arrivals = [due.arrival for due in group.deltas if due.accepted]
        for i, arrival in enumerate(arrivals):
            replica = self._replicas[arrival.worker]
            wire = replica.wires[group.fragment]
            delta = target if i == 0 and codec.lossless else torch.empty_like(target)
            self._write_delta(replica, buffers, delta)
            assert replica.snapshot is not None
            state.transform_delta(delta, arrival, replica.snapshot, before_turn)
            for piece in wire.pieces(Span(0, target.numel()), codec):
                wire.decode(wire.encode(delta, piece), piece, add=i > 0)
        if len(arrivals) > 1 and self._state.sums and not codec.lossless:
            self._write_sum(group.fragment, codec, len(arrivals))

    def _write_sum(self, fragment: int, codec: Codec, count: int) -> None:
        """Put the sum of so many deltas in the target through the codec, as the owners of its slices do."""
        size = len(self._replicas)
        spans = owned_slices(self._layout.fragments[fragment].numel, [1 / size] * size)
        for replica, span in zip(self._replicas, spans, strict=True):
            wire = replica.wires[fragment]
            for piece in wire.pieces(span, codec):
                wire.encode_sum(piece.of_sum(count))

    def publish(self, workers: Sequence[int]) -> None:
        """See :meth:`Replicas.publish`."""
        for worker in workers:
            replica = self._replicas[worker]
            restarts = bool(replica.unsendable.parameters)
            of = range(len(self._adopters)) if restarts else [replica.fragment]
            replica.adoption = [self._of_now(fragment) for fragment in of]

    @torch.no_grad()
    def adopt(self, worker: int, restart: bool) -> None:
        """See :meth:`Replicas.adopt`."""
        replica = self._replicas[worker]
        self._catch_up(replica)
        replica.drops.look(replica.fragment, replica.unsendable)
        if restart:
            self._replace(replica, replica.adoption)
            forget_non_finite_state(replica.steps.optimizers)
            replica.samples, replica.loss = 0, 0.0
        else:
            self._adopt_fragment(replica, *replica.adoption)
        if self._constraint is not None:
            own = zip(self._layout.parameter_slots, self._live.exchanged(replica.own), strict=False)
            self._constraint({slot.name: tensor for slot, tensor in own})
        replica.adoption, replica.snapshot = [], None

    def _replace(self, replica: _Replica, bases: Sequence[_Flat]) -> None:
        """Have a replica begin from these global parameters, of all fragments."""
        replica.bases = [self._own_copy(base) for base in bases]
        tensors = self._live.exchanged(replica.own)
        for part, adopter, base in zip(self._layout.fragments, self._adopters, replica.bases, strict=True):
            adopter.replace(tensors[part.members], base.values)

    def _adopt_fragment(self, replica: _Replica, adoption: _Flat) -> None:
        assert replica.snapshot is not None
        part, adopter = self._layout.fragments[replica.fragment], self._adopters[replica.fragment]
        base = replica.bases[replica.fragment] = self._own_copy(adoption)
        correction = torch.sub(base.values, replica.snapshot, out=replica.snapshot)
        self._state.fragments[replica.fragment].clear_holes(correction)
        tensors = self._live.exchanged(replica.own)[part.members]
        if not replica.learned_since_push:
            adopter.replace(tensors, base.values, correction)
        else:
            correction = correction.to(self._device)
            if self._local_share is not None:
                adopter.share(tensors, base.values, correction, self._local_share)
            adopter.advance(tensors, base.values, correction, replica.unsendable.buffers)

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

    def _write_delta(self, replica: _Replica, buffers: Tensor, delta: Tensor) -> None:
        """Write the delta of a replica's push, as the exchange thread of a real worker does.

        Args:
            replica: the replica.
            buffers: the fragment's global buffers before this turn.
            delta: the output.
        """
        assert replica.snapshot is not None
        state, base = self._state.fragments[replica.fragment], replica.bases[replica.fragment]
        replica.unsendable = write_delta(state, base.values, replica.snapshot, buffers, delta, self._largest)

    def _of_now(self, fragment: int) -> _Flat:
        """The current global parameters and buffers of a fragment."""
        state = self._state.fragments[fragment]
        flat = self._bases.get((fragment, state.version))
        if flat is None:
            flat = self._bases[fragment, state.version] = _Flat(state.flat.clone())
        return flat

    def _own_copy(self, flat: _Flat) -> _Flat:
        """A copy that a replica may write to, if the module cannot hold ``flat`` exactly."""
        return _Flat(flat.values.clone()) if any(adopter.rounds for adopter in self._adopters) else flat

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


def _buffers(state: GlobalState) -> Tensor:
    """The global buffers of a fragment."""
    return state.flat[state.layout.parameter_numel :]
