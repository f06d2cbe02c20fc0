"""The decisions of callbacks that go by validation: worker 0 makes them for all, and tells them in the end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_async_localsgd.internals import LAST_SAVED
from lightning_async_localsgd.membership import StaticJob, as_json
from lightning_async_localsgd.trainer.fit import Fit
from lightning_async_localsgd.trainer.followers import Inactive
from lightning_async_localsgd.trainer.mixing import mix_in, mix_out

__all__ = ["Decisions"]

_DECIDING = (Checkpoint, EarlyStopping)
_BESIDE_STATE = "async_localsgd"


class Decisions:
    """Has the callbacks that decide by validation do nothing on workers that leave validation to worker 0.

    Args:
        fit: the ``fit``.
        callbacks: the callbacks of its trainer.
    """

    def __init__(self, fit: Fit, callbacks: Iterable[pl.Callback]) -> None:
        self._fit = fit
        self._deciding = [callback for callback in callbacks if isinstance(callback, _DECIDING)]

    def deactivate_callbacks(self) -> None:
        """From here on worker 0 decides for all."""
        for callback in self._deciding if self._fit.follows else []:
            mix_in(callback, Inactive)

    def reactivate_callbacks(self) -> None:
        """Have all callbacks run on this worker again."""
        for callback in self._deciding if self._fit.follows else []:
            mix_out(callback)

    def broadcast(self, job: StaticJob, metrics: Mapping[str, float]) -> None:
        """Give all workers what worker 0 has validated, saved and decided. All processes must call this.

        Everyone then knows the metrics and, for instance, the best checkpoint.

        Args:
            job: the processes.
            metrics: the metrics of this process' validation.
        """
        trainer = self._fit.trainer
        states = [_sendable_state(c) for c in self._deciding] if trainer.is_global_zero else None
        metrics, states = job.broadcast([metrics, states])
        if self._fit.leads:
            return
        trainer.callback_metrics.update({k: torch.tensor(v) for k, v in metrics.items()})
        for callback, state in zip(self._deciding, states, strict=False):
            if state is not None:
                vars(callback).update(state.pop(_BESIDE_STATE))
                callback.load_state_dict(state)


def _sendable_state(callback: pl.Callback) -> dict[str, Any] | None:
    """What all processes are told of a callback; None, with a warning, if they cannot be."""
    beside = {name: value for name, value in vars(callback).items() if name in LAST_SAVED}
    state = callback.state_dict() | {_BESIDE_STATE: beside}
    try:
        as_json(state)
    except TypeError as error:
        rank_zero_warn(
            f"What `{type(callback).__name__}` has decided on worker 0 stays there: its `state_dict` cannot be sent "
            f"to the other workers: {error}"
        )
        return None
    return state
