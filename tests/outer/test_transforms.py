"""Each transformation is its paper's formula, sees what it should, and keeps replicas equal to the bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_async_localsgd.outer import (
    Arrival,
    AsyncBuffer,
    Context,
    DelayCompensation,
    GlobalState,
    Poly,
    PolyThres,
    Transform,
)
from lightning_async_localsgd.outer.layout import Layout
from tests.modules import make_net

NESTEROV = partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)
PLAIN = partial(torch.optim.SGD, lr=1.0)
LONG = 70_001  # elements: more than one block


def vectors(count: int, numel: int = LONG, seed: int = 0) -> list[Tensor]:
    return list(torch.randn(count, numel, generator=torch.Generator().manual_seed(seed)))


def context(staleness: int = 0, now: Tensor | None = None, start: Tensor | None = None, buffer: int = 4) -> Context:
    return Context([Arrival(0, staleness)], torch.zeros(1) if now is None else now, start, buffer)


# ---- formulas --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("staleness", [0, 1, 3, 100])
@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_poly_weighs_by_staleness(staleness: int, power: float) -> None:
    (g,) = vectors(1)
    expected = (1 + staleness) ** (-power) * g
    torch.testing.assert_close(Poly(power).update(g.clone(), {}, context(staleness)), expected)


@pytest.mark.parametrize(("staleness", "applied"), [(9, True), (10, True), (11, False)])
def test_polythres_drops_what_is_staler_than_its_threshold(staleness: int, applied: bool) -> None:
    (g,) = vectors(1)
    transform = PolyThres(0.5, threshold=10)
    assert transform.accepts(Arrival(0, staleness)) is applied
    result = transform.update(g.clone(), {}, context(staleness))
    torch.testing.assert_close(result, (1 + staleness) ** -0.5 * g)


def test_a_mean_of_deltas_is_as_stale_as_they_are_on_average() -> None:
    assert Context([Arrival(0, 0), Arrival(2, 5)], torch.zeros(1), None, 2).staleness == 2.5


def test_delay_compensation_is_its_formula() -> None:
    g, now, start = vectors(3)
    expected = g + 0.3 * g * g * (now - start)
    torch.testing.assert_close(DelayCompensation(0.3).update(g.clone(), {}, context(2, now, start)), expected)
    assert torch.equal(DelayCompensation(0.3).update(g.clone(), {}, context(0, now, start)), g)


@pytest.mark.parametrize(("size", "default"), [(3, 4), (None, 3)])
def test_async_buffer_gives_the_mean_of_every_n_first_in_first_out(size: int | None, default: int) -> None:
    buffer = AsyncBuffer(size)
    gs = vectors(7)
    state = buffer.init(torch.zeros(LONG))
    results = [buffer.update(g.clone(), state, context(buffer=default)) for g in gs]
    assert [result is not None for result in results] == [False, False, True, False, False, True, False]
    torch.testing.assert_close(results[2], torch.stack(gs[:3]).mean(0))
    torch.testing.assert_close(results[5], torch.stack(gs[3:6]).mean(0))


def test_a_buffer_of_one_changes_nothing() -> None:
    (g,) = vectors(1)
    buffer = AsyncBuffer(1)
    result = buffer.update(g.clone(), buffer.init(torch.zeros(LONG)), context())
    assert result is not None and torch.equal(result, g)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (partial(Poly, power=-0.5), "power"),
        (partial(Poly, power=float("nan")), "power"),
        (partial(PolyThres, power=-1), "power"),
        (partial(PolyThres, threshold=-1), "threshold"),
        (partial(DelayCompensation, strength=-1), "strength"),
        (partial(AsyncBuffer, size=0), "size"),
    ],
)
def test_impossible_parameters_are_refused(make: Callable[[], Transform], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        make()


# ---- in the global state ---------------------------------------------------------------------------------------------


def deltas(layout: Layout, seed: int = 1) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        flat = layout.empty()
        for view in layout.views(flat):
            view.copy_(torch.randn(view.shape, generator=generator))
        yield flat


def apply(state: GlobalState, delta: Tensor, *arrivals: Arrival) -> None:
    state.pseudo_gradient.copy_(delta)
    state.apply(arrivals or [Arrival(0, 0)])


def send(states: Sequence[GlobalState], delta: Tensor, arrival: Arrival, snapshot: Tensor) -> None:
    """One delta, transformed by its sender alone, is applied by all."""
    sent = delta.clone()
    accepted = states[0].accepts(arrival)
    if accepted:
        states[0].transform_delta(sent, arrival, snapshot)
    for state in states:
        state.pseudo_gradient.copy_(sent)
        state.apply([arrival] if accepted else [], refused=1 - accepted)


def make_state(*transforms: Transform, optimizer: Callable[..., Optimizer] | None = NESTEROV, **kw: Any) -> GlobalState:
    return GlobalState(Layout(make_net()), optimizer, transforms=transforms, **({"workers": 4} | kw))


def follow_log(states: Sequence[GlobalState], begin: int, end: int) -> None:
    """Updates ``begin`` to ``end`` of one log: workers 0 to 3 push in turns of one, two and four of them."""
    turns = [(0,), (1, 2), (3,), (0, 1, 2, 3), (2,), (0, 3)]
    for i, delta in enumerate(deltas(states[0].layout)):
        if i >= end:
            return
        if i < begin:
            continue
        for worker in turns[i % len(turns)]:
            send(states, delta, Arrival(worker, i % 5), delta.flip(0))


CHAINS = [
    (Poly(),),
    (PolyThres(threshold=2),),
    (DelayCompensation(0.5),),
    (AsyncBuffer(),),
    (AsyncBuffer(5),),
    (DelayCompensation(0.5), Poly(), AsyncBuffer(3)),
]


@pytest.mark.parametrize("chain", CHAINS, ids=str)
def test_replicas_agree_also_after_a_round_trip_at_any_moment(chain: tuple[Transform, ...]) -> None:
    first, second = make_state(*chain), make_state(*chain)
    follow_log([first, second], 0, 4)
    for i in range(4, 9):  # in the middle of a buffer, and with rounds from different starts under way
        restored = make_state(*chain)
        restored.load_state_dict(first.state_dict())
        assert restored.digest() == first.digest()
        follow_log([first, second, restored], i, i + 1)
        assert restored.digest() == first.digest() == second.digest()
        follow_log([restored], i + 1, 12)  # a copy: leaves the others as they are
    assert first.digest() == second.digest()


def test_the_digest_tells_buffers_apart() -> None:
    one, other = make_state(AsyncBuffer()), make_state(AsyncBuffer())
    for state in (one, other):
        follow_log([state], 0, 1)
    assert one.digest() == other.digest()
    next(other._chain.states)["sum"].view(torch.int32)[0] ^= 1
    assert one.digest() != other.digest()


@pytest.mark.parametrize("chain", [(DelayCompensation(0.5),), (Poly(1.0), DelayCompensation(0.5))], ids=str)
def test_a_sender_compensates_for_the_moves_since_the_start_of_its_round(chain: tuple[Transform, ...]) -> None:
    state = make_state(*chain, optimizer=PLAIN, workers=3)
    numel = state.layout.parameter_numel
    state.flat.copy_(next(deltas(state.layout, seed=5)))
    starts = [state.flat.clone() for _ in range(3)]
    source = deltas(state.layout)
    # Worker 0 pushes often, 1 and 2 together, and 2 late: rounds from several versions overlap.
    for turn in [(0,), (0,), (1, 2), (0,), (0, 1), (0,), (2,), (1,), (0, 1, 2), (2, 0)]:
        before_turn = state.flat.clone()
        for worker in turn:
            learned, theta = next(source).clone(), state.flat.clone()
            delta = learned.clone()
            state.transform_delta(delta, Arrival(worker, 1), starts[worker] - learned, before_turn)
            assert torch.equal(delta[numel:], learned[numel:])  # of buffers
            apply(state, delta, Arrival(worker, 1))
            g = learned / 2 if len(chain) > 1 else learned
            expected = theta - (g + 0.5 * g * g * (before_turn - starts[worker]))
            torch.testing.assert_close(state.flat[:numel], expected[:numel])
        for worker in turn:
            starts[worker] = state.flat.clone()


def test_a_delta_longer_than_a_block_is_transformed_as_a_whole() -> None:
    state = GlobalState(Layout(nn.Linear(300, 300)), transforms=[DelayCompensation(0.5), Poly()])
    state.flat.copy_(next(deltas(state.layout, seed=2)))
    delta, snapshot = next(deltas(state.layout)).clone(), next(deltas(state.layout, seed=3)).clone()
    expected = (delta + 0.5 * delta * delta * (state.flat - delta - snapshot)) * 4**-0.5
    state.transform_delta(delta, Arrival(0, 3), snapshot)
    torch.testing.assert_close(delta, expected)


def test_with_a_quorum_each_delta_is_weighted_by_its_own_staleness() -> None:
    state = make_state(Poly(0.5), optimizer=PLAIN, quorum=3)
    source, total = deltas(state.layout), state.layout.empty()
    arrivals = [Arrival(0, 0), Arrival(1, 3), Arrival(2, 8)]
    expected = state.layout.empty()
    for arrival in arrivals:
        delta = next(source).clone()
        expected -= delta * (1 + arrival.staleness) ** -0.5 / 3
        state.transform_delta(delta, arrival, state.layout.empty())
        total += delta
    apply(state, total, *arrivals)
    numel = state.layout.parameter_numel
    torch.testing.assert_close(state.flat[:numel], expected[:numel])


def test_equal_workers_with_an_async_buffer_are_synchronous_diloco() -> None:
    synchronous = make_state(quorum=4)
    buffered = make_state(AsyncBuffer())
    start = next(deltas(synchronous.layout, seed=5))
    for state in (synchronous, buffered):
        state.flat.copy_(start)
    source = deltas(synchronous.layout)
    for _ in range(6):  # rounds in which all start from the same parameters
        gs = [next(source) for _ in range(4)]
        apply(synchronous, torch.stack(gs).sum(0), *(Arrival(worker, 0) for worker in range(4)))
        for worker, g in enumerate(gs):
            apply(buffered, g, Arrival(worker, worker))
        torch.testing.assert_close(buffered.flat, synchronous.flat)
    assert (synchronous.version, buffered.version) == (6, 24)


def test_what_is_held_back_moves_no_parameter_but_counts_and_mixes_buffers() -> None:
    state = GlobalState(Layout(nn.BatchNorm1d(3)), NESTEROV, workers=4, transforms=[AsyncBuffer(2)])
    delta = state.layout.empty()
    for view in state.layout.views(delta):
        view.fill_(-4.0)
    apply(state, delta, Arrival(2, 5))
    after = state.state_dict()["tensors"]
    assert after["weight"].tolist() == [0.0] * 3
    assert after["running_mean"].tolist() == [1.0] * 3
    assert state.version == 1
    assert not state.optimizer.state[state.parameters[0]]  # no momentum of nothing


@pytest.mark.parametrize(("quorum", "version"), [(1, 2), (4, 1)])
def test_what_is_refused_moves_nothing_and_counts(quorum: int, version: int) -> None:
    state = GlobalState(Layout(nn.BatchNorm1d(3)), NESTEROV, 4, quorum, transforms=[PolyThres(threshold=1)])
    before = state.flat.clone()
    assert state.accepts(Arrival(2, 1)) and not state.accepts(Arrival(2, 2))
    state.pseudo_gradient.fill_(math.nan)  # nothing has been sent
    state.apply([], refused=2)
    assert state.version == version
    assert torch.equal(state.flat, before)


def test_transformations_act_in_order_and_those_after_one_that_holds_back_see_nothing() -> None:
    seen: list[tuple[str, float]] = []

    class Note(Transform):
        def __init__(self, name: str, factor: float | None) -> None:
            self.name, self.factor = name, factor

        def update(self, pseudo_gradient: Tensor, state: dict[str, Any], context: Context) -> Tensor | None:
            seen.append((self.name, pseudo_gradient.max().item()))
            return None if self.factor is None else pseudo_gradient * self.factor  # a new tensor

    state = make_state(Note("a", 2.0), Note("b", 3.0), optimizer=PLAIN)
    apply(state, state.layout.empty().fill_(1.0))
    assert seen == [("a", 1.0), ("b", 2.0)]
    assert state.parameters[0].min().item() == -6.0
    seen.clear()
    state = make_state(Note("a", None), Note("b", 3.0), optimizer=PLAIN)
    apply(state, state.layout.empty().fill_(1.0))
    assert [name for name, _ in seen] == ["a"]


def test_a_run_goes_on_with_fewer_workers_without_losing_the_buffer() -> None:
    old = make_state(AsyncBuffer(), optimizer=PLAIN)
    source = deltas(old.layout)
    gs = [next(source) for _ in range(4)]
    for g in gs[:3]:
        apply(old, g)
    new = make_state(AsyncBuffer(), optimizer=PLAIN, workers=2)
    new.load_state_dict(old.state_dict())
    apply(new, gs[3])
    numel = new.layout.parameter_numel
    torch.testing.assert_close(new.flat[:numel], -torch.stack(gs).mean(0)[:numel])


@pytest.mark.parametrize("chain", CHAINS, ids=str)
def test_a_checkpoint_without_transformations_can_be_gone_on_from(chain: tuple[Transform, ...]) -> None:
    plain = make_state()
    follow_log([plain], 0, 3)
    saved = plain.state_dict()
    del saved["transforms"]  # as before there were any
    state = make_state(*chain)
    follow_log([state], 0, 5)
    state.load_state_dict(saved)
    fresh = make_state(*chain)
    fresh.load_state_dict(plain.state_dict())
    assert state.digest() == fresh.digest()
    follow_log([state, fresh], 3, 9)
    assert state.digest() == fresh.digest()


def test_a_checkpoint_that_kept_where_rounds_started_can_be_gone_on_from() -> None:
    state, restored = make_state(DelayCompensation()), make_state(DelayCompensation())
    follow_log([state], 0, 3)
    starts = {"began": [0, -1, 0, -1], "copies": [torch.zeros(state.layout.parameter_numel)]}
    assert restored.load_state_dict(state.state_dict() | {"starts": starts}) == []
    assert restored.digest() == state.digest()


@dataclass(frozen=True)
class Duck:
    """A transformation that derives from nothing."""

    per_delta = False
    needs_start = False

    def accepts(self, arrival: Arrival) -> bool:
        return True

    def init(self, parameters: Tensor) -> dict[str, Any]:
        return {}

    def update(self, pseudo_gradient: Tensor, state: dict[str, Any], context: Context) -> Tensor:
        return pseudo_gradient


def test_an_object_with_the_same_members_will_do() -> None:
    one, other = make_state(Duck()), make_state()
    follow_log([one], 0, 5)
    follow_log([other], 0, 5)
    assert one.digest() == other.digest()


class Stateful(Poly):
    def init(self, parameters: Tensor) -> dict[str, Any]:
        return {"count": 0}


class Starting(AsyncBuffer):
    needs_start = True


@pytest.mark.parametrize(
    ("transforms", "message"),
    [
        (Poly(), "must be a list"),
        ([Poly], r"pass an object, Poly\(\)"),
        (["poly"], "'poly' lacks init, accepts, update, per_delta, needs_start"),
        ([AsyncBuffer(), Poly()], "put Poly first"),
        ([Stateful()], "keeps a state"),
        ([Starting()], "set `per_delta = True` too"),
    ],
)
def test_what_is_no_chain_is_refused(transforms: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GlobalState(Layout(make_net()), workers=4, transforms=transforms)


def test_a_transformation_of_the_single_delta_that_returns_nothing_is_named() -> None:
    class Dropping(Poly):
        def update(self, pseudo_gradient: Tensor, state: dict[str, Any], context: Context) -> Tensor:
            return None  # type: ignore[return-value]

    state = make_state(Dropping())
    with pytest.raises(TypeError, match=r"Dropping\.update has returned None"):
        state.transform_delta(state.layout.empty(), Arrival(0, 0), state.layout.empty())
