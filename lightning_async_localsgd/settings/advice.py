"""Warnings about settings that are valid and useless: given once, at the start, with advice."""

from __future__ import annotations

import math
import warnings

import torch

from lightning_async_localsgd.outer import AsyncBuffer, DelayedNesterov
from lightning_async_localsgd.protocol.round_length import AUTO, RoundLength
from lightning_async_localsgd.settings import Settings

__all__ = ["FEW_ROUNDS", "SettingsWarning", "useless_settings", "warn_of_useless_settings"]


FEW_ROUNDS = 20
"""Minimum number of rounds per worker; with fewer a run learns less than it could."""


class SettingsWarning(UserWarning):
    """A warning about settings without any useful effect."""


def useless_settings(settings: Settings, workers: int, max_steps: int | None) -> list[str]:
    """Advice on the useless settings of a run: a sentence or two for each.

    Args:
        settings: settings of the run.
        workers: number of workers.
        max_steps: local steps per worker, on average; None: unknown.
    """
    found = []
    optimizer = None
    if settings.outer_optimizer is not None:
        optimizer = settings.outer_optimizer([torch.nn.Parameter(torch.zeros(1))])
        if all(group.get("lr") == 0 for group in optimizer.param_groups):
            found.append(
                "The outer optimizer has the learning rate 0: the global parameters stay as they are, and what workers "
                "learn is lost. Pass a positive one; 0.7 is the default."
            )
    if not max_steps:  # None: unknown; 0: a resumed run that has made all of its steps
        return found
    length = settings.round_length(max_steps).first()
    if max_steps < length:
        found.append(
            f"`local_steps={length}` are more than the {max_steps} steps that each worker makes on average: not one "
            "round is as long as asked for, and hardly anything is exchanged before the end. Make rounds shorter, "
            f"`local_steps={max(1, max_steps // FEW_ROUNDS)}` for instance, or train for longer."
        )
    elif workers > 1 and max_steps < FEW_ROUNDS * length and settings.local_steps != AUTO:
        found.append(
            f"`local_steps={length}` makes {max_steps // length} rounds per worker in a run of {max_steps} steps: so "
            f'few that what it learns falls behind synchronous training. Leave `local_steps` to "auto", which '
            f"makes rounds of {RoundLength(AUTO, max_steps).first()} steps here, or train for longer."
        )
    deltas = workers * math.ceil(max_steps * workers / length)  # upper bound: all as fast as the fastest
    found += [
        f"`AsyncBuffer(size={transform.size})` is never full: all {workers} workers together send at most {deltas} "
        "pseudo-gradients, and the global parameters stay as they are. Make it smaller."
        for transform in settings.transforms
        if isinstance(transform, AsyncBuffer) and (transform.size or 0) > deltas
    ]
    if isinstance(optimizer, DelayedNesterov) and (optimizer.param_groups[0].get("buffer_size") or 0) > deltas:
        found.append(
            f"`DelayedNesterov(buffer_size={optimizer.param_groups[0]['buffer_size']})` is never full: all {workers} "
            f"workers together send at most {deltas} pseudo-gradients, and momentum never acts. Leave `buffer_size` "
            "out: it is then the number of workers."
        )
    return found


def warn_of_useless_settings(settings: Settings, workers: int, max_steps: int | None) -> None:
    """Warn of each useless setting; see :func:`useless_settings`."""
    for sentence in useless_settings(settings, workers, max_steps):
        warnings.warn(sentence, SettingsWarning, stacklevel=3)
