"""The replicas of a simulation: one live module, which every virtual worker trains in its turn."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import lightning.pytorch as pl
import torch
from lightning.pytorch.core.optimizer import _init_optimizers_and_lr_schedulers
from lightning.pytorch.loops.optimization.automatic import _AutomaticOptimization
from lightning.pytorch.loops.progress import _BatchProgress
from lightning.pytorch.trainer import call
from torch import Tensor, nn

from lightning_async_localsgd.callbacks import count_samples
from lightning_async_localsgd.codecs import make_codec
from lightning_async_localsgd.exchange.header import Header
from lightning_async_localsgd.exchange.ledger import Progress
from lightning_async_localsgd.outer import GlobalState
from lightning_async_localsgd.rounds import Rounds
from lightning_async_localsgd.settings import Settings
from lightning_async_localsgd.simulation.timeline import Learned
from lightning_async_localsgd.worker import forget_non_finite_state

__all__ = ["MakeBatches", "TrainingReplicas"]

MakeBatches = Callable[[Callable[[], int]], Iterator[tuple[Any, int]]]
"""Makes a worker's endless batches, each with its number in the pass, from what tells its shard of the moment."""


class _Owed(NamedTuple):
    """A local step that is still to be made."""

    shard: int
    job_steps: int
    """Steps of the job before it, which the learning-rate schedules count."""


class _Flat:
    """The global parameters and buffers of one version, shared by all who adopt it: gone when none needs it."""

    def __init__(self, values: Tensor) -> None:
        self.values = values


class _ParameterPlace:
    """A parameter of the live module. Its values change hands; the object, which optimizers know, stays."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self._parameter = parameter

    def get(self) -> Tensor:
        return self._parameter.data

    def set(self, values: Tensor) -> None:
        self._parameter.data = values


class _BufferPlace:
    """A buffer of the live module."""

    def __init__(self, owner: nn.Module, name: str) -> None:
        self._owner = owner
        self._name = name

    def get(self) -> Tensor:
        buffer = self._owner._buffers[self._name]
        assert buffer is not None
        return buffer

    def set(self, values: Tensor) -> None:
        self._owner._buffers[self._name] = values


class _Replica:
    """What is one worker's own."""

    def __init__(self, trainer: pl.Trainer, batches: MakeBatches) -> None:
        self.tensors: list[Tensor] = []  # by place, while it is not live
        self.random_state: list[Tensor] = []
        self.optimizers, self.schedulers = _init_optimizers_and_lr_schedulers(trainer.lightning_module)
        self.loop = _AutomaticOptimization(trainer)
        self.batch_progress = _BatchProgress()
        self.shard = 0
        self.batches = batches(lambda: self.shard)
        self.scheduled = 0  # steps of the job that its learning-rate schedules have made
        self.owed: list[_Owed] = []
        self.samples = 0
        self.loss = 0.0
        self.base: _Flat | None = None  # what its round began from
        self.snapshot: Tensor | None = None  # at its push, until the adoption
        self.adoption: _Flat | None = None
        self.learned_since_push = False


