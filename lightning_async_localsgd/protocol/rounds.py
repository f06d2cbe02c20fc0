"""A worker's rounds: the step that ends each, and the end of the run. Pure: no clock, no threads, no tensors."""

from __future__ import annotations

import math
from typing import Any

import torch

from lightning_async_localsgd.protocol.budget import estimate_steps, estimate_total
from lightning_async_localsgd.protocol.pace import make_pace
from lightning_async_localsgd.protocol.progress import NO_REFERENCE_TURN, Progress
from lightning_async_localsgd.protocol.rules import Rules
from lightning_async_localsgd.protocol.sampling import draw_shard
from lightning_async_localsgd.protocol.turn import PushedRound

__all__ = ["Rounds", "whole_samples"]

_MOST_SAMPLES = 1 << 32  # of one local step
_OVERDUE = 1.5  # rounds since the last push of a fragment
_RESERVED = 0.25  # of a worker's share: a turn that takes longer is waited for
_RESERVED_AT_FIRST = 0.5  # while the duration of an exchange is unknown
_EXCHANGES = 2  # that a reserve lasts for, if the share does
_FEWEST = 2  # local steps that it has, if the share has


class Rounds:
    """Counts one worker's local steps and decides on its rounds, from the shared progress.

    The real worker and the simulated one share this class, so that the same progress leads to the same rounds.

    Args:
        rank: rank of the worker.
        size: number of workers.
        rules: settings of the run.
    """

    def __init__(self, rank: int, size: int, rules: Rules) -> None:
        self.rank = rank
        self.local_steps = 0
        """Local steps of this worker in this run."""
        self.round = 0
        """Number of pushes of this worker: without fragments of rounds."""
        self.shard = rank
        """The data shard of the current round: at first the worker's own, later drawn by progress (Eq. 2)."""
        self.round_steps = 0
        """Local steps since the last push."""
        self.round_samples = 0
        self.unsent = [0] * rules.fragments
        """Local steps since the last push of each fragment."""
        self.reference_turn = NO_REFERENCE_TURN
        """The latest reference turn that this worker has compared its rounds with."""
        self.shard_generator = torch.Generator().manual_seed(rank)
        self._size = size
        self._rules = rules
        self._pace = make_pace(rules.pace)
        self._lockstep = rules.lockstep(size)
        self._shared_budget = rules.shares_budget(size)
        self._max_steps: int | None = None
        self._open_end = False
        self._planned_at_begin = 0  # local steps of this round, as planned at its beginning
        self._shift = 0  # local steps to add to the planned length of this round
        self._pushed_steps = 0  # of the previous round
        self._ahead = 0  # in lockstep: own steps without a counterpart on the other workers
        self._job_steps = 0

    def start(self, progress: Progress, max_steps: int | None, open_end: bool = False) -> None:
        """Begin the run.

        Args:
            progress: the progress at the start, zero or resumed.
            max_steps: local steps per worker of the run; None: no limit.
            open_end: whether ``max_steps`` is only an estimate.
        """
        self._max_steps = max_steps
        self._open_end = open_end
        self._planned_at_begin = self._plan(progress)

    def join(self, progress: Progress) -> None:
        """Join a run in progress."""
        self.reference_turn = progress.reference_turn
        self._ahead = -max(progress.steps)

    # ---- the round --------------------------------------------------------------------------------------------------

    def count(self, samples: int) -> None:
        """Count a local step.

        Raises:
            TypeError: if ``samples`` is not a number.
            ValueError: if ``samples`` is not a whole number, or outside its range.
        """
        samples = whole_samples(samples)
        self.local_steps += 1
        self.round_steps += 1
        self.round_samples += samples
        self.unsent = [steps + 1 for steps in self.unsent]

    def due_fragment(self, progress: Progress) -> int:
        """The fragment that the next push is of.

        It is the same for all workers whose pushes meet in a turn, so that their deltas can be added up. A worker that
        misses turns pushes what it has not pushed for one and a half rounds first.

        Args:
            progress: shared progress.
        """
        due = progress.fragment
        if len(self.unsent) > 1:
            late = max(range(len(self.unsent)), key=self.unsent.__getitem__)
            if self.unsent[due] == 0 or self.unsent[late] > _OVERDUE * progress.round_steps[self.rank]:
                return late
        return due

    @property
    def unsent_fragments(self) -> int:
        """Number of fragments with local steps since their last push."""
        return sum(steps > 0 for steps in self.unsent)

    def end_round(
        self, progress: Progress, seconds: float, fragment: int, start_version: int, shard: int | None = None
    ) -> PushedRound:
        """End the current round and begin the next one.

        Args:
            progress: shared progress.
            seconds: duration of the round from its first step to its last.
            fragment: what is pushed.
            start_version: version of the fragment's global parameters that the delta is counted from.
            shard: the round's shard, if the next round's has already been drawn; None: the current one.
        """
        pushed = PushedRound(
            self.round,
            self.round_steps,
            self.round_samples,
            seconds,
            self.shard if shard is None else shard,
            start_version,
            fragment,
            self.unsent[fragment],
        )
        self.unsent[fragment] = 0
        self._begin(progress, draw=shard is None)
        return pushed

    def _begin(self, progress: Progress, draw: bool) -> None:
        self.round += 1
        self._pushed_steps = self.round_steps
        self.round_steps = self.round_samples = 0
        self._shift = 0
        self._planned_at_begin = self._plan(progress)
        if draw:
            self.shard = draw_shard([1] * self._size, progress.shard_samples, self.shard_generator)

    def restart(self) -> None:
        """Discard the previous round, which was dropped, and the steps since then, of all fragments."""
        self._ahead += self._pushed_steps + self.round_steps
        self.round_steps = self.round_samples = 0
        self.unsent = [0] * len(self.unsent)

    def reopen(self, pushed: PushedRound) -> None:
        """Continue the previous round: the steps since its push are added to it."""
        self.round -= 1
        self.round_steps += pushed.steps
        self.round_samples += pushed.samples
        self.unsent[pushed.fragment] += pushed.fragment_steps

    def push_is_due(self, progress: Progress, wanted: bool) -> bool:
        """Whether this step ends the round.

        Args:
            progress: shared progress.
            wanted: whether a turn is being held open for this worker.
        """
        planned = self._planned(progress)
        self._keep_step(progress, planned)
        due = self._enough(planned) if wanted else planned + self._shift
        return self.round_steps >= due and not self._is_last(progress, self.local_steps)

    def _planned(self, progress: Progress) -> int:
        """Planned local steps of this round: the current plan, or in lockstep the plan at the round's beginning."""
        return self._planned_at_begin if self._lockstep else self._plan(progress)

    def _plan(self, progress: Progress) -> int:
        """Local steps from the last push to the next by the current plan: with fragments a part of a round.

        The parts of a round differ by a step at most, and add up to it.
        """
        steps, parts = progress.round_steps[self.rank], self._rules.fragments
        part = self.round % parts
        return max(1, (part + 1) * steps // parts - part * steps // parts)

    def most_to_extend(self, progress: Progress) -> int:
        """Maximum size, in local steps, of a pushed round that may still be extended.

        While a turn is held open for others, a worker's further steps are added to the round it has pushed. Steps left
        out of the delta would be learned from parameters that are about to change.
        """
        if self._is_last(progress, self.local_steps):
            return 0  # the last round would have less than half of a round's steps
        return math.floor((1 + self._pace.tolerance) * self._planned(progress)) - self.round_steps

    def hold_open_seconds(self, progress: Progress, speed: float) -> float:
        """Seconds for which a turn that opens now should be held open for this worker's next push.

        Args:
            progress: shared progress.
            speed: this worker's local steps per second; 0 while unknown.
        """
        window = self._rules.grace_period
        if speed == 0:
            return window
        planned = self._planned(progress)
        if self._rules.overlap:  # no worker is blocked meanwhile, and a common turn brings this one in step
            window = max(window, max(2, self._pace.tolerance * planned) / speed)
            # The turn holds back the deltas of the fastest workers: no longer than one of their rounds.
            window = min(window, progress.local_steps / self._rules.fragments / max(speed, *progress.speeds))
            window = min(window, self._rules.timeout.total_seconds() / 4)
        steps = max(1, self._enough(planned) - self.round_steps)
        if steps / speed > window or self._is_last(progress, self.local_steps + steps):
            return 0.0
        return window

    def _enough(self, planned: int) -> int:
        """Local steps after which a round may end to share a turn with others."""
        return max(1, math.floor((1 - self._pace.tolerance) * planned))

    def _keep_step(self, progress: Progress, planned: int) -> None:
        """Lengthen or shorten this round to be in step again, if worker 0's delta came without this worker's.

        All adjust to worker 0, which does not adjust: if each adjusted to the others, two workers in opposite phase
        would stay in opposite phase.
        """
        if progress.reference_turn == self.reference_turn:
            return
        self.reference_turn = progress.reference_turn
        if self.rank in self.reference_turn.workers:
            return
        most = planned - self._enough(planned)
        early, late = self.round_steps, max(0, planned - self.round_steps)
        self._shift = min(early, most) if early < late else -min(late, most)

    def _is_last(self, progress: Progress, local_steps: int) -> bool:
        """Whether a round that does not end after ``local_steps`` goes on to the end of the run.

        A remaining budget of less than half a round is added to this round. Every delta is a whole outer update with
        its momentum, and the update of a few steps would be nearly all momentum.
        """
        caps = progress.caps
        return caps is not None and caps[self.rank] - local_steps < self._planned(progress) / 2

    # ---- the run ----------------------------------------------------------------------------------------------------

    def over(self, progress: Progress) -> bool:
        """Whether the run has ended for this worker: it makes no other step."""
        return progress.stop or (progress.exhausted and not self.has_step(progress))

    def has_step(self, progress: Progress) -> bool:
        """Whether a step is left for this worker in its share of the budget."""
        return self._open_end or progress.caps is None or self.local_steps < progress.caps[self.rank]

    def reserve(self, progress: Progress, speed: float) -> int | None:
        """Local steps that this worker keeps for itself, whatever a turn that begins now makes of the shares.

        It makes them while the turn is under way. Reserves are parts of shares, which add up to the budget, and the
        turn leaves everybody its reserve: so the budget is met exactly. The reserve lasts longer than an exchange as a
        rule, so that no turn is waited for; and the rest of the share may go to others.

        Args:
            progress: shared progress.
            speed: this worker's local steps per second; 0 while unknown.

        Returns:
            The number of steps beyond those made; None: no limit.
        """
        if progress.caps is None or self._open_end or not self._shared_budget:
            return None
        share = max(0, progress.caps[self.rank] - self.local_steps)
        during = min(share, _EXCHANGES * progress.exchange_seconds * speed)
        part = _RESERVED if progress.exchange_seconds > 0 else _RESERVED_AT_FIRST
        return min(share, math.ceil(max(_FEWEST, during, part * share)))

    @property
    def may_get_more(self) -> bool:
        """Whether the worker's share may grow, if others leave steps of theirs."""
        return self._shared_budget

    def budget_spent(self, progress: Progress) -> bool:
        """Whether no step is left for this worker, whatever the others leave."""
        if self._open_end:
            return False
        return not self.has_step(progress) and (progress.exhausted or not self._shared_budget)

    def job_steps(self, progress: Progress) -> int:
        """Steps of the job: local steps of all workers over their number, rounded down. Never decreases.

        Between two exchanges the others are assumed to advance at their pace; in lockstep, to make the same steps.
        Learning-rate schedules count these steps.
        """
        if self._lockstep:
            return self._reach(self.local_steps - self._ahead)
        estimate = estimate_total(progress.steps, progress.round_steps, self.rank, self.local_steps)
        return self._reach((estimate + progress.former_steps) // self._size)

    def steps_made(self, progress: Progress) -> tuple[int, ...]:
        """Local steps of each worker: the count at the latest exchange, and an estimate by its pace since then."""
        if self._lockstep:
            return (self.local_steps - self._ahead,) * self._size
        return estimate_steps(progress.steps, progress.round_steps, self.rank, self.local_steps)

    def final_job_steps(self, progress: Progress) -> int:
        """:meth:`job_steps` after all workers have ended, without an estimate."""
        return self._reach(progress.total_steps // self._size)

    def _reach(self, job_steps: int) -> int:
        if self._max_steps is not None:
            job_steps = min(job_steps, self._max_steps)
        self._job_steps = max(self._job_steps, job_steps)
        return self._job_steps


def whole_samples(samples: Any) -> int:
    """The number of samples of a local step as an integer.

    Args:
        samples: a whole number of any type: an int, a float, a tensor of one element.

    Raises:
        TypeError: if ``samples`` is not a number.
        ValueError: if ``samples`` is not a whole number, or negative, or above 2^32.
    """
    try:
        whole = int(samples)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:  # RuntimeError: a tensor of several elements
        raise TypeError(f"`samples` must be a whole number, the samples of one local step, got {samples!r}.") from error
    if whole != samples or not 0 <= whole <= _MOST_SAMPLES:
        raise ValueError(f"`samples` must be a whole number from 0 to {_MOST_SAMPLES}, got {samples!r}.")
    return whole
