"""A worker's rounds: which step ends one, and whether there is another. Pure: no clock, no threads, no tensors."""

from __future__ import annotations

import math
from typing import Any

import torch

from lightning_async_localsgd.protocol.budget import estimate_steps, estimate_total
from lightning_async_localsgd.protocol.pace import make_pace
from lightning_async_localsgd.protocol.progress import NO_BEAT, Progress
from lightning_async_localsgd.protocol.rules import Rules
from lightning_async_localsgd.protocol.sampling import draw_shard
from lightning_async_localsgd.protocol.turn import PushedRound

__all__ = ["Rounds", "whole_samples"]

_MOST_SAMPLES = 1 << 32  # of one local step


class Rounds:
    """Counts one worker's local steps and decides, from the shared progress, what comes after each.

    The real worker and the simulated one share it, so that both make the same rounds of the same progress.

    Args:
        rank: the worker.
        size: number of workers.
        rules: settings of the run.
    """

    def __init__(self, rank: int, size: int, rules: Rules) -> None:
        self.rank = rank
        self.local_steps = 0
        """Local steps this worker has made in this run."""
        self.round = 0
        """Rounds this worker has pushed."""
        self.shard = rank
        """The data shard of the current round: the worker's own at first, then drawn by progress (Eq. 2)."""
        self.round_steps = 0
        """Local steps of the current round."""
        self.round_samples = 0
        self.beat = NO_BEAT
        """The latest beat that this worker has kept."""
        self.shard_generator = torch.Generator().manual_seed(rank)
        self._size = size
        self._rules = rules
        self._pace = make_pace(rules.pace)
        self._lockstep = rules.lockstep(size)
        self._shared_budget = rules.shares_budget(size)
        self._max_steps: int | None = None
        self._open_end = False
        self._planned_at_begin = 0  # local steps of this round, as of its beginning
        self._shift = 0  # local steps by which this round is to be longer than planned
        self._pushed_steps = 0  # of the round before
        self._ahead = 0  # in lockstep: own steps that the others did not make as well
        self._job_steps = 0

    def start(self, progress: Progress, max_steps: int | None, open_end: bool = False) -> None:
        """Begin the run.

        Args:
            progress: what it starts or goes on from.
            max_steps: local steps per worker that it has; None: no limit.
            open_end: ``max_steps`` is only what is expected.
        """
        self._max_steps = max_steps
        self._open_end = open_end
        self._planned_at_begin = progress.round_steps[self.rank]

    def join(self, progress: Progress) -> None:
        """Begin in the middle of a run, as the others are."""
        self.beat = progress.beat
        self._ahead = -max(progress.steps)

    # ---- the round --------------------------------------------------------------------------------------------------

    def count(self, samples: int) -> None:
        """Count a local step.

        Raises:
            TypeError: if ``samples`` is not a number.
            ValueError: if it is not a whole one, or outside its range.
        """
        samples = whole_samples(samples)
        self.local_steps += 1
        self.round_steps += 1
        self.round_samples += samples

    def end_round(
        self, progress: Progress, seconds: float, start_version: int, shard: int | None = None
    ) -> PushedRound:
        """End the current round and begin the next one.

        Args:
            progress: shared progress.
            seconds: duration of the round from its first step to its last.
            start_version: version of the global parameters that it began from.
            shard: the round's shard, if that of the next one has been drawn already; None: the current one.
        """
        own = self.shard if shard is None else shard
        pushed = PushedRound(self.round, self.round_steps, self.round_samples, seconds, own, start_version)
        self._begin(progress, draw=shard is None)
        return pushed

    def _begin(self, progress: Progress, draw: bool) -> None:
        self.round += 1
        self._pushed_steps = self.round_steps
        self.round_steps = self.round_samples = 0
        self._shift = 0
        self._planned_at_begin = progress.round_steps[self.rank]
        if draw:
            self.shard = draw_shard([1] * self._size, progress.shard_samples, self.shard_generator)

    def restart(self) -> None:
        """Forget what was learned in the round before, which was dropped, and since."""
        self._ahead += self._pushed_steps + self.round_steps
        self.round_steps = self.round_samples = 0

    def reopen(self, pushed: PushedRound) -> None:
        """Take the round before up again: the steps since then belong to it."""
        self.round -= 1
        self.round_steps += pushed.steps
        self.round_samples += pushed.samples

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
        """Local steps of this round: as of now; in lockstep as of its beginning, when all knew the same."""
        return self._planned_at_begin if self._lockstep else progress.round_steps[self.rank]

    def most_to_extend(self, progress: Progress) -> int:
        """The most local steps of a pushed round that the steps since then may still be added to.

        While a turn is held open for others, what a worker goes on learning belongs to the round it pushed: the fewer
        steps a delta leaves behind, the less is learned from parameters that are about to change.
        """
        if self._is_last(progress, self.local_steps):
            return 0  # what is left for the last round would be less than half of one
        return math.floor((1 + self._pace.tolerance) * self._planned(progress)) - self.round_steps

    def patience(self, progress: Progress, speed: float) -> float:
        """Seconds for which a turn that opens now is worth holding open for this worker's next push.

        Args:
            progress: shared progress.
            speed: this worker's local steps per second; 0 while unknown.
        """
        window = self._rules.grace_period
        if speed == 0:
            return window
        planned = self._planned(progress)
        if self._rules.overlap:  # nobody waits meanwhile: worth it for what brings this worker in step with the rest
            window = max(window, max(2, self._pace.tolerance * planned) / speed)
            # The fastest workers do not wait, but the turn holds back their deltas: no longer than they made them.
            window = min(window, progress.local_steps / max(speed, *progress.speeds))
            window = min(window, self._rules.timeout.total_seconds() / 4)
        steps = max(1, self._enough(planned) - self.round_steps)
        if steps / speed > window or self._is_last(progress, self.local_steps + steps):
            return 0.0
        return window

    def _enough(self, planned: int) -> int:
        """Local steps after which a round may end, if that lets it share a turn with others."""
        return max(1, math.floor((1 - self._pace.tolerance) * planned))

    def _keep_step(self, progress: Progress, planned: int) -> None:
        """Where worker 0's delta came without this worker's, make this round longer or shorter, to be in step again.

        All follow worker 0, which keeps its own time: if each followed the others, two in opposite phase would stay so.
        """
        if progress.beat == self.beat:
            return
        self.beat = progress.beat
        if self.rank in self.beat.workers:
            return
        most = planned - self._enough(planned)
        early, late = self.round_steps, max(0, planned - self.round_steps)
        self._shift = min(early, most) if early < late else -min(late, most)

    def _is_last(self, progress: Progress, local_steps: int) -> bool:
        """Whether the round goes on to the end of the run if it is not over after ``local_steps``.

        What is left of the budget goes into this round if it would be less than half of one: every delta is a whole
        outer update with its momentum, and one of a few steps would be all momentum.
        """
        caps = progress.caps
        return caps is not None and caps[self.rank] - local_steps < self._planned(progress) / 2

    # ---- the run ----------------------------------------------------------------------------------------------------

    @staticmethod
    def over(progress: Progress) -> bool:
        """Whether no worker is to make another step."""
        return progress.stop or progress.exhausted

    def has_step(self, progress: Progress) -> bool:
        """Whether a step is left for this worker in its share of the budget."""
        return self._open_end or progress.caps is None or self.local_steps < progress.caps[self.rank]

    @property
    def may_get_more(self) -> bool:
        """Whether its share may grow, if others leave some of theirs."""
        return self._shared_budget

    def budget_spent(self, progress: Progress) -> bool:
        """Whether no step is left for this worker, whatever the others do."""
        if self._open_end:
            return False
        return progress.exhausted or (not self.has_step(progress) and not self._shared_budget)

    def job_steps(self, progress: Progress) -> int:
        """Steps of the job: local steps of all workers over their number, rounded down. Never goes back.

        Between two exchanges the others are taken to advance at their pace; in lockstep, where all make the same steps,
        however late. Learning-rate schedules count these.
        """
        if self._lockstep:
            return self._reach(self.local_steps - self._ahead)
        estimate = estimate_total(progress.steps, progress.round_steps, self.rank, self.local_steps)
        return self._reach(estimate // self._size)

    def steps_made(self, progress: Progress) -> tuple[int, ...]:
        """Local steps of each worker: as of the latest exchange, and by its pace since."""
        if self._lockstep:
            return (self.local_steps - self._ahead,) * self._size
        return estimate_steps(progress.steps, progress.round_steps, self.rank, self.local_steps)

    def final_job_steps(self, progress: Progress) -> int:
        """:meth:`job_steps` when all have ended: no estimate."""
        return self._reach(sum(progress.steps) // self._size)

    def _reach(self, job_steps: int) -> int:
        if self._max_steps is not None:
            job_steps = min(job_steps, self._max_steps)
        self._job_steps = max(self._job_steps, job_steps)
        return self._job_steps


def whole_samples(samples: Any) -> int:
    """The samples of a local step as an integer, given as any whole number: an int, a float, a tensor of one element.

    Raises:
        TypeError: if ``samples`` is not a number.
        ValueError: if it is not a whole one, or negative, or above 2^32.
    """
    try:
        whole = int(samples)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:  # the last: a tensor of several elements
        raise TypeError(f"`samples` must be a whole number, the samples of one local step, got {samples!r}.") from error
    if whole != samples or not 0 <= whole <= _MOST_SAMPLES:
        raise ValueError(f"`samples` must be a whole number from 0 to {_MOST_SAMPLES}, got {samples!r}.")
    return whole
