"""Evaluating the global model of a simulation, by the user's function or by Lightning's validation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_async_localsgd.internals import validation_source
from lightning_async_localsgd.simulation.replicas import TrainingReplicas

__all__ = ["Evaluator", "unlogged"]

_LOGGING = ("log", "log_dict")


class Evaluator:
    """Evaluates the global model.

    Args:
        trainer: the trainer of the simulation.
        module: the live module.
        replicas: the replicas, which put the global model into it.
        evaluate: gives the metrics of the module; None: Lightning's validation does, if there is data for it.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        replicas: TrainingReplicas,
        evaluate: Callable[[pl.LightningModule], Mapping[str, float]] | None,
    ) -> None:
        self._trainer = trainer
        self._module = module
        self._replicas = replicas
        self._evaluate = evaluate

    def metrics(self) -> dict[str, float] | None:
        """The metrics of now by name; None if there is no way to evaluate."""
        if self._evaluate is None and not self._has_validation:
            return None
        with self._replicas.swap_in_global(), _logged(self._module):
            return self._validate() if self._evaluate is None else self._apply(self._evaluate)

    @torch.no_grad()
    def _apply(self, evaluate: Callable[[pl.LightningModule], Mapping[str, float]]) -> dict[str, float]:
        modes = {name: module.training for name, module in self._module.named_modules()}
        self._module.eval()
        try:
            return {name: float(value) for name, value in evaluate(self._module).items()}
        finally:
            for name, module in self._module.named_modules():
                module.training = modes[name]

    @property
    def _has_validation(self) -> bool:
        source = validation_source(self._trainer)
        return source.is_defined() and is_overridden("validation_step", self._module)

    def _validate(self) -> dict[str, float]:
        """Lightning's own validation, as in ``fit``."""
        trainer = self._trainer
        trainer.validating = True
        try:
            trainer.fit_loop.epoch_loop.val_loop.run()
        finally:
            trainer.training = True
        return {name: float(value) for name, value in trainer.callback_metrics.items()}


@contextmanager
def unlogged(module: pl.LightningModule) -> Iterator[None]:
    """Training steps of many workers are not logged one by one: it would cost time and tell nothing."""
    for name in _LOGGING:
        setattr(module, name, _ignore)
    try:
        yield
    finally:
        for name in _LOGGING:
            delattr(module, name)


@contextmanager
def _logged(module: pl.LightningModule) -> Iterator[None]:
    """What validation logs counts."""
    names = [name for name in _LOGGING if name in vars(module)]
    for name in names:
        delattr(module, name)
    try:
        yield
    finally:
        for name in names:
            setattr(module, name, _ignore)


def _ignore(*_: Any, **__: Any) -> None:
    """What a training step logs."""
