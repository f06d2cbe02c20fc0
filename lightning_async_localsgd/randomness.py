"""The global random generators of a process, as checkpoints hold them."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

__all__ = ["random_state", "set_random_state"]


def random_state(device: torch.device | None = None) -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's global generators, as tensors and plain values.

    Args:
        device: an accelerator, for the state of its generator as well; None or the CPU: none.
    """
    name, keys, *rest = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if device is not None and device.type != "cpu":
        state["device"] = torch.get_device_module(device).get_rng_state(device)
    return state


def set_random_state(state: Mapping[str, Any], device: torch.device | None = None) -> None:
    """Put the global generators where they were.

    Args:
        state: what :func:`random_state` gave.
        device: the accelerator to set; one of another kind than the state's keeps its own.
    """
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    name, numbers, *rest = state["numpy"]
    np.random.set_state((name, numbers.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    saved = state.get("device")
    if saved is not None and device is not None and device.type != "cpu":
        module = torch.get_device_module(device)
        if saved.numel() == module.get_rng_state(device).numel():
            module.set_rng_state(saved.cpu(), device)
