"""Sums of pseudo-gradients: where an outer update needs no more than the sum of a turn's deltas and their number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from torch.optim import Optimizer

from lightning_async_localsgd.outer.transforms import Transform

__all__ = ["SumOptimizer", "as_sum_optimizer", "needs_single_deltas", "takes_sums"]


@runtime_checkable
class SumOptimizer(Protocol):
    """An outer optimizer that takes the sum of several pseudo-gradients in one step.

    An optimizer declares so by having these members. Any other optimizer gets one pseudo-gradient per step.
    """

    def sum_sizes(self, count: int) -> list[int]:
        """The sizes of the sums in which the next ``count`` pseudo-gradients are to be given to :meth:`step`."""

    def step(self, closure: Callable[[], float] | None = None, *, count: int = 1) -> float | None:
        """Apply ``p.grad`` of every parameter as the sum of ``count`` pseudo-gradients."""


def as_sum_optimizer(optimizer: object) -> SumOptimizer | None:
    """The optimizer, if it takes sums."""
    return optimizer if isinstance(optimizer, SumOptimizer) else None


def takes_sums(optimizer: Optimizer, transforms: Sequence[Transform], quorum: int) -> bool:
    """Whether an outer update needs no more than the sum of deltas, so that they may be added up on their way.

    Args:
        optimizer: the outer optimizer.
        transforms: what pseudo-gradients go through before.
        quorum: deltas that one outer update takes the mean of.
    """
    return needs_single_deltas(optimizer, transforms, quorum) is None


def needs_single_deltas(optimizer: Optimizer, transforms: Sequence[Transform], quorum: int) -> str | None:
    """The text of a ``ValueError`` that names what needs single deltas; None: nothing does. See :func:`takes_sums`."""
    for transform in transforms:
        if not transform.per_delta:
            return (
                f"{type(transform).__name__} in `transforms` needs single deltas in sequence, not their sum. Use an "
                "exchange that brings single deltas, or transformations that are `per_delta`."
            )
    if quorum == 1 and as_sum_optimizer(optimizer) is None:
        return (
            f"The outer optimizer {type(optimizer).__name__} makes a step on each single delta, and cannot take their "
            "sum. Use an exchange that brings single deltas, a quorum, or `DelayedNesterov`."
        )
    return None
