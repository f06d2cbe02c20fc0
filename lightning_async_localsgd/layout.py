"""The flat layout: where each trainable parameter and float buffer of a module lies in one vector."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

__all__ = ["Layout", "Slot"]

_ALIGNMENT = 16  # elements; every tensor of the flat vector starts on a 64-byte boundary


class Slot(NamedTuple):
    """One tensor's place in the flat vector."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int

    @property
    def numel(self) -> int:
        """Number of elements of the tensor."""
        return torch.Size(self.shape).numel()


class Layout:
    """Maps the tensors that workers share to one contiguous fp32 vector, alike on every worker.

    Trainable parameters come first, in the order of ``module.named_parameters()``; floating-point buffers (BatchNorm
    statistics) follow. Frozen parameters, integer buffers and buffers with infinite elements (attention masks) have no
    place in it. Tied parameters appear once.

    Args:
        module: the module to share.
        frozen: whether frozen parameters have a place among the trainable ones, so that they can be unfrozen later; not
            those that hold integers or infinite elements, which nobody trains.

    Raises:
        ValueError: if the module has no trainable parameter, or one that is not a dense floating-point tensor, or any
            parameter or buffer that is not initialized yet.
    """

    def __init__(self, module: nn.Module, frozen: bool = False) -> None:
        _check_initialized(module)
        parameters = [
            (name, p) for name, p in module.named_parameters() if p.requires_grad or (frozen and _could_train(p))
        ]
        buffers = [(name, b) for name, b in module.named_buffers() if _is_statistic(b)]
        if not any(p.requires_grad for _, p in parameters):
            raise ValueError(
                f"{type(module).__name__} has no trainable parameters, so there is nothing to exchange. Set "
                "`requires_grad=True` on the parameters to train before `fit`."
            )
        for name, p in parameters:
            if not p.is_floating_point() or p.layout is not torch.strided:
                raise ValueError(f"Parameter {name!r} is {p.dtype}, {p.layout}: only dense real tensors can be shared.")
        named = parameters + buffers
        sizes = [-(-t.numel() // _ALIGNMENT) * _ALIGNMENT for _, t in named]
        ends = list(accumulate(sizes))
        self.slots = [
            Slot(name, tuple(t.shape), str(t.dtype).removeprefix("torch."), end - size)
            for (name, t), size, end in zip(named, sizes, ends, strict=True)
        ]
        self.parameter_count = len(parameters)
        self._parameter_names = {name for name, _ in parameters}
        self.numel = ends[-1]
        self.parameter_numel = ends[self.parameter_count - 1]

    @property
    def parameter_slots(self) -> list[Slot]:
        """The places of the trainable parameters, without those of the buffers."""
        return self.slots[: self.parameter_count]

    def tensors(self, module: nn.Module) -> list[Tensor]:
        """The tensors of ``module`` (the one this layout was made of, or a like one) in the order of the slots."""
        named = dict(module.named_parameters()) | dict(module.named_buffers())
        try:
            return [named[slot.name].detach() for slot in self.slots]
        except KeyError as error:
            raise RuntimeError(
                f"{error} was a parameter or buffer of {type(module).__name__} when training started and is not any "
                "more (pruning and parametrizations rename what they act on). Change the module before `fit`."
            ) from None

    def empty(self, device: torch.device | str = "cpu", pin_memory: bool = False) -> Tensor:
        """A flat fp32 vector of zeros, shape ``(numel,)``. The gaps between tensors stay zero for good."""
        return torch.zeros(self.numel, dtype=torch.float32, device=device, pin_memory=pin_memory)

    def views(self, flat: Tensor) -> list[Tensor]:
        """One view of ``flat`` (shape ``(numel,)``) per tensor, each in the shape of its tensor."""
        return [flat[slot.offset : slot.offset + slot.numel].view(slot.shape) for slot in self.slots]

    def others(self, module: nn.Module) -> list[Tensor]:
        """The tensors of ``module`` that have no place in the flat vector: what is alike on all workers, or counted."""
        shared = {slot.name for slot in self.slots}
        named = dict(module.named_parameters()) | dict(module.named_buffers())
        return [tensor.detach() for name, tensor in named.items() if name not in shared and tensor.numel() > 0]

    def check_trainable(self, module: nn.Module) -> None:
        """Refuse a parameter that was unfrozen on the way: it would train apart on every worker.

        Raises:
            RuntimeError: naming it.
        """
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and name not in self._parameter_names:
                raise RuntimeError(
                    f"Parameter {name!r} was frozen (or not there) when training started and is trainable now: it is "
                    "not exchanged. Pass `exchange_frozen=True`, so that frozen parameters can be unfrozen at any "
                    "time, or call `fit` again for each stage of fine-tuning."
                )

    def describe(self) -> Iterator[str]:
        """One line per tensor, to compare the models of two workers."""
        for slot in self.slots:
            yield f"{slot.name}: {slot.dtype}{list(slot.shape)}"


def _check_initialized(module: nn.Module) -> None:
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if is_lazy(tensor):
            raise ValueError(
                f"{name!r} of {type(module).__name__} is lazy and not initialized yet, so workers cannot share it. Run "
                "a batch through the module in `configure_model` (or before `fit`), where its optimizers find it too."
            )


def _could_train(parameter: Tensor) -> bool:
    return parameter.layout is torch.strided and _is_statistic(parameter)


def _is_statistic(buffer: Tensor) -> bool:
    return buffer.is_floating_point() and buffer.numel() > 0 and bool(torch.isfinite(buffer).all())
