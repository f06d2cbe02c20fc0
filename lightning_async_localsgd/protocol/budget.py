"""The budget of a run: its remaining local steps and their division. Pure functions of shared progress."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Budget", "allocate", "estimate_steps", "estimate_total", "share_holds"]

_VARIATION = 0.25  # of a pace from one turn to the next


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

    References:
        Liu et al. 2024 (arXiv 2401.09135), Algorithm 4: a run ends when the sum of local updates reaches its budget.
    """

    max_steps: int | None
    workers: int
    shared: bool = True
    open_end: bool = False

    def caps(
        self,
        steps: Sequence[int],
        weights: Sequence[int],
        under_way: Sequence[bool] = (),
        final: Sequence[bool] = (),
    ) -> tuple[int, ...] | None:
        """The local steps at which each worker stops, so that all end at the same time; None: no limit.

        Computed at every exchange from the same numbers on every worker: the remaining steps are divided by pace. A
        worker that reaches its cap early gets part of the remaining steps of slower ones, so that together they spend
        the budget.

        Args:
            steps: local steps of each worker so far.
            weights: each worker's pace, in local steps per round.
            under_way: whether each worker is making a step now; such a step counts as made. Empty: no worker is.
            final: whether each worker has ended; the others share the remaining steps. Empty: no worker has.

        Returns:
            Cumulative local steps at which each worker stops.
        """
        if self.max_steps is None:
            return None
        if not self.shared:
            return (self.max_steps,) * self.workers
        made = [done + step for done, step in zip(steps, under_way or [False] * self.workers, strict=True)]
        remaining = max(0, self.max_steps * self.workers - sum(made))
        if final and not all(final):
            weights = [0 if ended else w for w, ended in zip(weights, final, strict=True)]
        return tuple(done + share for done, share in zip(made, allocate(remaining, weights), strict=True))

    def exhausted(self, steps: Sequence[int], under_way: Sequence[bool] = ()) -> bool:
        """Whether a shared budget is spent, steps under way included."""
        if not self.shared or self.max_steps is None or self.open_end:
            return False
        return sum(steps) + sum(under_way) >= self.max_steps * self.workers


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


def share_holds(
    uncounted: int, counted: int, worker: int, caps: Sequence[int], steps: Sequence[int], weights: Sequence[int]
) -> bool:
    """Whether a worker's share of the budget will hold steps that a turn under way does not count.

    The turn divides what is left by pace. The share has to hold them even if the worker's pace falls by a quarter (or
    by the step that makes one of two), and if the others have made a quarter more, and a step, than their pace.

    Args:
        uncounted: these steps.
        counted: local steps of the worker that the turn counts.
        worker: its rank.
        caps: local steps at which each worker stops, before the turn.
        steps: local steps of each worker, before the turn.
        weights: each worker's pace, in local steps per round, before the turn.
    """
    own = weights[worker]
    rounds = (1 + _VARIATION) * (counted - steps[worker]) / own
    left = [max(0.0, cap - made - rounds * w - 1) for cap, made, w in zip(caps, steps, weights, strict=True)]
    left[worker] = caps[worker] - counted
    fallen = max(own / 2, min(own - 1, (1 - _VARIATION) * own))
    return uncounted <= sum(left) * fallen / (sum(weights) - own + fallen)
