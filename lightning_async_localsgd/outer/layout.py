"""The flat layout: where each trainable parameter and running statistic of a module lies in one vector.

The vector is cut into fragments: whole tensors, one after the other, that are exchanged together.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_async_localsgd.outer.kinds import could_train, find_local_buffers, statistics

__all__ = ["Fragment", "Layout", "Slot"]

_ALIGNMENT = 16  # elements; every tensor of the flat vector starts on a 64-byte boundary
_BLOCK = re.compile(r"((?:.*?\.)?\d+)\.")  # what a name in a list of modules begins with


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


class Fragment:
    """Some tensors of a module in a flat vector of their own: parameters first, then buffers.

    Args:
        slots: places of the tensors.
        parameter_count: number of them that are parameters.
        start: where the vector begins in that of the whole layout.
        first: position of the first slot among those of the whole layout.
    """

    def __init__(self, slots: Sequence[Slot], parameter_count: int, start: int = 0, first: int = 0) -> None:
        self.slots = list(slots)
        self.parameter_count = parameter_count
        ends = [slot.offset + _aligned(slot.numel) for slot in slots]
        self.numel = ends[-1]
        """Length of the vector."""
        self.parameter_numel = ends[parameter_count - 1]
        """Number of its first elements that hold parameters."""
        self.span = slice(start, start + self.numel)
        """The part of the whole layout's vector."""
        self.members = slice(first, first + len(self.slots))
        """The part of the whole layout's list of tensors."""

    @property
    def parameter_slots(self) -> list[Slot]:
        """The places of the trainable parameters, without those of the buffers."""
        return self.slots[: self.parameter_count]

    def empty(self, device: torch.device | str = "cpu", pin_memory: bool = False) -> Tensor:
        """A flat fp32 vector of zeros, shape ``(numel,)``. The gaps between tensors stay zero for good."""
        return torch.zeros(self.numel, dtype=torch.float32, device=device, pin_memory=pin_memory)

    def views(self, flat: Tensor) -> list[Tensor]:
        """One view of ``flat`` (shape ``(numel,)``) per tensor, each in the shape of its tensor."""
        return [flat[slot.offset : slot.offset + slot.numel].view(slot.shape) for slot in self.slots]

    def clear_gaps(self, flat: Tensor) -> None:
        """Put zeros into the gaps between tensors of ``flat``, which held something else before."""
        ends = [(slot.offset + slot.numel, slot.offset + _aligned(slot.numel)) for slot in self.slots]
        if gaps := [flat[end:following] for end, following in ends if end < following]:
            torch._foreach_zero_(gaps)

    def by_name(self, flat: Tensor) -> dict[str, Tensor]:
        """The views of the parameters alone, by their names."""
        return {slot.name: view for slot, view in zip(self.parameter_slots, self.views(flat), strict=False)}


