"""The budget of a run: its remaining local steps and their division. Pure functions of shared progress."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Budget", "allocate", "estimate_steps", "estimate_total"]


def allocate(amount: int, weights: Sequence[int]) -> list[int]:
    """Split ``amount`` steps in proportion to ``weights``, by largest remainder, ties to the lower rank.

    Args:
        amount: number of steps, at least 0.
        weights: one weight per worker, at least 0; one of them positive.

    Returns:
        One share per worker; they add up to ``amount``.
    """
    total = sum(weights)
    shares = [amount * w // total for w in weights]
    by_remainder = sorted(range(len(weights)), key=lambda i: (-(amount * weights[i] % total), i))
    for i in by_remainder[: amount - sum(shares)]:
        shares[i] += 1
    return shares


@dataclass(frozen=True)
class Budget:
    """The number of local steps of a run.

    Args:
        max_steps: local steps per worker, on average (``shared``) or exactly; None: no limit.
        workers: number of workers.
        shared: whether the workers spend ``max_steps * workers`` together, the fast ones more of it.
        open_end: whether ``max_steps`` is only an estimate from the amount of data. No worker stops by an estimate;
            it serves planning alone.
        spent: local steps of it that none of the workers has made: those of processes that are gone.

    References:
        Liu et al. 2024 (arXiv 2401.09135), Algorithm 4: a run ends when the sum of local updates reaches its budget.
    """

    max_steps: int | None
    workers: int
    shared: bool = True
    open_end: bool = False
    spent: int = 0

    @property
    def _left(self) -> int:
        assert self.max_steps is not None
        return self.max_steps * self.workers - self.spent

    def caps(
        self,
        steps: Sequence[int],
        weights: Sequence[int],
        reserved: Sequence[int] = (),
        final: Sequence[bool] = (),
    ) -> tuple[int, ...] | None:
        """The local steps at which each worker stops, so that all end at the same time; None: no limit.

        Computed at every exchange from the same numbers on every worker: the remaining steps are divided by pace. A
        worker that reaches its cap early gets part of the remaining steps of slower ones, so that together they spend
        the budget.

        Args:
            steps: local steps of each worker so far.
            weights: each worker's pace, in local steps per round.
            reserved: local steps that each worker may make before it learns of these caps, and so keeps. Empty: none.
            final: whether each worker has ended; the others share the remaining steps. Empty: no worker has.

        Returns:
            Cumulative local steps at which each worker stops.
        """
        if self.max_steps is None:
            return None
        if not self.shared:
            return (self.max_steps,) * len(steps)
        least = reserved or [0] * len(steps)
        remaining = max(self._left - sum(steps), sum(least))
        if final and not all(final):
            weights = [0 if ended else w for w, ended in zip(weights, final, strict=True)]
        shares = _allocate_at_least(remaining, weights, least)
        return tuple(made + share for made, share in zip(steps, shares, strict=True))

    def exhausted(self, steps: Sequence[int], reserved: Sequence[int] = ()) -> bool:
        """Whether nothing of a shared budget is left to divide: it is spent, or reserved by those who will spend it."""
        if not self.shared or self.max_steps is None or self.open_end:
            return False
        return sum(steps) + sum(reserved) >= self._left


def _allocate_at_least(amount: int, weights: Sequence[int], least: Sequence[int]) -> list[int]:
    """As :func:`allocate`, but nobody gets less than it has to. ``amount`` is enough for that."""
    shares = allocate(amount, weights)
    short: set[int] = set()
    while lacking := {i for i, share in enumerate(shares) if share < least[i]}:
        short |= lacking
        others = [0 if i in short else weight for i, weight in enumerate(weights)]
        rest = amount - sum(least[i] for i in short)
        shares = allocate(rest, others) if any(others) else [0] * len(weights)
        for i in short:
            shares[i] = least[i]
    return shares


def estimate_steps(steps: Sequence[int], weights: Sequence[int], worker: int, own_steps: int) -> tuple[int, ...]:
    """Local steps of each worker now; see :func:`estimate_total`."""
    advance = own_steps - steps[worker]
    return tuple(made + advance * weight // weights[worker] for made, weight in zip(steps, weights, strict=True))


def estimate_total(steps: Sequence[int], weights: Sequence[int], worker: int, own_steps: int) -> int:
    """One worker's estimate, between two exchanges, of the current local steps of all workers.

    It assumes that the others have advanced since the last exchange in proportion to their pace. No clock is read, so
    equal workers in synchronous mode get equal estimates.

    Args:
        steps: local steps of each worker at the last exchange.
        weights: each worker's pace, in steps per round.
        worker: rank of the estimating worker.
        own_steps: current local steps of that worker.
    """
    advance = own_steps - steps[worker]
    return sum(steps) + advance * sum(weights) // weights[worker]
