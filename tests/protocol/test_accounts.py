"""Workers come and go, and the budget is met all the same."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_async_localsgd import Settings
from lightning_async_localsgd.protocol.accounts import Accounts
from lightning_async_localsgd.protocol.budget import Budget
from lightning_async_localsgd.protocol.header import Flag, Header
from lightning_async_localsgd.protocol.ledger import Ledger
from lightning_async_localsgd.protocol.members import Member
from lightning_async_localsgd.protocol.progress import Progress
from tests.protocol.test_ledger import Model, Versions


def member(name: str, incarnation: str = "1") -> Member:
    return Member(name, incarnation, "host", 1)


def test_a_worker_keeps_its_number_and_a_new_process_begins_anew() -> None:
    books = Accounts()
    books.meet([member("b"), member("c")])
    books.settle(Header(1, 0, round=3, round_steps=10), accepted=True)
    books.settle(Header(1, 1, round=4, round_steps=10), accepted=False)
    books.meet([member("a"), member("b")])
    assert [worker.name for worker in books.workers] == ["b", "c", "a"]
    assert books.present == [True, False, True] and books.leader == 0
    assert books.workers[1].applied_steps == 10 and books.workers[1].settled_rounds == 5
    books.meet([member("a"), member("c", "2")])
    assert books.present == [False, True, True] and books.leader == 1
    assert books.workers[1].applied_steps == books.workers[1].settled_rounds == 0
    assert books.former_steps == 10
    other = Accounts()
    other.load_state_dict(books.state_dict())
    assert other.state_dict() == books.state_dict()


def test_who_is_away_makes_no_step_and_sends_nothing() -> None:
    books = Accounts()
    books.meet([member("a"), member("b"), member("c")])
    books.settle(Header(1, 0, round_steps=7), accepted=True)
    books.meet([member("a"), member("c")])
    headers = books.with_absent([Header(2, 9, steps=3), Header(0, 9, steps=4)])
    assert [(header.worker, header.turn, header.steps, header.flags) for header in headers] == [
        (0, 9, 4, Flag.NONE),
        (1, 9, 7, Flag.FINAL),
        (2, 9, 3, Flag.NONE),
    ]


def make_ledger(workers: int, max_steps: int) -> Ledger:
    books, rules = Accounts(), Settings(local_steps=10)
    members = [member(str(i)) for i in range(workers)]
    books.meet(members)
    budget = Budget(max_steps, workers)
    start = Progress.at_start(workers, 10)
    start = replace(start, caps=budget.caps(start.steps, start.round_steps))
    return Ledger(Model(Versions(1, version=0)), rules, budget, start, accounts=books)


@settings(deadline=None)
@given(st.data())
def test_the_shares_of_those_who_are_there_add_up_to_what_is_left(data: st.DataObject) -> None:
    """What is applied of those who are gone counts; what is not is left to the others."""
    workers, max_steps = data.draw(st.integers(1, 4)), data.draw(st.integers(10, 200))
    ledger = make_ledger(workers, max_steps)
    books = ledger.accounts
    assert books is not None
    made = dict.fromkeys(range(workers), 0)
    incarnations = dict.fromkeys(range(workers), 1)
    for turn in range(data.draw(st.integers(1, 8))):
        there = data.draw(st.sets(st.sampled_from(range(workers + 2)), min_size=1))
        for i in there:
            away = {worker.name for worker in books.workers if not worker.present}
            if data.draw(st.booleans()) and str(i) in away:
                incarnations[i] += 1  # started again
                made[i] = 0
        names = {worker.name for worker in books.workers}
        numbers = {worker.name: i for i, worker in enumerate(books.workers)}
        ledger.meet([member(str(i), str(incarnations.setdefault(i, 1))) for i in sorted(there)])
        numbers = {worker.name: i for i, worker in enumerate(books.workers)}
        assert names <= numbers.keys()
        headers = []
        for i in there:
            number = numbers[str(i)]
            caps = ledger.progress.caps
            assert caps is not None
            steps = made.get(i, 0) + data.draw(st.integers(0, max(0, caps[number] - made.get(i, 0))))
            applied = books.workers[number].applied_steps
            flags = Flag.DELTA if steps > applied else Flag.NONE
            header = Header(number, turn, speed=1.0, steps=steps, round_steps=steps - applied, flags=flags)
            headers.append(header)
            made[i] = steps
        every = books.with_absent(headers)
        for group in ledger.due(every):
            ledger.apply(group)
        progress = ledger.close_turn(every, [h for h in every if Flag.DELTA in h.flags])
        assert progress.caps is not None
        own = sum(progress.caps[numbers[str(i)]] for i in there)
        gone = sum(worker.applied_steps for worker in books.workers if not worker.present) + books.former_steps
        # Whoever comes back has made steps that were left to the others meanwhile.
        assert own + gone == max(max_steps * workers, sum(made[i] for i in there) + gone)
        assert progress.total_steps == sum(made[i] for i in there) + gone
