"""One worker's rounds: when each ends, what is counted in it, and what the worker takes the job to have made."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_async_localsgd import Settings
from lightning_async_localsgd.protocol.progress import Progress, ReferenceTurn
from lightning_async_localsgd.protocol.rounds import Rounds, whole_samples

H = 20
LEAST = 18  # steps of a round that may end early: all but a tenth


def begin(max_steps: int | None = None, rank: int = 0, size: int = 2, **options: Any) -> tuple[Rounds, Progress]:
    rounds = Rounds(rank, size, Settings(local_steps=H, **options))
    progress = Progress.at_start(size, H)
    rounds.start(progress, max_steps)
    return rounds, progress


def count(rounds: Rounds, steps: int, samples: int = 4) -> None:
    for _ in range(steps):
        rounds.count(samples)


@pytest.mark.parametrize(("wanted", "due"), [(False, H), (True, LEAST)])
def test_a_round_ends_after_its_steps_or_a_little_earlier_to_share_a_turn(wanted: bool, due: int) -> None:
    rounds, progress = begin()
    count(rounds, due - 1)
    assert not rounds.push_is_due(progress, wanted)
    count(rounds, 1)
    assert rounds.push_is_due(progress, wanted)


@pytest.mark.parametrize(("left", "due"), [(H // 2, True), (H // 2 - 1, False)])
def test_less_than_half_a_round_before_the_end_is_none_of_its_own(left: int, due: bool) -> None:
    rounds, progress = begin()
    count(rounds, H)
    assert rounds.push_is_due(replace(progress, caps=(H + left, H)), wanted=False) is due


@pytest.mark.parametrize(("made", "due"), [(1, 21), (9, 22), (15, 18), (19, 19)])
def test_a_round_that_was_not_in_worker_0s_turn_is_shifted_by_a_tenth_at_most(made: int, due: int) -> None:
    rounds, progress = begin(rank=1)
    progress = replace(progress, reference_turn=ReferenceTurn(1, (0,)))  # without this worker's delta
    count(rounds, made)
    rounds.push_is_due(progress, wanted=False)
    while not rounds.push_is_due(progress, wanted=False):
        count(rounds, 1)
    assert rounds.round_steps == due


def test_who_was_in_worker_0s_turn_keeps_step() -> None:
    rounds, progress = begin(rank=1)
    count(rounds, 1)
    rounds.push_is_due(replace(progress, reference_turn=ReferenceTurn(1, (0, 1))), wanted=False)
    count(rounds, H - 1)
    assert rounds.push_is_due(replace(progress, reference_turn=ReferenceTurn(1, (0, 1))), wanted=False)


@given(st.integers(1, 30), st.integers(0, 30))
def test_a_round_that_is_taken_up_again_holds_all_steps_and_is_numbered_as_before(before: int, after: int) -> None:
    rounds, progress = begin()
    count(rounds, before)
    pushed = rounds.end_round(progress, 1.5, 0, start_version=7)
    assert pushed == (0, before, 4 * before, 1.5, 0, 7, 0, before)
    count(rounds, after, samples=3)
    rounds.reopen(pushed)
    again = rounds.end_round(progress, 2.5, 0, start_version=7, shard=pushed.shard)
    assert again == (0, before + after, 4 * before + 3 * after, 2.5, 0, 7, 0, before + after)
    assert (rounds.round, rounds.round_steps, rounds.local_steps) == (1, 0, before + after)


def test_a_push_is_extended_up_to_a_tenth_beyond_its_round_and_not_near_the_end() -> None:
    rounds, progress = begin()
    count(rounds, H)
    rounds.end_round(progress, 1.0, 0, 0)
    count(rounds, 1)
    assert rounds.most_to_extend(progress) == 22 - 1
    assert rounds.most_to_extend(replace(progress, caps=(H + 10, H))) == 0


def test_a_draw_for_a_round_that_is_given_its_shard_is_not_made_again() -> None:
    rounds, progress = begin(size=5)
    count(rounds, 1)
    rounds.end_round(progress, 1.0, 0, 0)
    drawn, state = rounds.shard, rounds.shard_generator.get_state()
    rounds.end_round(progress, 1.0, 0, 0, shard=3)
    assert rounds.shard == drawn and torch.equal(rounds.shard_generator.get_state(), state)
    rounds.end_round(progress, 1.0, 0, 0)
    assert not torch.equal(rounds.shard_generator.get_state(), state)


@pytest.mark.parametrize(
    ("speed", "options", "steps", "expected"),
    [
        (0.0, {}, 0, 0.5),  # not known: the grace period
        (1000.0, {}, 0, 0.02),  # the other's round takes no longer: it is not held up for more
        (10.0, {}, 0, 0.0),  # 18 steps take longer than the grace period
        (10.0, {}, 14, 0.5),
        (1.0, {}, 16, 2.0),  # nobody waits meanwhile: worth the time of two steps
        (1.0, {"overlap": False}, 16, 0.0),
    ],
)
def test_a_turn_waits_for_who_is_about_to_push(
    speed: float, options: dict[str, Any], steps: int, expected: float
) -> None:
    rounds, progress = begin(grace_period=0.5, **options)
    count(rounds, steps)
    assert rounds.hold_open_seconds(replace(progress, speeds=(speed, speed)), speed) == pytest.approx(expected)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 40)), max_size=20), st.integers(1, 60))
def test_steps_of_the_job_never_go_back_nor_beyond_the_budget(turns: list[tuple[int, int]], max_steps: int) -> None:
    rounds, progress = begin(max_steps)
    seen = [0]
    for own, others in turns:
        count(rounds, own)
        seen.append(rounds.job_steps(progress))
        progress = replace(progress, steps=(rounds.local_steps, others))
        seen.append(rounds.job_steps(progress))
    assert seen == sorted(seen) and seen[-1] <= max_steps
    assert rounds.steps_made(progress)[0] == rounds.local_steps


def test_in_lockstep_steps_that_were_dropped_count_for_nobody() -> None:
    rounds, progress = begin(quorum=2, pace="fixed")
    count(rounds, H)
    rounds.end_round(progress, 1.0, 0, 0)
    count(rounds, 3)
    assert rounds.job_steps(progress) == H + 3
    rounds, progress = begin(quorum=2, pace="fixed")
    count(rounds, H)
    rounds.end_round(progress, 1.0, 0, 0)
    count(rounds, 3)
    rounds.restart()
    count(rounds, 1)
    assert rounds.steps_made(progress) == (1, 1) and rounds.round_steps == 1


@pytest.mark.parametrize(
    ("open_end", "shared", "caps", "exhausted", "spent"),
    [
        (False, True, (H, H), True, True),
        (False, True, (H, H), False, False),  # others may leave some of theirs
        (False, False, (H, H), False, True),
        (False, False, (H + 1, H), False, False),
        (True, True, (H, H), True, False),
    ],
)
def test_a_budget_is_spent_when_no_step_can_come(
    open_end: bool, shared: bool, caps: tuple[int, int], exhausted: bool, spent: bool
) -> None:
    rounds, progress = begin(budget="shared" if shared else "per_worker")
    rounds.start(progress, H, open_end)
    count(rounds, H)
    progress = replace(progress, caps=caps, exhausted=exhausted)
    assert rounds.budget_spent(progress) is spent
    assert rounds.has_step(progress) is (open_end or caps[0] > H)


@pytest.mark.parametrize("samples", [4, 4.0, torch.tensor(4), torch.tensor([4.0])])
def test_whole_samples_are_counted_in_whatever_type(samples: Any) -> None:
    assert whole_samples(samples) == 4 and type(whole_samples(samples)) is int


@pytest.mark.parametrize(
    ("samples", "error"),
    [
        (0.5, ValueError),
        (-1, ValueError),
        (2**32 + 1, ValueError),
        (float("nan"), TypeError),
        (None, TypeError),
        (torch.ones(2), TypeError),
    ],
)
def test_other_numbers_of_samples_are_refused(samples: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="samples"):
        whole_samples(samples)


@pytest.mark.parametrize(("steps", "fragments"), [(H, 4), (7, 3), (5, 5), (2, 5)])
def test_fragments_are_pushed_in_equal_parts_of_a_round(steps: int, fragments: int) -> None:
    rules = Settings(local_steps=max(steps, fragments), fragments=fragments)
    progress = replace(Progress.at_start(2, max(steps, fragments)), round_steps=(steps, steps))
    rounds = Rounds(0, 2, rules)
    rounds.start(progress, None)
    made, ends = 0, []
    for turn in range(3 * fragments):
        progress = replace(progress, fragment=turn % fragments)
        while True:
            rounds.count(1)
            made += 1
            if rounds.push_is_due(progress, wanted=False):
                break
        pushed = rounds.end_round(progress, 1.0, rounds.due_fragment(progress), 0)
        assert pushed.fragment == turn % fragments
        ends.append(made)
        if turn >= fragments:
            assert pushed.fragment_steps == ends[turn] - ends[turn - fragments]
    if steps >= fragments:
        assert ends[fragments - 1 :: fragments] == [steps, 2 * steps, 3 * steps]
        parts = [b - a for a, b in pairwise([0, *ends])]
        assert max(parts) - min(parts) <= 1
    else:
        assert ends == list(range(1, len(ends) + 1))


def test_a_worker_that_misses_turns_pushes_what_is_overdue_first() -> None:
    # It takes part in every second turn of two fragments: by the turns alone, one of them would never be pushed.
    rules = Settings(local_steps=10, fragments=2)
    progress = replace(Progress.at_start(2, 10), round_steps=(10, 10), fragment=0)
    rounds = Rounds(0, 2, rules)
    rounds.start(progress, None)
    pushed = []
    for _ in range(8):
        count(rounds, 10)
        pushed.append(rounds.end_round(progress, 1.0, rounds.due_fragment(progress), 0))
    assert [push.fragment for push in pushed] == [0, 1, 0, 1, 0, 1, 0, 1]
    assert [push.fragment_steps for push in pushed] == [10, 20, 20, 20, 20, 20, 20, 20]


def test_what_has_just_been_pushed_is_not_pushed_again() -> None:
    rounds = Rounds(0, 2, Settings(local_steps=10, fragments=3))
    progress = Progress.at_start(2, 10)
    rounds.start(progress, None)
    count(rounds, 4)
    for left, fragment in ((2, 0), (1, 1), (0, 2)):  # the last pushes of a run: no turn of others comes between
        assert rounds.end_round(progress, 1.0, rounds.due_fragment(progress), 0).fragment == fragment
        assert rounds.unsent_fragments == left


@given(st.integers(0, 100), st.integers(1, 200), st.floats(0, 10), st.floats(0, 10))
def test_a_reserve_is_part_of_the_share_and_lasts_for_an_exchange(
    made: int, share: int, seconds: float, speed: float
) -> None:
    progress = replace(Progress.at_start(2, 10), caps=(made + share, 500), exchange_seconds=seconds)
    rounds = Rounds(0, 2, Settings(local_steps=10))
    rounds.start(progress, 1000)
    count(rounds, made)
    reserve = rounds.reserve(progress, speed)
    assert reserve is not None
    assert 1 <= reserve <= share
    assert reserve == share or reserve >= max(2, 2 * seconds * speed, share / 4)
    count(rounds, share)
    assert rounds.reserve(progress, speed) == 0


def test_who_shares_no_budget_reserves_nothing() -> None:
    progress = Progress.at_start(2, 10)
    capped = replace(progress, caps=(20, 20))
    for rules, of, open_end in (
        (Settings(), progress, False),
        (Settings(), capped, True),
        (Settings(budget="per_worker"), capped, False),
    ):
        rounds = Rounds(0, 2, rules)
        rounds.start(of, 20, open_end)
        assert rounds.reserve(of, 1.0) is None
