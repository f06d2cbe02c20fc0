"""The live module: one module in memory, shared by all replicas in turn."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lightning_async_localsgd.outer.layout import Layout

__all__ = ["LiveModule", "Own"]


class _ParameterPlace:
    """A parameter of the live module. Its values are swapped; the object, which optimizers refer to, stays."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self._parameter = parameter

    def get(self) -> Tensor:
        return self._parameter.data

    def set(self, values: Tensor) -> None:
        self._parameter.data = values


class _BufferPlace:
    """A buffer of the live module, which may be registered under several names."""

    def __init__(self, owners: Sequence[tuple[nn.Module, str]]) -> None:
        self._owners = owners

    def get(self) -> Tensor:
        owner, name = self._owners[0]
        buffer = owner._buffers[name]
        assert buffer is not None
        return buffer

    def set(self, values: Tensor) -> None:
        for owner, name in self._owners:
            owner._buffers[name] = values


class _Random(NamedTuple):
    """The state of all generators of random numbers."""

    python: Any
    numpy: Any
    torch: Tensor
    cuda: Tensor | None


class Own:
    """The state of one replica: its parameters, its buffers, and its random generators."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []  # by place; the module's tensors while the replica is live
        self.random: _Random | None = None


class LiveModule:
    """Gives one module to many replicas, one at a time: swaps tensors in and out without copying them.

    Replicas share frozen parameters without a slot in the layout, and everything that is neither parameter nor buffer.

    Args:
        module: the module, on its device.
        layout: the layout of the exchanged tensors.
    """

    def __init__(self, module: nn.Module, layout: Layout) -> None:
        self._module = module
        self._layout = layout
        self._device = next(module.parameters()).device
        self._places, self._slots = _find_places(module, layout)
        self._original = [place.get() for place in self._places]
        self._live: Own | None = None
        self._random = self._get_random()
        exchanged = {slot.name for slot in layout.parameter_slots}
        self._shared = {name: p for name, p in module.named_parameters() if name not in exchanged}
        self._versions = {name: p._version for name, p in self._shared.items()}

    def adopt(self, own: Own, like: Own) -> None:
        """Give a new replica copies of another replica's tensors, or of the module's if that replica has none yet."""
        own.tensors = [tensor.clone() for tensor in self._tensors(like) or self._original]
        own.random = self._random  # the same for all, as in processes with the same seed

    def exchanged(self, own: Own) -> list[Tensor]:
        """A replica's exchanged tensors, in the order of the layout."""
        tensors = self._tensors(own)
        return self._layout.fit([tensors[place] for place in self._slots])

    def enter(self, own: Own) -> bool:
        """Swap this replica into the module. Returns whether another replica was in it before."""
        if own is self._live:
            return False
        self._leave()
        for place, tensor in zip(self._places, own.tensors, strict=True):
            place.set(tensor)
        assert own.random is not None
        self._set_random(own.random)
        self._live = own
        return True

    def _leave(self) -> None:
        if self._live is not None:
            self._tensors(self._live)
            self._live.random = self._get_random()
            self._live = None

    def _tensors(self, own: Own) -> list[Tensor]:
        if own is self._live:
            own.tensors = [place.get() for place in self._places]
        return own.tensors

    def check_unshared(self) -> None:
        """Refuse training that changes a parameter shared by all replicas.

        Raises:
            RuntimeError: naming the parameter.
        """
        self._layout.check_trainable(self._module)
        for name, parameter in self._shared.items():
            if parameter._version != self._versions[name]:
                raise RuntimeError(
                    f"Parameter {name!r} has `requires_grad=False` and was changed in training (is it an average of "
                    "others?). A simulation keeps one copy of such parameters for all workers: register it as a "
                    "buffer instead, of which each worker has its own."
                )

    @contextmanager
    def swap_in(self, values: Tensor, leader: Own) -> Iterator[None]:
        """In the body the module holds these global values (flat), and otherwise worker 0's tensors."""
        self._leave()
        with torch.no_grad():
            tensors = [tensor.clone() for tensor in leader.tensors or self._original]
            torch._foreach_copy_(self._layout.fit([tensors[p] for p in self._slots]), self._layout.views(values))
        state = self._get_random()
        for place, tensor in zip(self._places, tensors, strict=True):
            place.set(tensor)
        try:
            yield
        finally:
            self._set_random(state)

    @torch.no_grad()
    def close(self, values: Tensor, leader: Own) -> None:
        """Restore the module's original tensors, filled with these global values."""
        with self.swap_in(values, leader):
            final = [place.get() for place in self._places]
        for place, original, tensor in zip(self._places, self._original, final, strict=True):
            place.set(original.copy_(tensor) if original.shape == tensor.shape else tensor)

    def _get_random(self) -> _Random:
        cuda = torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else None
        return _Random(random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda)

    def _set_random(self, state: _Random) -> None:
        random.setstate(state.python)
        np.random.set_state(state.numpy)
        torch.set_rng_state(state.torch)
        if state.cuda is not None:
            torch.cuda.set_rng_state(state.cuda, self._device)


def _find_places(module: nn.Module, layout: Layout) -> tuple[list[_ParameterPlace | _BufferPlace], list[int]]:
    """The places of the module in which replicas differ, and the place of each slot of the layout."""
    places: list[_ParameterPlace | _BufferPlace] = []
    found: dict[str, int] = {}
    parameters = dict(module.named_parameters())
    for slot in layout.parameter_slots:
        found[slot.name] = len(places)
        places.append(_ParameterPlace(parameters[slot.name]))
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for prefix, owner in module.named_modules():
        for name, buffer in owner._buffers.items():
            if buffer is None:
                continue
            if id(buffer) not in owners:
                owners[id(buffer)] = []
                found[f"{prefix}.{name}" if prefix else name] = len(places)
                places.append(_BufferPlace(owners[id(buffer)]))
            owners[id(buffer)].append((owner, name))
    return places, [found[slot.name] for slot in layout.slots]
