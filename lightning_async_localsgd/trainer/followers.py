"""Replacements, on workers other than 0, for validation metrics and for callbacks that decide by them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_async_localsgd.protocol.header import MESSAGE_BYTES, encode_message
from lightning_async_localsgd.protocol.messages import Metrics

__all__ = ["FollowedMetrics", "Inactive", "metric_messages"]


def _do_nothing(self: pl.Callback, *args: Any, **kwargs: Any) -> None:
    """Do nothing: worker 0's callback acts for all."""


def _no_state(self: pl.Callback) -> dict[str, Any]:
    """No state: worker 0's callback has it."""
    return {}


_HOOKS = {name: _do_nothing for name in dir(pl.Callback) if name.startswith("on_")}

Inactive: type = type("Inactive", (), {**_HOOKS, "state_dict": _no_state, "__doc__": "A callback without its hooks."})


class FollowedMetrics(dict[str, Tensor]):
    """``trainer.callback_metrics`` of workers out of step: a metric that is not known yet is NaN.

    Under DDP a validation metric exists on every rank after the same number of batches. Here a fast worker makes these
    batches before the job has, and the others continue training while worker 0 validates.
    """

    def __missing__(self, name: str) -> Tensor:
        warnings.warn(
            f"`trainer.callback_metrics[{name!r}]` is NaN on this worker so far: worker 0 validates for all, when the "
            "job has made its batches, and tells the others afterwards. Use `trainer.callback_metrics.get(...)`; or "
            "decide in hooks of the validation, which run on worker 0, or by `EarlyStopping`.",
            stacklevel=2,
        )
        return torch.tensor(float("nan"))


def metric_messages(metrics: Mapping[str, float]) -> Iterator[Metrics]:
    """Metrics as messages for the other workers, as many in each as it holds.

    Raises:
        ValueError: if a name is too long for a message.
    """
    part: dict[str, float] = {}
    for name, value in metrics.items():
        if not _fits({name: value}):
            raise ValueError(
                f"The metric {name[:60]!r}... has a name of {len(name)} characters, and worker 0 could not tell it to "
                f"the others in a message of {MESSAGE_BYTES} bytes. Log it under a shorter name."
            )
        if not _fits(part | {name: value}):
            yield Metrics(part)
            part = {}
        part[name] = value
    if part:
        yield Metrics(part)


def _fits(metrics: Mapping[str, float]) -> bool:
    try:
        encode_message(Metrics(metrics))
    except ValueError:
        return False
    return True
