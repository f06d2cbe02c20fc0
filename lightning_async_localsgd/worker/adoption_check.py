"""Detection of inner optimizers that undo adoptions."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["AdoptionCheck"]

_CHECKED = 3  # adoptions
_STEPS = 10  # of a round: one step of a long round is a small part of the way back, one of a short round may be all
_UNDONE = (0.8, 1.2)  # fraction of the way back


class AdoptionCheck:
    """Checks, for the first adoptions, whether the next step has reverted the parameters.

    An optimizer reverts them if it writes the parameters from copies that :class:`WeightCopies` has not found (in a
    closure, or flattened). The worker then learns nothing from the others.
    """

    def __init__(self) -> None:
        self._checks_left = _CHECKED
        self._undone = 0
        self._correction: list[Tensor] | None = None
        self._parameters = slice(0)
        self._before = self._square = 0.0
        self._steps = 0

    def pushed(self, steps: int) -> None:
        """Record the push of a round of ``steps`` local steps."""
        self._steps = steps

    @torch.no_grad()
    def adopted(self, parameters: slice, tensors: Sequence[Tensor], correction: Sequence[Tensor]) -> None:
        """Record an adoption: the correction has just been added to some parameters.

        Args:
            parameters: these parameters among the tensors.
            tensors: the worker's own tensors.
            correction: the tensor added to each; it must not change until :meth:`stepped`.
        """
        if self._checks_left > 0 and self._steps >= _STEPS:
            self._correction, self._parameters = list(correction), parameters
            self._square = _dot(correction, correction)
            self._before = _dot(tensors[parameters], correction)

    @property
    def pending(self) -> bool:
        """Whether :meth:`stepped` is to be called after the next step."""
        return self._correction is not None

    @torch.no_grad()
    def stepped(self, tensors: Sequence[Tensor], optimizers: Iterable[Optimizer]) -> None:
        """Check the next step of an optimizer.

        Args:
            tensors: the worker's own tensors.
            optimizers: the inner optimizers.
        """
        assert self._correction is not None
        names = " or ".join(type(optimizer).__name__ for optimizer in optimizers)
        back = self._before - _dot(tensors[self._parameters], self._correction)
        self._correction = None
        self._checks_left -= 1
        if self._square > 0 and _UNDONE[0] < back / self._square < _UNDONE[1]:
            self._undone += 1
        if self._undone == _CHECKED:
            warnings.warn(
                f"{names} puts the parameters back after each adoption, so that this worker learns nothing from "
                "the others. If it keeps copies of the weights, put them into its state or into an attribute, as "
                "tensors of the parameters' shapes, and name them by `weight_copies`.",
                stacklevel=3,
            )


def _dot(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    products = [
        torch.dot(a.flatten().float(), b.flatten().to(a.device).float()) for a, b in zip(first, second, strict=False)
    ]
    return sum(float(product) for product in products)
