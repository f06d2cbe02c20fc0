"""Copies from and to an accelerator, of whatever make: what waits for them."""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["can_pin", "copied", "synchronize"]


def copied(device: torch.device) -> Callable[[], object]:
    """What waits, on any thread, until all that this thread's current stream of ``device`` has been given is done."""
    if not _is_accelerator(device):
        return _nothing
    try:
        event = torch.Event(device)
        event.record(torch.accelerator.current_stream(device))
    except (RuntimeError, NotImplementedError):  # an accelerator without streams or events
        torch.accelerator.synchronize(device)
        return _nothing
    return event.synchronize


def synchronize(device: torch.device) -> None:
    """Wait until all that this thread's current stream of ``device`` has been given is done."""
    copied(device)()


def can_pin(device: torch.device, host: torch.device) -> bool:
    """Whether memory of ``host`` is worth pinning for copies from and to ``device``."""
    return host.type == "cpu" and _is_accelerator(device) and device.type != "mps"  # which has no memory of its own


def _is_accelerator(device: torch.device) -> bool:
    accelerator = torch.accelerator.current_accelerator()
    return accelerator is not None and accelerator.type == device.type


def _nothing() -> None:
    """A copy on the CPU is complete when it returns."""