class Layout(Fragment):
    """Maps the tensors that workers share to one contiguous fp32 vector, alike on every worker.

    Trainable parameters come first, fragment by fragment, within each in the order of ``module.named_parameters()``;
    the buffers that are running :func:`~lightning_async_localsgd.outer.kinds.statistics` follow, and belong to the last
    fragment. Nothing else has a place in it. Tied parameters, and parameters that are views of the same memory, appear
    once.

    A fragment takes whole blocks: the modules of a list, and what else has a name of its own in the module. One block
    after the other goes to the smallest fragment so far, so that blocks of one size are strided, as in Streaming
    DiLoCo. Where there are fewer blocks than fragments, single parameters are dealt out instead.

    Args:
        module: the module to share.
        frozen: whether frozen parameters have a place among the trainable ones, so that they can be unfrozen later; not
            those that hold integers or infinite elements, which nobody trains.
        local_buffers: patterns of names of buffers that have no place in it.
        fragments: number of fragments.

    Raises:
        ValueError: if the module has no trainable parameter, or one that cannot be exchanged: it is not a dense
            floating-point tensor, it is too large for fp32, or it shares a part of its memory with another. Also if any
            parameter or buffer is not initialized yet, a pattern means no buffer, or there are fewer parameters than
            fragments.

    References:
        Douillard et al. 2025, Streaming DiLoCo (arXiv 2501.18512), Section 2.2: strided fragments.
    """

    def __init__(
        self, module: nn.Module, frozen: bool = False, local_buffers: Sequence[str] = (), fragments: int = 1
    ) -> None:
        _check_initialized(module)
        parameters: list[tuple[str, Tensor]] = [
            (name, p) for name, p in module.named_parameters() if p.requires_grad or (frozen and could_train(p))
        ]
        if not any(p.requires_grad for _, p in parameters):
            raise ValueError(
                f"{type(module).__name__} has no trainable parameters, so there is nothing to exchange. Set "
                "`requires_grad=True` on the parameters to train before `fit`."
            )
        for name, p in parameters:
            _check_exchangeable(name, p)
        self._parameter_names = {name for name, _ in parameters}
        dealt = _deal(_without_views(parameters), fragments)
        parameters = [named for fragment in dealt for named in fragment]
        named = parameters + list(statistics(module, find_local_buffers(module, local_buffers)))
        starts = accumulate((_aligned(t.numel()) for _, t in named), initial=0)
        slots = [
            Slot(name, tuple(t.shape), str(t.dtype).removeprefix("torch."), start)
            for (name, t), start in zip(named, starts, strict=False)
        ]
        super().__init__(slots, len(parameters))
        self.fragments = list(_cut(slots, [len(fragment) for fragment in dealt]))
        """The fragments, one after the other."""
        self._frozen = [
            f"{name}: {str(p.dtype).removeprefix('torch.')}{list(p.shape)}, frozen"
            for name, p in module.named_parameters()
            if name not in self._parameter_names
        ]

    def tensors(self, module: nn.Module) -> list[Tensor]:
        """The tensors of ``module`` (the one this layout was made of, or a like one) in the order of the slots.

        In the place of a buffer that the module has dropped since, or replaced by one of another shape, is a tensor of
        NaN: what is written to it is lost, and what is not finite is left out of a delta.

        Raises:
            RuntimeError: naming a parameter that has gone or changed its shape.
        """
        named = dict(module.named_parameters()) | dict(module.named_buffers())
        found = [named.get(slot.name) for slot in self.slots]
        for slot, tensor in zip(self.parameter_slots, found, strict=False):
            if tensor is None or tuple(tensor.shape) != slot.shape:
                raise RuntimeError(
                    f"{slot.name!r} was a parameter of {type(module).__name__} when training started and is not any "
                    "more, or not of that shape (pruning and parametrizations rename what they act on). Change the "
                    "module before `fit`."
                )
        return self.fit([None if tensor is None else tensor.detach() for tensor in found])

    def fit(self, tensors: Sequence[Tensor | None]) -> list[Tensor]:
        """``tensors``, one per slot, with a tensor of NaN in the place of each that is not of its slot's shape."""
        device = next(tensor.device for tensor in tensors if tensor is not None)
        return [
            tensor
            if tensor is not None and tuple(tensor.shape) == slot.shape and tensor.is_floating_point()
            else torch.full(slot.shape, math.nan, device=device)
            for slot, tensor in zip(self.slots, tensors, strict=True)
        ]

    def others(self, module: nn.Module) -> dict[str, Tensor]:
        """The tensors of ``module`` that have no place in the flat vector, by name; but for sparse ones."""
        shared = {slot.name for slot in self.slots}
        named = dict(module.named_parameters()) | dict(module.named_buffers())
        return {
            name: tensor.detach()
            for name, tensor in named.items()
            if name not in shared and tensor.numel() > 0 and tensor.layout is torch.strided
        }

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
        yield from self._frozen


