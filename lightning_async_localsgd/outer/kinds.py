"""The kinds of a module's tensors: what is averaged over the workers, and what each keeps for itself."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

__all__ = ["could_train", "find_local_buffers", "is_finite", "statistics"]

_STORES = {"bank", "cache", "fifo", "history", "memory", "queue", "replay"}
_UNIT = 1e-3  # how far the length of a vector that was normalized may be from 1


def statistics(module: nn.Module, local: Iterable[str] = ()) -> Iterator[tuple[str, Tensor]]:
    """The buffers of ``module`` that are averaged over the workers, by name: running statistics.

    That is every dense floating-point buffer with finite elements, but for

    - those that ``local`` names;
    - stores of samples, which an average would make nonsense of: their name says so (``queue``, ``memory_bank``,
      ``kv_cache``...), or all their vectors have length 1, as those of a queue of normalized features;
    - those in float64 beside parameters of lower precision: they count, or add up, what fp32 would round.

    What a normalization layer owns is a statistic in any case, unless ``local`` names it.

    Args:
        module: the module.
        local: full names of buffers.
    """
    doubles = any(p.dtype == torch.float64 for p in module.parameters() if p.requires_grad)
    local = set(local)
    for name, buffer in module.named_buffers():
        if name in local or not (_is_dense_float(buffer) and is_finite(buffer)):
            continue
        if _normalizes(_owner(module, name)) or not (
            _is_store(name, buffer) or (buffer.dtype == torch.float64 and not doubles)
        ):
            yield name, buffer


def find_local_buffers(module: nn.Module, patterns: Sequence[str]) -> list[str]:
    """The names of the buffers that some pattern means, by its full name or the last part of it.

    Raises:
        ValueError: if a pattern means none.
    """
    names = [name for name, _ in module.named_buffers()]
    for pattern in patterns:
        if not any(_means(pattern, name) for name in names):
            raise ValueError(
                f"`local_buffers` has {pattern!r}, which no buffer of {type(module).__name__} is called. Its buffers: "
                f"{', '.join(names) or 'none'}."
            )
    return [name for name in names if any(_means(pattern, name) for pattern in patterns)]


def could_train(parameter: Tensor) -> bool:
    """Whether a frozen parameter may be trained later: not one that holds integers, or infinite elements (a mask)."""
    return _is_dense_float(parameter) and is_finite(parameter)


def is_finite(tensor: Tensor) -> bool:
    """Whether all elements are finite, in fp32 too, in which they are exchanged."""
    return bool(torch.isfinite(tensor.detach().float()).all())


def _is_dense_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.layout is torch.strided and tensor.numel() > 0


def _means(pattern: str, name: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name.rpartition(".")[2], pattern)


def _owner(module: nn.Module, name: str) -> nn.Module:
    return module.get_submodule(name.rpartition(".")[0])


def _normalizes(module: nn.Module) -> bool:
    """Whether it is a normalization layer: torch's, or one of the user's that is called so."""
    return isinstance(module, nn.modules.batchnorm._NormBase) or "norm" in type(module).__name__.lower()


def _is_store(name: str, buffer: Tensor) -> bool:
    words = re.split(r"[^a-z]+", name.rpartition(".")[2].lower())
    return not _STORES.isdisjoint(words) or any(_are_unit_vectors(buffer, dim) for dim in (0, -1))


def _are_unit_vectors(buffer: Tensor, dim: int) -> bool:
    if buffer.dim() < 2 or buffer.shape[dim] < 2:
        return False
    lengths = torch.linalg.vector_norm(buffer.detach().float(), dim=dim)
    return lengths.numel() > 1 and bool(((lengths - 1).abs() < _UNIT).all())
