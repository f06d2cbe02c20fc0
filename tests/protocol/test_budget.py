"""The budget is spent exactly, and in proportion to pace."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lightning_async_localsgd.protocol.budget import Budget, allocate, estimate_total

weights = st.lists(st.integers(1, 100), min_size=1, max_size=9)


@given(st.integers(0, 10_000), weights)
def test_allocation_is_complete_and_proportional(amount: int, weights: list[int]) -> None:
    shares = allocate(amount, weights)
    assert sum(shares) == amount
    assert all(abs(s - amount * w / sum(weights)) < 1 for s, w in zip(shares, weights, strict=True))


@given(st.integers(1, 1000), weights, st.integers(0, 2000), st.data())
def test_caps_add_up_to_a_shared_budget(max_steps: int, weights: list[int], done: int, data: st.DataObject) -> None:
    workers = len(weights)
    budget = Budget(max_steps, workers)
    steps = allocate(done, weights)
    reserved = data.draw(st.lists(st.integers(0, 300), min_size=workers, max_size=workers) | st.just([]))
    caps = budget.caps(steps, weights, reserved)
    assert caps is not None
    assert sum(caps) == max(max_steps * workers, done + sum(reserved))
    assert all(cap >= made + kept for cap, made, kept in zip(caps, steps, reserved, strict=False))
    assert budget.exhausted(steps, reserved) == (done + sum(reserved) >= max_steps * workers)


def test_what_nobody_has_reserved_is_divided_by_pace_as_if_nothing_were() -> None:
    assert Budget(20, 3).caps([0, 0, 0], [1, 2, 3]) == (10, 20, 30)
    assert Budget(20, 3).caps([0, 0, 0], [1, 2, 3], [10, 1, 30]) == (10, 20, 30)
    assert Budget(20, 3).caps([0, 0, 0], [1, 2, 3], [20, 1, 2]) == (20, 16, 24)


def test_workers_that_have_ended_get_nothing() -> None:
    assert Budget(10, 3).caps([4, 4, 2], [1, 1, 1], [1, 0, 1], [False, True, False]) == (14, 4, 12)


def test_equal_workers_get_equal_caps_and_own_budgets_are_not_shared() -> None:
    assert Budget(10, 4).caps([3, 3, 3, 3], [5, 5, 5, 5]) == (10, 10, 10, 10)
    alone = Budget(10, 2, shared=False)
    assert alone.caps([3, 9], [5, 1]) == (10, 10)
    assert not alone.exhausted([10, 10])


def test_without_max_steps_there_is_no_limit() -> None:
    assert Budget(None, 2).caps([5, 5], [1, 1]) is None
    assert not Budget(None, 2).exhausted([10**9, 10**9])


def test_the_estimate_takes_others_to_keep_their_pace() -> None:
    assert estimate_total([10, 5], [50, 25], worker=0, own_steps=20) == 10 + 5 + 10 + 5
    assert estimate_total([7, 7, 7, 7], [3, 3, 3, 3], worker=2, own_steps=9) == 36
