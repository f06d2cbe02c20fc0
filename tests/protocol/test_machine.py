"""Workers that execute the machine's actions in any order of events: the budget is met, and every step counts once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_async_localsgd import Settings
from lightning_async_localsgd.protocol.budget import Budget
from lightning_async_localsgd.protocol.header import Flag, Header
from lightning_async_localsgd.protocol.ledger import Arrival, Ledger
from lightning_async_localsgd.protocol.machine import Action, Done, Extend, Finish, Machine, Push, Reason, Train, Wait
from lightning_async_localsgd.protocol.progress import OuterUpdate, Progress
from lightning_async_localsgd.protocol.rounds import Rounds
from lightning_async_localsgd.protocol.turn import PushedRound, add_round, may_push


@dataclass
class State:
    """Stands in for the state of a fragment."""

    quorum: int
    version: int = 0

    def update_sizes(self, count: int) -> list[int]:
        return [1] * count if self.quorum == 1 else [count] if count else []

    def accepts(self, arrival: Arrival) -> bool:
        return True

    def apply(self, arrivals: Sequence[Arrival], refused: int = 0) -> None:
        self.version += 1


@dataclass
class Model:
    """Stands in for the global model."""

    fragments: list[State]

    @property
    def version(self) -> int:
        return sum(self.versions)

    @property
    def versions(self) -> list[int]:
        return [state.version for state in self.fragments]

    def set_round_length(self, local_steps: int) -> None: ...


@dataclass
class Peer:
    """A worker without a model: it has a ledger of its own, made from the headers alone."""

    rank: int
    rounds: Rounds
    machine: Machine
    ledger: Ledger
    state: Model
    progress: Progress
    speed: float
    flags: Flag = Flag.NONE
    push: PushedRound | None = None
    pending: PushedRound | None = None
    adoption: int | None = None
    versions: list[int] = field(default_factory=list)
    pushed: list[PushedRound] = field(default_factory=list)
    wait: Reason | None = None
    done: bool = False
    training: bool = False
    reserve: int | None = None
    limit: float = math.inf
    updates: list[OuterUpdate] = field(default_factory=list)

    @property
    def in_flight(self) -> bool:
        return self.push is not None or self.pending is not None or self.adoption is not None

    def adopt(self) -> None:
        if self.adoption is not None:
            self.versions[self.adoption] = self.state.versions[self.adoption]
            self.adoption = None

    def end_round(self, shard: int | None = None) -> None:
        fragment = self.rounds.due_fragment(self.progress)
        self.push = self.rounds.end_round(self.progress, 1.0, fragment, self.versions[fragment], shard)

    def execute(self, action: Action) -> None:
        self.wait, self.training = None, False
        while True:
            match action:
                case Push(last):
                    if self.rounds.unsent_fragments > 0:
                        assert not self.in_flight
                        self.end_round()
                    if last:
                        self.flags |= Flag.FINAL
                    action = self.machine.after_push(self.progress)
                case Extend(most):
                    if self.push is not None and self.push.steps <= most:
                        self.rounds.reopen(pushed := self.push)
                        self.end_round(pushed.shard)
                    action = self.machine.after_extension(self.progress)
                case Finish():
                    action = self.machine.finish(self.in_flight)
                case Train():
                    self.flags &= ~Flag.IDLE
                    self.report()
                    self.training = self.rounds.local_steps < self.limit
                    self.wait = None if self.training else Reason.BUDGET
                    return
                case Wait(reason):
                    self.report()
                    self.wait = reason
                    if reason is Reason.BUDGET:
                        self.flags |= Flag.IDLE
                    return
                case Done():
                    self.done = True
                    return

    def report(self) -> None:
        self.reserve = self.rounds.reserve(self.progress, self.speed)

    def step(self, wanted: bool) -> None:
        self.rounds.count(1)
        self.report()
        self.adopt()
        self.execute(self.machine.after_step(self.progress, self.in_flight, wanted))

    def header(self, turn: int) -> Header:
        if self.push is not None:
            self.pending, self.push = self.push, None
            self.pushed.append(self.pending)
        steps = self.rounds.local_steps
        reserved = 0
        if self.reserve is not None and self.progress.caps is not None:
            self.limit = min(steps + self.reserve, self.progress.caps[self.rank])
            reserved = int(self.limit) - steps
        header = Header(self.rank, turn, self.state.version, flags=self.flags, steps=steps, reserved=reserved)
        return add_round(Header(**{**vars(header), "speed": self.speed}), self.pending, finite=True)

    def close_turn(self, headers: Sequence[Header]) -> None:
        groups = self.ledger.due(headers)
        for group in groups:
            self.updates += self.ledger.apply(group)
        applied = [delta.header for group in groups for delta in group.deltas]
        self.progress = self.ledger.close_turn(headers, applied)
        self.limit = math.inf
        if any(header.worker == self.rank for header in applied):
            assert self.pending is not None
            self.pending, self.adoption = None, self.pending.fragment
        if self.wait is not None:
            self.adopt()
            self.execute(self.machine.after_wait(self.progress, self.in_flight))


def make_peer(rank: int, speeds: Sequence[float], rules: Settings, max_steps: int) -> Peer:
    size = len(speeds)
    budget = Budget(max_steps, size, rules.shares_budget(size))
    start = Progress.at_start(size, rules.round_length(max_steps).first())
    start = Progress(**{**vars(start), "caps": budget.caps(start.steps, start.round_steps)})
    rounds, state = Rounds(rank, size, rules), Model([State(rules.quorum) for _ in range(rules.fragments)])
    rounds.start(start, max_steps)
    peer = Peer(
        rank, rounds, Machine(rounds, rules.overlap), Ledger(state, rules, budget, start), state, start, speeds[rank]
    )
    peer.versions = [0] * rules.fragments
    peer.execute(peer.machine.begin(start))
    return peer


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_order_of_events_spends_the_budget_and_counts_every_step_once(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 4))
    speeds = data.draw(st.lists(st.floats(0.5, 4), min_size=size, max_size=size))
    local_steps = data.draw(st.integers(1, 7))
    rules = Settings(
        local_steps=local_steps,
        fragments=data.draw(st.integers(1, min(3, local_steps))),
        pace=data.draw(st.sampled_from(["dylu", "fixed"])),
        quorum=data.draw(st.integers(1, size)),
        overlap=data.draw(st.booleans()),
        budget=data.draw(st.sampled_from(["shared", "per_worker"])),
    )
    max_steps = data.draw(st.integers(1, 30))
    peers = [make_peer(rank, speeds, rules, max_steps) for rank in range(size)]
    turns = idle = 0
    headers: list[Header] = []
    for _ in range(100 * size * max_steps):
        if all(peer.done for peer in peers):
            break
        ready = [peer for peer in peers if peer.training]
        if ready and (idle == 3 or data.draw(st.booleans())):
            idle = 0
            held = data.draw(st.booleans())
            peer = data.draw(st.sampled_from(ready))
            peer.step(wanted=held and may_push(peer.flags, peer.in_flight))
            continue
        if not headers:  # their outcome comes later
            headers = [peer.header(turns) for peer in peers]
            continue
        for peer in peers:
            peer.close_turn(headers)
        headers = []
        turns, idle = turns + 1, idle + 1
    assert all(peer.done for peer in peers), [peer.wait for peer in peers]
    assert all(vars(peer.progress) == vars(peers[0].progress) for peer in peers)
    assert all(peer.updates == peers[0].updates for peer in peers)
    steps = [peer.rounds.local_steps for peer in peers]
    assert sum(steps) == max_steps * size
    if not rules.shares_budget(size):
        assert steps == [max_steps] * size
    for peer in peers:
        own = [update for update in peer.updates if update.worker == peer.rank]
        assert [update.round for update in own] == list(range(len(own)))
        assert sum(update.local_steps for update in own) == sum(update.samples for update in own) == steps[peer.rank]
        for fragment in range(rules.fragments):
            of_fragment = [push.fragment_steps for push in peer.pushed if push.fragment == fragment]
            assert sum(of_fragment) == steps[peer.rank]


def test_a_worker_that_waits_trains_on_once_others_leave_it_some_of_the_budget() -> None:
    peer = make_peer(0, [1.0, 1.0], Settings(local_steps=1, grace_period=0.0), 1)
    peer.step(wanted=False)
    assert peer.wait is Reason.BUDGET and Flag.IDLE in peer.flags
    more = Progress(**{**vars(peer.progress), "caps": (2, 1)})
    assert peer.machine.after_wait(more, in_flight=False) == Train()


def test_the_last_push_waits_for_the_one_before_it() -> None:
    machine = make_peer(0, [1.0], Settings(local_steps=5), 10).machine
    assert machine.finish(in_flight=True) == Wait(Reason.LAST_ADOPTION)
    over = Progress(**{**vars(Progress.at_start(1, 5)), "over": True})
    assert machine.after_wait(over, in_flight=False) == Push(last=True)
    assert machine.after_push(over) == Done()