def _aligned(numel: int) -> int:
    return -(-numel // _ALIGNMENT) * _ALIGNMENT


def _deal(named: Sequence[tuple[str, Tensor]], fragments: int) -> list[list[tuple[str, Tensor]]]:
    """The parameters of each fragment; see :class:`Layout`."""
    if len(named) < fragments:
        raise ValueError(
            f"`fragments={fragments}` are more than the {len(named)} trainable parameters of the module, and each has "
            f"at least one. Pass at most {len(named)}."
        )
    blocks = [list(group) for _, group in groupby(named, lambda item: _block_name(item[0]))]
    if len(blocks) < fragments:
        blocks = [[item] for item in named]
    dealt: list[list[tuple[str, Tensor]]] = [[] for _ in range(fragments)]
    sizes = [0] * fragments
    for block in blocks:
        smallest = min(range(fragments), key=lambda i: sizes[i])
        dealt[smallest] += block
        sizes[smallest] += sum(tensor.numel() for _, tensor in block)
    return dealt


def _block_name(name: str) -> str:
    in_list = _BLOCK.match(name)
    return in_list[1] if in_list else name.rpartition(".")[0]


def _cut(slots: Sequence[Slot], counts: Sequence[int]) -> Iterator[Fragment]:
    """Fragments of so many parameters each; the last one takes the remaining slots as well."""
    ends = list(accumulate(counts))
    for count, end in zip(counts, ends, strict=True):
        first, start = end - count, slots[end - count].offset
        own = slots[first:] if end == ends[-1] else slots[first:end]
        yield Fragment([slot._replace(offset=slot.offset - start) for slot in own], count, start, first)


def _check_initialized(module: nn.Module) -> None:
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if is_lazy(tensor):
            raise ValueError(
                f"{name!r} of {type(module).__name__} is lazy and not initialized yet, so workers cannot share it. Run "
                "a batch through the module in `configure_model` (or before `fit`), where its optimizers find it too."
            )


def _check_exchangeable(name: str, parameter: Tensor) -> None:
    if not parameter.is_floating_point() or parameter.layout is not torch.strided:
        raise ValueError(
            f"Parameter {name!r} is {parameter.dtype}, {parameter.layout}: only dense real tensors can be shared."
        )
    if parameter.dtype == torch.float64 and bool((parameter.isfinite() & ~parameter.float().isfinite()).any()):
        raise ValueError(
            f"Parameter {name!r} has elements beyond {torch.finfo(torch.float32).max:.1e}: parameters are exchanged in "
            "fp32. Scale it, or freeze it (`requires_grad=False`)."
        )


def _without_views(named: Sequence[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """Each memory once: a correction that were added to two views of it would move it twice.

    Raises:
        ValueError: if two share a part of their memory, or all of it in another shape.
    """
    kept: list[tuple[str, Tensor]] = []
    by_storage: dict[int, list[tuple[str, Tensor]]] = {}
    for name, tensor in named:
        neighbours = by_storage.setdefault(tensor.untyped_storage().data_ptr(), []) if tensor.numel() else []
        if any(_is_same_view(tensor, other) for _, other in neighbours):
            continue
        for other_name, other in neighbours:
            if _overlap(tensor, other):
                raise ValueError(
                    f"Parameters {other_name!r} and {name!r} share a part of their memory, or lay it out differently: "
                    "what workers exchange would move it twice. Use one parameter and take views of it in `forward`."
                )
        neighbours.append((name, tensor))
        kept.append((name, tensor))
    return kept


def _is_same_view(a: Tensor, b: Tensor) -> bool:
    return (a.data_ptr(), a.dtype, a.shape, a.stride()) == (b.data_ptr(), b.dtype, b.shape, b.stride())


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one storage have a byte in common."""
    (a_start, a_end), (b_start, b_end) = _extent(a), _extent(b)
    if a_end <= b_start or b_end <= a_start:
        return False
    if a.dtype != b.dtype:
        return True
    elements = torch.zeros(a.untyped_storage().nbytes() // a.element_size(), dtype=torch.bool)
    _as_in(elements, a).fill_(True)
    return bool(_as_in(elements, b).any())


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The addresses of its first byte and past its last one."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _as_in(elements: Tensor, tensor: Tensor) -> Tensor:
    return elements.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
