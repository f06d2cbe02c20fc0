"""The global state: what every worker holds alike, moved only by outer updates applied in the same order."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_async_localsgd.layout import Layout
from lightning_async_localsgd.outer.delayed_nesterov import DelayedNesterov

__all__ = ["GlobalState", "OuterOptimizerFactory"]

OuterOptimizerFactory = Callable[[Iterable[Parameter]], Optimizer]


class GlobalState:
    """Global parameters, float buffers, outer optimizer and version: a replicated state machine.

    Two replicas that start alike and apply the same pseudo-gradients in the same order stay equal to the bit.

    Args:
        layout: where each tensor lies in the flat vector.
        outer_optimizer: makes the outer optimizer from the global parameters; None: :class:`DelayedNesterov`.
        workers: number of workers; a ``DelayedNesterov`` whose ``buffer_size`` is open gets it from here.
        quorum: deltas that one outer update takes the mean of (1: each delta is an outer update of its own).
        device: where the state lives.

    Raises:
        ValueError: if the outer optimizer's settings are impossible for this number of workers.
    """

    def __init__(
        self,
        layout: Layout,
        outer_optimizer: OuterOptimizerFactory | None = None,
        workers: int = 1,
        quorum: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        self.layout = layout
        self.workers = workers
        self.flat = layout.empty(device)
        """Global parameters, then global buffers: fp32, shape ``(layout.numel,)``."""
        self.pseudo_gradient = layout.empty(device)
        """What :meth:`apply` consumes: fp32, shape ``(layout.numel,)``."""
        self.parameters = [Parameter(view) for view in self._parameter_views(self.flat)]
        for parameter, gradient in zip(self.parameters, self._parameter_views(self.pseudo_gradient), strict=True):
            parameter.grad = gradient
        make = outer_optimizer or partial(DelayedNesterov, lr=0.7, momentum=0.9)
        self.optimizer = make(self.parameters)
        if isinstance(self.optimizer, DelayedNesterov):
            # An update by the mean of `quorum` deltas counts as one, so a buffer of all workers' deltas is shorter.
            self.optimizer.set_default_buffer_size(max(1, round(workers / quorum)))
        self.version = 0
        """Number of outer updates applied so far."""

    def _parameter_views(self, flat: Tensor) -> list[Tensor]:
        return self.layout.views(flat)[: self.layout.parameter_count]

    @torch.no_grad()
    def apply(self, deltas: int = 1) -> None:
        """Make one outer update from :attr:`pseudo_gradient`.

        Parameters go through the outer optimizer. Buffers are mixed: each worker's delta weighs 1/workers.

        Args:
            deltas: how many workers' deltas ``pseudo_gradient`` is the sum of; the update is by their mean.
        """
        if deltas > 1:
            self.pseudo_gradient.div_(deltas)
        self.optimizer.step()
        start = self.layout.parameter_numel
        if start < self.layout.numel:
            self.flat[start:].sub_(self.pseudo_gradient[start:].mul_(deltas / self.workers))
        self.version += 1

    @torch.no_grad()
    def measure(self, deltas: int = 1) -> tuple[float, float]:
        """L2 norm of the mean delta over the parameters, and its cosine with the outer momentum.

        Args:
            deltas: how many workers' deltas ``pseudo_gradient`` is the sum of.

        The cosine is NaN while there is no momentum. Between momentum updates that of delayed Nesterov holds the
        pseudo-gradients gathered since the last one as well.
        """
        products = torch.zeros(3, dtype=torch.float64)
        for parameter in self.parameters:
            state = self.optimizer.state[parameter]
            momentum = state.get("momentum", state.get("momentum_buffer"))
            gradient = parameter.grad
            assert gradient is not None
            products[0] += torch.linalg.vector_norm(gradient).double().cpu() ** 2
            if isinstance(momentum, Tensor):
                products[1] += (gradient * momentum).sum().double().cpu()
                products[2] += torch.linalg.vector_norm(momentum).double().cpu() ** 2
        norm = products[0].sqrt()
        return float(norm) / deltas, float(products[1] / (norm * products[2].sqrt()))

    def checksum(self) -> int:
        """Sum of the global state's bits as 64-bit integers: cheap enough to compare at every exchange."""
        return int(self.flat.view(torch.int64).sum())

    def digest(self) -> str:
        """BLAKE2b hash (hex) of version, global parameters, buffers and outer optimizer state."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(str(self.version).encode())
        _hash_tensor(digest, self.flat)
        for parameter in self.parameters:
            for name, value in sorted(self.optimizer.state[parameter].items()):
                digest.update(name.encode())
                if isinstance(value, Tensor):
                    _hash_tensor(digest, value)
                else:
                    digest.update(repr(value).encode())
        for group in self.optimizer.param_groups:
            digest.update(repr([(k, v) for k, v in sorted(group.items()) if k != "params"]).encode())
        return digest.hexdigest()

    def state_dict(self) -> dict[str, Any]:
        """Version, global parameters and buffers by name, and the outer optimizer's state; all copies."""
        tensors = self.layout.views(self.flat)
        return {
            "version": self.version,
            "tensors": {s.name: t.detach().clone() for s, t in zip(self.layout.slots, tensors, strict=True)},
            "optimizer": deepcopy(self.optimizer.state_dict()),
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state saved by :meth:`state_dict`.

        Raises:
            ValueError: if it belongs to another model; the difference is named and nothing is changed.
        """
        tensors = state_dict["tensors"]
        for slot in self.layout.slots:
            found = tuple(tensors[slot.name].shape) if slot.name in tensors else None
            if found != slot.shape:
                raise ValueError(
                    f"The saved state has {slot.name!r} as {found}, this model as {slot.shape}. Go on with the "
                    "model and the frozen layers of then, or begin anew from what `load_from_checkpoint` gives."
                )
        if extra := sorted(tensors.keys() - {slot.name for slot in self.layout.slots}):
            raise ValueError(f"The saved state has tensors that this model does not train: {extra}.")
        for slot, view in zip(self.layout.slots, self.layout.views(self.flat), strict=True):
            view.copy_(tensors[slot.name])
        buffer_sizes = [group.get("buffer_size") for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state_dict["optimizer"])
        for group, buffer_size in zip(self.optimizer.param_groups, buffer_sizes, strict=True):
            if buffer_size is not None:  # there may be more or fewer workers now
                group["buffer_size"] = buffer_size
                group["received"] %= buffer_size
        self.version = state_dict["version"]


def _hash_tensor(digest: hashlib.blake2b, tensor: Tensor) -> None:
    digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