class TrainingReplicas:
    """Trains all virtual workers on one live module, by swapping in what is each one's own.

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
        batches: of each worker.

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
        self._trainer = trainer
        self._module = module
        self._state = state
        self._codec = make_codec(settings.codec)
        self._device = next(module.parameters()).device
        self._places, self._slots = _find_places(module, state)
        self._original = [place.get() for place in self._places]
        self._bases: WeakValueDictionary[int, _Flat] = WeakValueDictionary()
        self._live: _Replica | None = None
        random_state = self._get_random_state()
        self._replicas = [_Replica(trainer, make) for make in batches]
        for replica in self._replicas:
            replica.random_state = random_state  # alike for all, as in processes that are seeded alike
            if any(config.reduce_on_plateau for config in replica.schedulers):
                raise ValueError(
                    "A simulation cannot step a `ReduceLROnPlateau`, which waits for a metric. Use a schedule by steps."
                )

    # ---- see `Replicas` ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def join(self, worker: int) -> None:
        """See :meth:`Replicas.join`."""
        replica = self._replicas[worker]
        leader = self._tensors(self._replicas[0])
        replica.tensors = [tensor.clone() for tensor in leader or self._original]
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
            replica.snapshot = self._state.layout.empty(self._state.flat.device)
        tensors = self._exchanged(replica)
        torch._foreach_copy_(self._state.layout.views(replica.snapshot), tensors)
        learned = Learned(replica.samples, replica.loss)
        replica.samples, replica.loss, replica.learned_since_push = 0, 0.0, False
        return learned

    @torch.no_grad()
    def finite(self, worker: int) -> bool:
        """See :meth:`Replicas.finite`."""
        scratch = self._state.pseudo_gradient
        self._write_delta(self._replicas[worker], self._state.flat[self._state.layout.parameter_numel :], scratch)
        low, high = torch.aminmax(scratch)
        return bool(torch.maximum(-low, high) <= self._codec.largest)  # False for NaN

    @torch.no_grad()
    def trade(self, groups: Sequence[Sequence[Header]]) -> Iterator[Sequence[Header]]:
        """See :meth:`Replicas.trade`."""
        target = self._state.pseudo_gradient
        buffers = self._state.flat[self._state.layout.parameter_numel :].clone()
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
            forget_non_finite_state(replica.optimizers)
            replica.samples, replica.loss = 0, 0.0
        elif not replica.learned_since_push:
            self._copy(replica, replica.adoption)
        else:
            correction = torch.sub(replica.adoption.values, replica.snapshot, out=replica.snapshot).to(self._device)
            torch._foreach_add_(self._exchanged(replica), self._state.layout.views(correction))
        replica.base, replica.adoption, replica.snapshot = replica.adoption, None, None

    # ---- deltas -----------------------------------------------------------------------------------------------------

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
            start = self._state.layout.parameter_numel
            torch.sub(buffers, replica.snapshot[start:], out=delta[start:])

    def _of_now(self) -> _Flat:
        """The global parameters and buffers of now."""
        flat = self._bases.get(self._state.version)
        if flat is None:
            flat = self._bases[self._state.version] = _Flat(self._state.flat.clone())
        return flat

    def _copy(self, replica: _Replica, flat: _Flat) -> None:
        torch._foreach_copy_(self._exchanged(replica), self._state.layout.views(flat.values))

    # ---- the live module --------------------------------------------------------------------------------------------

    def _tensors(self, replica: _Replica) -> list[Tensor]:
        """A replica's tensors, by place."""
        if replica is self._live:
            replica.tensors = [place.get() for place in self._places]
        return replica.tensors

    def _exchanged(self, replica: _Replica) -> list[Tensor]:
        """A replica's tensors that have a slot in the flat vector, in the order of the slots."""
        tensors = self._tensors(replica)
        return [tensors[place] for place in self._slots]

    def _leave(self) -> None:
        """Put the live replica's tensors and random state aside."""
        if self._live is not None:
            self._tensors(self._live)
            self._live.random_state = self._get_random_state()
            self._live = None

    def _enter(self, replica: _Replica) -> None:
        if replica is self._live:
            return
        self._leave()
        for place, tensor in zip(self._places, replica.tensors, strict=True):
            place.set(tensor)
        self._set_random_state(replica.random_state)
        strategy, loop = self._trainer.strategy, self._trainer.fit_loop.epoch_loop
        strategy.optimizers, strategy.lr_scheduler_configs = replica.optimizers, replica.schedulers
        loop.automatic_optimization, loop.batch_progress = replica.loop, replica.batch_progress
        self._live = replica

    @contextmanager
    def lend_global(self) -> Iterator[None]:
        """Have the live module be the global model, with worker 0's buffers where none are shared."""
        self._leave()
        with torch.no_grad():
            tensors = [tensor.clone() for tensor in self._tensors(self._replicas[0]) or self._original]
            torch._foreach_copy_([tensors[place] for place in self._slots], self._state.layout.views(self._state.flat))
        random_state = self._get_random_state()
        for place, tensor in zip(self._places, tensors, strict=True):
            place.set(tensor)
        try:
            yield
        finally:
            self._set_random_state(random_state)

    @torch.no_grad()
    def close(self) -> None:
        """Give the module back, with the final global parameters in the tensors that it came with."""
        with self.lend_global():
            final = [place.get() for place in self._places]
        for place, original, values in zip(self._places, self._original, final, strict=True):
            place.set(original.copy_(values))

    def _get_random_state(self) -> list[Tensor]:
        state = [torch.get_rng_state()]
        if self._device.type == "cuda":
            state.append(torch.cuda.get_rng_state(self._device))
        return state

    def _set_random_state(self, state: list[Tensor]) -> None:
        torch.set_rng_state(state[0])
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(state[1], self._device)

    # ---- steps ------------------------------------------------------------------------------------------------------

    def _catch_up(self, replica: _Replica) -> None:
        """Make the local steps that a replica owes."""
        if not replica.owed:
            return
        self._enter(replica)
        with torch.enable_grad():
            for owed in replica.owed:
                self._schedule(replica, owed.job_steps)
                replica.shard = owed.shard
                replica.loss += self._make_step(replica)
        replica.owed.clear()
        replica.learned_since_push = True

    def _schedule(self, replica: _Replica, job_steps: int) -> None:
        """Step the learning-rate schedules with the job, as far as it was when this step began."""
        for step in range(replica.scheduled + 1, job_steps + 1):
            for config in replica.schedulers:
                if config.interval == "step" and step % config.frequency == 0:
                    self._module.lr_scheduler_step(config.scheduler, None)
        replica.scheduled = max(replica.scheduled, job_steps)

    def _make_step(self, replica: _Replica) -> float:
        """Make one local step of the live replica, of as many batches as gradients are accumulated over."""
        trainer, loop = self._trainer, self._trainer.fit_loop.epoch_loop
        batches = trainer.accumulate_grad_batches
        loss = 0.0
        for _ in range(batches):
            batch, batch_idx = next(replica.batches)
            if batch_idx == 0 and replica.batch_progress.total.ready > 0:
                self._end_pass(replica)
            replica.samples += count_samples(batch)
            batch = trainer.precision_plugin.convert_input(batch)
            batch = self._module._on_before_batch_transfer(batch, dataloader_idx=0)
            batch = call._call_strategy_hook(trainer, "batch_to_device", batch, dataloader_idx=0)
            replica.batch_progress.increment_ready()
            call._call_lightning_module_hook(trainer, "on_train_batch_start", batch, batch_idx)
            kwargs = loop._build_kwargs(OrderedDict(), batch, batch_idx)
            outputs = replica.loop.run(trainer.optimizers[0], replica.batch_progress.total.ready - 1, kwargs)
            call._call_lightning_module_hook(trainer, "on_train_batch_end", outputs, batch, batch_idx)
            replica.batch_progress.increment_processed()
            replica.batch_progress.increment_completed()
            if "loss" in outputs:
                loss += float(outputs["loss"]) / batches
        return loss

    def _end_pass(self, replica: _Replica) -> None:
        for config in replica.schedulers:
            if config.interval == "epoch":
                self._module.lr_scheduler_step(config.scheduler, None)


def _find_places(module: nn.Module, state: GlobalState) -> tuple[list[_ParameterPlace | _BufferPlace], list[int]]:
    """The places of the live module where replicas differ, and for each slot of the flat vector its place."""
    places: list[_ParameterPlace | _BufferPlace] = []
    found: dict[str, int] = {}
    parameters = dict(module.named_parameters())
    for slot in state.layout.parameter_slots:
        found[slot.name] = len(places)
        places.append(_ParameterPlace(parameters[slot.name]))
    for name, _ in module.named_buffers():
        owner, _, leaf = name.rpartition(".")
        found[name] = len(places)
        places.append(_BufferPlace(module.get_submodule(owner), leaf))
    return places, [found[slot.name] for slot in state.layout.slots]
