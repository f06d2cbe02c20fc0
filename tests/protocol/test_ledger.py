"""The effect of a turn's headers on the shared progress."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest

from lightning_async_localsgd import Settings
from lightning_async_localsgd.protocol.budget import Budget
from lightning_async_localsgd.protocol.header import Flag, Header
from lightning_async_localsgd.protocol.ledger import Arrival, FragmentState, Ledger
from lightning_async_localsgd.protocol.progress import Progress


class Model:
    """Stands in for a global model."""

    def __init__(self, *fragments: FragmentState) -> None:
        self.fragments = fragments

    @property
    def version(self) -> int:
        return sum(state.version for state in self.fragments)

    def set_round_length(self, local_steps: int) -> None:
        pass


class NoState:
    """Stands in for the state of a fragment that nothing is applied to."""

    version = 0

    def apply(self, arrivals: object, refused: int = 0) -> None:
        raise AssertionError

    def update_sizes(self, count: int) -> list[int]:
        raise AssertionError

    def accepts(self, arrival: object) -> bool:
        raise AssertionError


class Versions:
    """Stands in for a fragment's state: takes sums up to the ends of a buffer of 3, refuses what is staler than 4."""

    def __init__(self, quorum: int, version: int) -> None:
        self.quorum, self.version, self.applied = quorum, version, 0
        self.log: list[tuple[list[int], int]] = []

    def update_sizes(self, count: int) -> list[int]:
        if self.quorum > 1:
            return [count] if count else []
        ends = [end for end in range(self.applied + 1, self.applied + count) if end % 3 == 0]
        return [b - a for a, b in pairwise([self.applied, *ends, self.applied + count])] if count else []

    def accepts(self, arrival: Arrival) -> bool:
        return arrival.staleness <= 4

    def apply(self, arrivals: Sequence[Arrival], refused: int = 0) -> None:
        self.log.append(([arrival.worker for arrival in arrivals], refused))
        self.version += len(arrivals) + refused if self.quorum == 1 else 1
        self.applied += len(arrivals)


@pytest.mark.parametrize(
    ("quorum", "start_versions", "log", "stalenesses", "versions"),
    [
        # Worker 1 brings nothing.
        (1, (10, None, 10, 10, 10, 10), [([0, 2, 3], 0), ([4, 5], 0)], [0, 1, 2, 3, 4], [11, 12, 13, 14, 15]),
        (1, (10, None, 2, 10, 10, 10), [([0, 3, 4], 1), ([5], 0)], [0, 9, 2, 3, 4], [11, 12, 13, 14, 15]),
        (1, (10, None, 10, 10, 10, 2), [([0, 2, 3], 0), ([4], 1)], [0, 1, 2, 3, 12], [11, 12, 13, 14, 15]),
        (1, (0, None, 0), [([], 2)], [10, 11], [11, 12]),
        (2, (10, None, 8, 2), [([0, 2], 1)], [0, 2, 8], [11, 11, 11]),
        (2, (0, None, 0), [([], 2)], [10, 10], [11, 11]),
        (3, (10, None, 10), [], [], []),
        (1, (None, None), [], [], []),
    ],
)
def test_a_turn_is_split_in_updates_and_its_stalenesses_are_known_before(
    quorum: int,
    start_versions: tuple[int | None, ...],
    log: list[tuple[list[int], int]],
    stalenesses: list[int],
    versions: list[int],
) -> None:
    workers = len(start_versions)
    state = Versions(quorum, version=10)
    ledger = Ledger(
        Model(state), Settings(quorum=quorum), Budget(max_steps=100, workers=workers), Progress.at_start(workers, 50)
    )
    headers = [
        Header(worker, 0, start_version=start or 0, flags=Flag.NONE if start is None else Flag.DELTA)
        for worker, start in enumerate(start_versions)
    ]
    groups = ledger.due(headers)
    assert [delta.arrival.staleness for group in groups for delta in group.deltas] == stalenesses
    updates = [update for group in groups for update in ledger.apply(group)]
    assert state.log == log
    assert [update.staleness for update in updates] == stalenesses
    assert [update.version for update in updates] == versions


@pytest.mark.parametrize(
    ("reserved", "flags", "exhausted"), [(2, Flag.NONE, True), (2, Flag.FINAL, False), (1, Flag.NONE, False)]
)
def test_a_budget_is_spent_by_steps_that_will_be_made_for_certain(reserved: int, flags: Flag, exhausted: bool) -> None:
    ledger = Ledger(Model(NoState()), Settings(), Budget(max_steps=5, workers=2), Progress.at_start(2, 50))
    headers = [Header(0, 0, steps=5, flags=Flag.IDLE), Header(1, 0, steps=3, reserved=reserved, flags=flags)]
    assert ledger.close_turn(headers, []).exhausted is exhausted


def test_each_fragment_has_versions_of_its_own_and_the_next_one_follows_the_traded_one() -> None:
    first, second = Versions(1, version=10), Versions(1, version=20)
    rules = Settings(fragments=2, local_steps=10)
    ledger = Ledger(Model(first, second), rules, Budget(max_steps=100, workers=3), Progress.at_start(3, 10))
    headers = [
        Header(0, 0, flags=Flag.DELTA, fragment=1, start_version=18),
        Header(1, 0, flags=Flag.DELTA, fragment=0, start_version=9),
        Header(2, 0, flags=Flag.DELTA, fragment=1, start_version=20),
    ]
    groups = ledger.due(headers)
    assert [(group.fragment, group.senders) for group in groups] == [(0, [1]), (1, [0, 2])]
    assert [delta.arrival.staleness for group in groups for delta in group.deltas] == [1, 2, 1]
    updates = [update for group in groups for update in ledger.apply(group)]
    assert [(update.worker, update.version) for update in updates] == [(1, 31), (0, 32), (2, 33)]
    assert (first.version, second.version) == (11, 22)
    applied = [delta.header for group in groups for delta in group.deltas]
    assert ledger.close_turn(headers, applied).fragment == 1  # after that of the first group
    assert ledger.close_turn([Header(w, 1) for w in range(3)], []).fragment == 1
    last = Header(0, 2, flags=Flag.DELTA, fragment=1, start_version=22)
    others = [Header(w, 2) for w in (1, 2)]
    assert [group.senders for group in ledger.due([last, *others])] == [[0]]
    assert ledger.close_turn([last, *others], [last]).fragment == 0


def test_a_quorum_is_of_deltas_of_the_same_fragment_unless_no_other_can_come() -> None:
    rules = Settings(fragments=2, local_steps=10, quorum=2)
    ledger = Ledger(
        Model(Versions(2, 0), Versions(2, 0)), rules, Budget(max_steps=100, workers=3), Progress.at_start(3, 10)
    )
    two = [Header(0, 0, flags=Flag.DELTA), Header(1, 0, flags=Flag.DELTA, fragment=1)]
    assert ledger.due([*two, Header(2, 0)]) == []
    assert [g.senders for g in ledger.due([*two, Header(2, 0, flags=Flag.DELTA)])] == [[0, 2], [1]]
