"""The guard: detects that a run learns badly, and warns once with advice."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_async_localsgd.protocol.progress import OuterUpdate
from lightning_async_localsgd.protocol.round_length import AUTO
from lightning_async_localsgd.settings import Settings
from lightning_async_localsgd.settings.advice import FEW_ROUNDS, SettingsWarning
from lightning_async_localsgd.worker.rank import WorkerRank

__all__ = ["Guard", "MeanLoss"]

_IN_A_ROW = 3  # bad rounds before a warning: a single one may be a hard batch
_SETTLED = 3  # rounds before the first check
_LOST = 0.5  # fraction of the loss's decrease
_RISEN = 0.1  # fraction of a loss that has never decreased
_KEPT = 1024  # losses


class Guard:
    """Checks worker 0's rounds: their training loss, the alignment of their deltas, and their length.

    Args:
        settings: settings of the run.
        max_steps: local steps per worker of the run; None: unknown.
    """

    def __init__(self, settings: Settings, max_steps: int | None) -> None:
        self._settings = settings
        self._max_steps = max_steps
        self._checks: list[Callable[[float, float, int], str | None]] = [self._loss, self._direction, self._length]
        self._rounds = 0
        self._first = self._best = math.nan
        self._worse = 0
        self._against = 0

    def watch(self, updates: Iterable[OuterUpdate], loss: MeanLoss, worker: WorkerRank) -> None:
        """Warn of what is wrong with worker 0's latest round, if one of its deltas is among these updates."""
        if any(update.worker == 0 for update in updates):
            length = worker.summary().round_length
            for sentence in self.see_round(loss.take(), worker.alignment, length):
                rank_zero_warn(sentence, category=SettingsWarning)

    def see_round(self, loss: float, alignment: float, round_length: int) -> list[str]:
        """Check a round.

        Args:
            loss: approximate mean training loss of its steps; NaN: unknown.
            alignment: approximate cosine between the round's delta and the outer momentum; NaN: unknown.
            round_length: the current H.

        Returns:
            New warnings; each is given once in a run.
        """
        self._rounds += 1
        said = {check: check(loss, alignment, round_length) for check in self._checks}
        self._checks = [check for check in self._checks if said[check] is None]
        return [sentence for sentence in said.values() if sentence is not None]

    def _loss(self, loss: float, _: float, round_length: int) -> str | None:
        if math.isnan(loss):
            return None
        if math.isnan(self._first):
            self._first = self._best = loss
        gained = self._first - self._best
        limit = self._best + (_LOST * gained if gained > 0 else _RISEN * abs(self._first))
        self._worse = self._worse + 1 if loss > limit and self._rounds > _SETTLED else 0
        self._best = min(self._best, loss)
        if self._worse < _IN_A_ROW:
            return None
        return (
            f"The training loss has risen from {self._best:.4g} to {loss:.4g} and stays there: {_IN_A_ROW} rounds in a "
            f"row have lost half of what was learned, or more. {self._gentler()} If that does not help, make rounds "
            f"shorter: `local_steps={max(1, round_length // 2)}` instead of {round_length}."
        )

    def _direction(self, _: float, alignment: float, round_length: int) -> str | None:
        if math.isnan(alignment):
            return None
        self._against = self._against + 1 if alignment < 0 and self._rounds > _SETTLED else 0
        if self._against < _IN_A_ROW:
            return None
        return (
            f"What worker 0 learns points against the outer momentum, {_IN_A_ROW} rounds in a row (cosine "
            f"{alignment:.2f} in the last): the momentum leads too far. {self._gentler()}"
        )

    def _length(self, _: float, __: float, round_length: int) -> str | None:
        if self._settings.local_steps != AUTO or self._max_steps is None or self._max_steps == 0:
            return None
        if self._max_steps >= FEW_ROUNDS * round_length:
            return None
        return (
            f"An exchange takes so long that rounds have {round_length} steps, and the run, of {self._max_steps}, has "
            f"{self._max_steps // round_length} of them: so few that what it learns falls behind synchronous training. "
            'Send less (`codec="bf16"`), use a faster link, or train for longer.'
        )

    @staticmethod
    def _gentler() -> str:
        return (
            "Take a gentler outer optimizer: "
            "`outer_optimizer=functools.partial(outer.DelayedNesterov, lr=0.7, momentum=0.5)`."
        )


class MeanLoss:
    """The mean training loss between two calls of :meth:`take`; losses stay on their device until then."""

    def __init__(self) -> None:
        self._losses: deque[Tensor] = deque(maxlen=_KEPT)

    def see(self, outputs: Any) -> None:
        """Add the outputs of a training step, as passed to callbacks."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor) and loss.numel() == 1:
            self._losses.append(loss.detach())

    def take(self) -> float:
        """The mean since the last call, of the latest 1,024 losses; NaN without any."""
        losses, self._losses = self._losses, deque(maxlen=_KEPT)
        return float(torch.stack([loss.reshape(()).float() for loss in losses]).mean()) if losses else math.nan
