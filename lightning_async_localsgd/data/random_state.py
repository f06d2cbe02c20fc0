"""The global random generators of a process, as checkpoints hold them."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

__all__ = ["RandomState", "set_random_state"]


class RandomState:
    """The current states of Python's, NumPy's and torch's global generators.

    Construction is cheap: it may take place at every fetch of a batch.

    Args:
        device: an accelerator, to include the state of its generator; None or the CPU: none.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._python = random.getstate()
        self._numpy = np.random.get_state()
        self._torch = {"torch": torch.get_rng_state()}
        if device is not None and device.type != "cpu":
            self._torch["device"] = torch.get_device_module(device).get_rng_state(device)

    def state_dict(self) -> dict[str, Any]:
        """The states as tensors and plain values; see :func:`set_random_state`."""
        name, keys, *rest = self._numpy
        return {
            "python": self._python,
            "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
            **self._torch,
        }


def set_random_state(state: Mapping[str, Any], device: torch.device | None = None) -> None:
    """Restore the global generators.

    Args:
        state: the result of :meth:`RandomState.state_dict`.
        device: the accelerator to set; an accelerator of another kind than the state's keeps its state.
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
