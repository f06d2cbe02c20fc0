"""Where rounds started: the global parameters that each worker's round began from, copied only once they move."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["RoundStarts"]


class RoundStarts:
    """Keeps one copy of the parameters per moment at which some worker's current round began, at most ``workers``.

    Workers that began together share a copy, and those that began from the parameters of now need none. At first all
    are of these.

    Args:
        parameters: the global parameters, flat; the vector that moves.
        workers: number of workers.
    """

    def __init__(self, parameters: Tensor, workers: int) -> None:
        self._parameters = parameters
        self._now = 0  # how often the parameters have moved
        self._began = [0] * workers
        self._copies: dict[int, Tensor] = {}
        self._spare: Tensor | None = None  # a copy that nobody needs any more, to be written over

    def of(self, worker: int) -> Tensor:
        """The parameters that the worker's round began from: a copy, or the parameters of now themselves."""
        return self._copies.get(self._began[worker], self._parameters)

    def begin(self, workers: Iterable[int]) -> None:
        """These workers begin their next rounds from the parameters of now."""
        for worker in workers:
            self._began[worker] = self._now
        for moment in self._copies.keys() - set(self._began):
            self._spare = self._copies.pop(moment)

    @torch.no_grad()
    def before_move(self) -> None:
        """To be called before the parameters move: keeps them, if a round began from them."""
        if self._now in self._began:
            copy, self._spare = self._spare, None
            self._copies[self._now] = self._parameters.clone() if copy is None else copy.copy_(self._parameters)
        self._now += 1

    def state_dict(self) -> dict[str, Any]:
        """What is kept, not copied again; equal on replicas that have moved alike."""
        moments = sorted(self._copies)
        index = {moment: i for i, moment in enumerate(moments)}
        return {
            "began": [index.get(moment, -1) for moment in self._began],  # -1: from the parameters of now
            "copies": [self._copies[moment] for moment in moments],
        }

    def load_state_dict(self, state_dict: dict[str, Any] | None) -> None:
        """Take over what :meth:`state_dict` gave.

        If there is nothing, or of another number of workers, all begin from the parameters of now.
        """
        began: Sequence[int] = (state_dict or {}).get("began", ())
        copies: Sequence[Tensor] = (state_dict or {}).get("copies", ())
        if len(began) != len(self._began):
            began, copies = [-1] * len(self._began), ()
        self._now, self._spare = len(copies), None
        self._began = [self._now if index < 0 else index for index in began]
        self._copies = {index: copy.to(self._parameters.device, copy=True) for index, copy in enumerate(copies)}
