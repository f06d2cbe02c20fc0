"""The simulation: a module trained by virtual workers, in one process and in virtual time."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from lightning_async_localsgd.internals import (
    FitLoop,
    call_lightning_module_hook,
    request_dataloader,
)
from lightning_async_localsgd.outer import GlobalModel
from lightning_async_localsgd.protocol.progress import OuterUpdate
from lightning_async_localsgd.settings import Settings
from lightning_async_localsgd.settings.advice import warn_of_useless_settings
from lightning_async_localsgd.simulation.batches import VirtualLoaders
from lightning_async_localsgd.simulation.devices import Device, VirtualWorker, make_workers
from lightning_async_localsgd.simulation.evaluator import Evaluator, unlogged
from lightning_async_localsgd.simulation.exchange import DeltaCosts
from lightning_async_localsgd.simulation.interfaces import FinishedRound
from lightning_async_localsgd.simulation.network import Network
from lightning_async_localsgd.simulation.replicas import TrainingReplicas
from lightning_async_localsgd.simulation.result import (
    Evaluation,
    LossPoint,
    SimulatedRound,
    SimulatedUpdate,
    SimulatedWait,
    SimulationResult,
)
from lightning_async_localsgd.simulation.timeline import Timeline

__all__ = ["Simulation", "simulate"]

_OURS = ("max_steps", "max_epochs", "strategy", "devices", "num_nodes", "num_sanity_val_steps")
_UNHEEDED = ("limit_train_batches", "overfit_batches", "max_time", "fast_dev_run", "reload_dataloaders_every_n_epochs")


class Simulation:
    """Trains a module with virtual workers in this process, by the code of real workers.

    Outer state, pace, rounds, shard sampling, budget and codecs are those of a real run. The clock, the devices and the
    network are virtual. The same call gives the same bits.

    Args:
        module: the module, with automatic optimization. At the end it holds the final global parameters.
        data: its training data: a ``LightningDataModule``, a map-style ``DataLoader`` (or a collection of them), or a
            function of rank and size that returns one worker's data, an iterable that is iterated pass after pass.
        workers: for each worker, its speed in local steps per second, its device (:class:`NoisyDevice`,
            :class:`ChangingDevice`), or a :class:`VirtualWorker` that joins or leaves during the run.
        max_steps: local steps per worker, as ``Trainer(max_steps=...)``.
        val_dataloaders: validation data, if ``data`` is no data module.
        evaluate: returns metrics of its argument, the module with the global parameters; None: the metrics that the
            module's ``validation_step`` logs, if there is validation data.
        evaluate_every: steps of the job between two evaluations; None: only before the first step and after the last.
        network: the network of the exchange; None: messages take no time.
        update_seconds: virtual seconds of an outer update on each worker.
        seed: seed of the devices, the order of the data and the module's random numbers.
        trainer_options: arguments of the ``Trainer`` that makes the steps, such as ``gradient_clip_val``,
            ``accumulate_grad_batches``, ``precision`` or ``accelerator``. Its callbacks get no calls for batches.
        on_round: called with every finished round and its loss.
        on_evaluation: called with every evaluation.
        **settings: fields of :class:`~lightning_async_localsgd.Settings`: ``local_steps``, ``outer_optimizer``...

    Raises:
        ValueError: if an argument is outside its range, or nobody could finish a round.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        data: Any,
        workers: Sequence[float | Device | VirtualWorker],
        max_steps: int,
        *,
        val_dataloaders: Any = None,
        evaluate: Callable[[pl.LightningModule], Mapping[str, float]] | None = None,
        evaluate_every: int | None = None,
        network: Network | None = None,
        update_seconds: float = 0.0,
        seed: int = 0,
        trainer_options: Mapping[str, Any] | None = None,
        on_round: Callable[[SimulatedRound, LossPoint], object] | None = None,
        on_evaluation: Callable[[Evaluation], object] | None = None,
        **settings: Any,
    ) -> None:
        self.settings = Settings(**settings)
        self._workers = make_workers(workers)
        size = len(self._workers)
        self.settings.check_workers(size)
        self._network = network or Network()
        self._network.check_workers(size)
        first = self.settings.round_length(max_steps).first()
        if max_steps * size < first:
            raise ValueError(
                f"`max_steps={max_steps}` of {size} workers are less than one round of "
                f"`local_steps={first}`: nobody would push anything."
            )
        warn_of_useless_settings(self.settings, size, max_steps)
        if evaluate_every is not None and evaluate_every < 1:
            raise ValueError(f"`evaluate_every` must be at least 1 step, got {evaluate_every}.")
        if update_seconds < 0:
            raise ValueError(f"`update_seconds` must be at least 0, got {update_seconds}.")
        if not module.automatic_optimization:
            raise ValueError(
                f"{type(module).__name__} steps its optimizers itself (manual optimization), and a simulation has no "
                "way to tell its workers' steps apart. Set `automatic_optimization=True`."
            )
        if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
            raise ValueError("A simulation gives batches to `training_step`, not a `dataloader_iter`.")
        if isinstance(data, pl.LightningDataModule) and val_dataloaders is not None:
            raise ValueError("Pass the validation data in the data module, or the loaders of both without one.")
        if refused := [name for name in _OURS + _UNHEEDED if name in (trainer_options or {})]:
            raise ValueError(f"`trainer_options` cannot set {', '.join(refused)}: who trains how long is simulated.")
        self._module = module
        self._data = data
        self._max_steps = max_steps
        self._val_dataloaders = val_dataloaders
        self._evaluate = evaluate
        self._evaluate_every = evaluate_every
        self._update_seconds = update_seconds
        self._seed = seed
        self._trainer_options = dict(trainer_options or {})
        self._on_round = on_round
        self._on_evaluation = on_evaluation
        self._timeline: Timeline | None = None
        self._state: GlobalModel | None = None
        self._evaluator: Evaluator | None = None
        self._trainer: pl.Trainer
        self._evaluations_due = 0
        self._interrupt: KeyboardInterrupt | None = None
        self._updates: list[SimulatedUpdate] = []
        self._losses: list[LossPoint] = []
        self._evaluations: list[Evaluation] = []
        self._rounds: list[SimulatedRound] = []

    # ---- the run ----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Train; only once. After Ctrl-C, :meth:`result` and the module hold the run up to that time.

        Raises:
            KeyboardInterrupt: when interrupted.
            RuntimeError: if it has been run already.
        """
        if self._timeline is not None:
            raise RuntimeError("This simulation has been run. Make a new one.")
        with isolate_rng():
            torch.manual_seed(self._seed)
            random.seed(self._seed)
            np.random.seed(self._seed % 2**32)
            with _quiet():
                self._trainer = self._make_trainer()
                self._trainer.fit_loop = _VirtualLoop(self._trainer, self._simulate)
                if isinstance(self._data, pl.LightningDataModule):
                    self._trainer.fit(self._module, datamodule=self._data, val_dataloaders=self._val_dataloaders)
                else:
                    self._trainer.fit(self._module, self._data, self._val_dataloaders)
        if self._interrupt is not None:
            raise self._interrupt

    def _make_trainer(self) -> pl.Trainer:
        defaults: dict[str, Any] = {
            "accelerator": "auto",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        options = defaults | self._trainer_options
        return pl.Trainer(devices=1, max_steps=self._max_steps, max_epochs=-1, num_sanity_val_steps=0, **options)

    def _simulate(self, data: Any) -> None:
        """Train; Lightning calls this."""
        if getattr(self._trainer.precision_plugin, "scaler", None) is not None:
            raise ValueError(
                "Gradients that are scaled (`precision='16-mixed'`) have one scaler for all virtual workers. Use "
                "'bf16-mixed' or '32-true'."
            )
        size = len(self._workers)
        settings = self.settings
        layout = settings.layout(self._module)
        state = self._state = settings.global_model(layout, size)
        state.begin(layout.tensors(self._module))
        loaders = VirtualLoaders(data, size, self._seed)
        batches = [partial(loaders.passes, worker) for worker in range(size)]
        replicas = TrainingReplicas(self._trainer, self._module, state, settings, batches)
        self._evaluator = Evaluator(self._trainer, self._module, replicas, self._evaluate)
        self._timeline = Timeline(
            self._workers,
            self._max_steps,
            settings,
            state,
            replicas,
            self,
            self._network,
            DeltaCosts(tuple(part.numel for part in layout.fragments), state.sums, self._update_seconds),
            seed=self._seed,
        )
        try:
            with unlogged(self._module):
                call_lightning_module_hook(self._trainer, "on_train_start")
                self._evaluate_if_due()
                self._timeline.run()
                call_lightning_module_hook(self._trainer, "on_train_end")
        except KeyboardInterrupt as interrupt:
            self._interrupt = interrupt
        finally:
            replicas.close()

    # ---- see `Observer` ---------------------------------------------------------------------------------------------

    def updated(self, time: float, updates: Sequence[OuterUpdate]) -> None:
        """See :meth:`Observer.updated`."""
        for u in updates:
            update = SimulatedUpdate(time, u.version, u.worker, u.round, u.local_steps, u.samples, u.staleness)
            self._updates.append(update)

    def finished(self, rounds: Sequence[FinishedRound]) -> None:
        """See :meth:`Observer.finished`."""
        if self._trainer.received_sigterm:  # Lightning leaves the check to its loops
            raise SIGTERMException
        for r in rounds:
            self._rounds.append(SimulatedRound(r.worker, r.round, r.begin, r.end, r.local_steps, r.adopted))
            self._losses.append(LossPoint(r.end, r.all_steps, r.worker, r.loss))
            if self._on_round is not None:
                self._on_round(self._rounds[-1], self._losses[-1])
        self._evaluate_if_due()

    # ---- evaluation -------------------------------------------------------------------------------------------------

    def _evaluate_if_due(self) -> None:
        assert self._timeline is not None and self._state is not None and self._evaluator is not None
        steps = self._timeline.local_steps
        every = self._evaluate_every * len(self._workers) if self._evaluate_every is not None else None
        begun = self._evaluations_due > 0
        if begun and not self._timeline.over and (every is None or steps // every < self._evaluations_due):
            return
        self._evaluations_due = steps // every + 1 if every is not None else 1
        metrics = self._evaluator.metrics()
        if metrics is None:
            return
        evaluation = Evaluation(self._timeline.now, self._state.version, steps, metrics)
        self._evaluations.append(evaluation)
        if self._on_evaluation is not None:
            self._on_evaluation(evaluation)

    # ---- results ----------------------------------------------------------------------------------------------------

    @property
    def moment(self) -> tuple[float, int, int]:
        """The progress of the run: virtual time in seconds, local steps of all workers, outer updates."""
        if self._timeline is None or self._state is None:
            return 0.0, 0, 0
        return self._timeline.now, self._timeline.local_steps, self._state.version

    def result(self) -> SimulationResult:
        """The result of the run so far."""
        lanes = self._timeline.lanes if self._timeline is not None else []
        progress = self._timeline.progress if self._timeline is not None else None
        state = self._state
        nothing = (0,) * len(self._workers)
        return SimulationResult(
            workers=len(self._workers),
            settings=self.settings.fingerprint()
            | {"max_steps": self._max_steps, "seed": self._seed, "devices": [repr(w) for w in self._workers]}
            | {"network": repr(self._network), "update_seconds": self._update_seconds},
            seconds=self.moment[0],
            local_steps=tuple(lane.rounds.local_steps for lane in lanes) or nothing,
            version=state.version if state is not None else 0,
            updates=list(self._updates),
            losses=list(self._losses),
            evaluations=list(self._evaluations),
            rounds=list(self._rounds),
            present_seconds=tuple(lane.present_until(self.moment[0]) for lane in lanes) or (0.0,) * len(self._workers),
            busy_seconds=tuple(lane.busy_seconds for lane in lanes) or (0.0,) * len(self._workers),
            waits=[SimulatedWait(lane.rank, *wait) for lane in lanes for wait in lane.waits],
            waiting_seconds=tuple(lane.waiting_seconds for lane in lanes) or (0.0,) * len(self._workers),
            bytes_sent=tuple(self._timeline.exchange.bytes_sent) if self._timeline is not None else nothing,
            bytes_received=tuple(self._timeline.exchange.bytes_received) if self._timeline is not None else nothing,
            mean_staleness=progress.total_staleness / max(1, progress.updates) if progress is not None else 0.0,
            max_staleness=progress.max_staleness if progress is not None else 0,
            dropped=progress.dropped if progress is not None else nothing,
            digest=state.digest() if state is not None else "",
            state_dict=dict(state.state_dict()["tensors"]) if state is not None else {},
        )


def simulate(
    module: pl.LightningModule,
    data: Any,
    workers: Sequence[float | Device | VirtualWorker],
    max_steps: int,
    **options: Any,
) -> SimulationResult:
    """Train a module with virtual workers and return the result: a :class:`Simulation` in one call.

    Example::

        result = simulate(model, datamodule, workers=[1.72, 1.33, 0.66, 0.30], max_steps=1000, local_steps=50)
        print(result.utilization, result.mean_staleness, result.evaluations[-1].metrics)

    Args:
        module: see :class:`Simulation`, as all other arguments.
        data: training data.
        workers: speeds in local steps per second, devices or virtual workers.
        max_steps: local steps per worker.
        **options: further arguments of :class:`Simulation`, and fields of :class:`~lightning_async_localsgd.Settings`.

    Raises:
        ValueError: if an argument is outside its range.
    """
    simulation = Simulation(module, data, workers, max_steps, **options)
    simulation.run()
    return simulation.result()


class _VirtualLoop(FitLoop):
    """Replaces Lightning's training loop within ``fit``; everything before and after it is Lightning's own.

    Args:
        trainer: the trainer; its loop is replaced.
        simulate: trains, with the training data.
    """

    def __init__(self, trainer: pl.Trainer, simulate: Callable[[Any], None]) -> None:
        super().__init__(trainer, max_epochs=-1)
        self.epoch_loop = trainer.fit_loop.epoch_loop  # holds the trainer's `max_steps`
        self._simulate = simulate

    def run(self) -> None:
        """Train."""
        self._simulate(request_dataloader(self._data_source))


@contextmanager
def _quiet() -> Iterator[None]:
    """No messages of Lightning about the hardware in the body."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
