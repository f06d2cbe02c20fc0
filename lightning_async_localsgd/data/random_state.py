"""The global random generators of a process, as checkpoints hold them."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

__all__ = ["RandomState", "set_random_state"]


class RandomState:
    """The states of Python's, NumPy's and torch's global generators as of now.

    Taking one is cheap: it may be done at every fetch of a batch, most of which no checkpoint asks for.

    Args:
        device: an accelerator, for the state of its generator as well; None or the CPU: none.
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
    """Put the global generators where they were.

    Args:
        state: what :meth:`RandomState.state_dict` gave.
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
