"""All members choose the same view, from what each has told."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from lightning_async_localsgd.protocol.members import NO_STATE, Candidate, Member, View, choose_view


def member(name: str, incarnation: str = "1") -> Member:
    return Member(name, f"{incarnation}-{name}", "host", 1)


def candidate(name: str, *unreachable: str, position: tuple[int, int] = (5, 5), attempt: int = 0) -> Candidate:
    return Candidate(member(name), attempt, frozenset(member(other).incarnation for other in unreachable), position)


def names(view: View | None) -> list[str]:
    return [] if view is None else [member.name for member in view.members]


def test_all_that_are_there_take_part_in_the_order_of_their_names() -> None:
    assert names(choose_view([candidate("b"), candidate("c"), candidate("a")])) == ["a", "b", "c"]


def test_fewer_than_the_minimum_do_not_go_on() -> None:
    assert choose_view([]) is None
    assert choose_view([candidate("a"), candidate("b")], min_workers=3) is None


def test_of_two_processes_of_a_name_the_later_one_takes_part() -> None:
    later = Candidate(member("a", "2"))
    view = choose_view([later, candidate("a"), candidate("b")])
    assert view is not None and view.members == (later.member, member("b"))


def test_who_cannot_be_reached_by_the_most_is_left_out() -> None:
    assert names(choose_view([candidate("a", "c"), candidate("b", "c"), candidate("c")])) == ["a", "b"]
    assert names(choose_view([candidate("a"), candidate("b", "a"), candidate("c")])) == ["a", "c"]


def test_who_has_nothing_of_the_run_is_left_out_first() -> None:
    fresh = candidate("a", position=NO_STATE)
    assert names(choose_view([fresh, candidate("b", "a")])) == ["b"]
    assert names(choose_view([fresh, candidate("b"), candidate("c")], max_workers=2)) == ["b", "c"]


def test_a_view_that_has_failed_is_followed_by_another_of_the_same_members() -> None:
    first = choose_view([candidate("a"), candidate("b")])
    second = choose_view([candidate("a"), candidate("b", attempt=1)])
    later = choose_view([candidate("a"), candidate("b")], quorum=1)
    assert first is not None and second is not None and later is not None
    assert first.members == second.members == later.members
    assert len({first.key, second.key, later.key}) == 3


@given(st.data())
def test_the_members_reach_each_other_whatever_the_order_of_the_answers(data: st.DataObject) -> None:
    known = data.draw(st.lists(st.sampled_from("abcdefg"), unique=True, min_size=1))
    candidates = [
        candidate(
            name,
            *data.draw(st.lists(st.sampled_from(known), unique=True)),
            position=data.draw(st.sampled_from([NO_STATE, (3, 4)])),
        )
        for name in known
    ]
    shuffled = list(candidates)
    random.Random(data.draw(st.integers(0, 99))).shuffle(shuffled)
    view = choose_view(candidates)
    assert view == choose_view(shuffled)
    assert view is not None and len(view.members) >= 1
    chosen = {member.incarnation for member in view.members}
    for one in candidates:
        if one.member.incarnation in chosen:
            assert not (one.unreachable - {one.member.incarnation}) & chosen
