"""Outer updates by sums are those by single deltas, and take place only where nothing needs single deltas."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import Parameter

from lightning_async_localsgd.outer import (
    Arrival,
    AsyncBuffer,
    DelayCompensation,
    DelayedNesterov,
    GlobalState,
    Poly,
    PolyThres,
    Transform,
    needs_single_deltas,
    takes_sums,
)
from lightning_async_localsgd.outer.layout import Layout

SGD = partial(torch.optim.SGD, lr=0.5, momentum=0.9, nesterov=True)
MOST = 9  # deltas of a turn


def turn_of(deltas: int, dtype: torch.dtype, turn: int) -> list[Tensor]:
    return list(torch.randn(deltas, 40, generator=torch.Generator().manual_seed(turn), dtype=dtype))


def optimizer_of(parameter: Parameter, n: int, c_times_n: float, growing: bool) -> DelayedNesterov:
    growth = {"growth": 0.4, "reach": 0.1} if growing else {}
    return DelayedNesterov([parameter], lr=0.7, buffer_size=n, momentum_activation=c_times_n / n, **growth)


@settings(max_examples=60, deadline=None)
@given(
    turns=st.lists(st.integers(1, MOST), min_size=50, max_size=50),
    n=st.sampled_from([1, 3, 4, 7]),
    c_times_n=st.sampled_from([0.0, 0.1, 1.0]),
    growing=st.booleans(),
    precision=st.sampled_from([(torch.float64, 1e-12), (torch.float32, 1e-5)]),
)
def test_a_sum_moves_the_parameters_as_its_deltas_would(
    turns: list[int], n: int, c_times_n: float, growing: bool, precision: tuple[torch.dtype, float]
) -> None:
    dtype, tolerance = precision
    single, summed = (Parameter(torch.ones(40, dtype=dtype)) for _ in range(2))
    by_one, by_sum = (optimizer_of(parameter, n, c_times_n, growing) for parameter in (single, summed))
    for turn, size in enumerate(turns):
        for optimizer in (by_one, by_sum):
            optimizer.set_round_length(turn)
        deltas = turn_of(size, dtype, turn)
        for delta in deltas:
            single.grad = delta
            by_one.step()
        sizes = by_sum.sum_sizes(size)
        assert sum(sizes) == size and sizes[0] == min(size, by_sum.room) and all(s == n for s in sizes[1:-1])
        for count in sizes:
            summed.grad = torch.stack(deltas[:count]).sum(0)
            by_sum.step(count=count)
            del deltas[:count]
    error = torch.linalg.vector_norm(summed - single) / torch.linalg.vector_norm(single)
    assert error <= tolerance
    for key in ("received", "filled"):
        assert by_sum.param_groups[0][key] == by_one.param_groups[0][key]


def test_a_buffer_can_end_with_the_turn_that_fills_it() -> None:
    """A turn is then one sum; single deltas, and turns that do not cross an end, move the parameters as before."""
    whole, exact = (Parameter(torch.ones(40, dtype=torch.float64)) for _ in range(2))
    by_turn = DelayedNesterov([whole], buffer_size=4, whole_turns=True)
    by_letter = DelayedNesterov([exact], buffer_size=4)
    deltas = turn_of(12, torch.float64, 0)
    for sizes in ([1, 1, 2], [4], [1]):
        for size in sizes:
            assert by_turn.sum_sizes(size) == [size]
            total = torch.stack(deltas[:size]).sum(0)
            for parameter, optimizer in ((whole, by_turn), (exact, by_letter)):
                parameter.grad = total.clone()
                optimizer.step(count=size)
            del deltas[:size]
        assert torch.equal(whole, exact)
    assert by_turn.sum_sizes(4) == [4] and by_letter.sum_sizes(4) == [3, 1]
    before = whole.detach().clone()
    momentum = by_turn.state[whole]["momentum"].clone()  # with the first delta of this buffer
    total = torch.stack(deltas[:3]).sum(0) + 1
    whole.grad = total.clone()
    by_turn.step(count=4)
    assert by_turn.param_groups[0]["received"] == 0 and by_turn.param_groups[0]["filled"] == 3
    momentum += total / 4
    torch.testing.assert_close(whole.detach(), before - 0.7 * (0.9 * momentum + total / 4))


@pytest.mark.parametrize("c_times_n", [0.0, 0.1, 1.0])
def test_a_sum_longer_than_a_block_is_added_up_block_by_block(c_times_n: float) -> None:
    single, summed = (Parameter(torch.zeros(70_001)) for _ in range(2))
    by_one, by_sum = (optimizer_of(parameter, 4, c_times_n, False) for parameter in (single, summed))
    deltas = torch.randn(8, 70_001, generator=torch.Generator().manual_seed(0))
    for i, count in ((0, 1), (1, 3), (4, 2), (6, 2)):
        for delta in deltas[i : i + count]:
            single.grad = delta
            by_one.step()
        summed.grad = deltas[i : i + count].sum(0)
        by_sum.step(count=count)
    torch.testing.assert_close(summed, single, rtol=1e-5, atol=1e-6)


def test_parameter_groups_of_unlike_buffers_end_a_sum_at_the_first_full_one() -> None:
    groups = [{"params": [Parameter(torch.zeros(1))], "buffer_size": size} for size in (2, 3)]
    optimizer = DelayedNesterov(groups)
    assert optimizer.sum_sizes(7) == [2, 1, 1, 2, 1]
    assert optimizer.sum_sizes(0) == []


@pytest.mark.parametrize("count", [0, -1, 3])
def test_a_sum_beyond_the_end_of_the_buffer_is_refused(count: int) -> None:
    parameter = Parameter(torch.zeros(1))
    optimizer = DelayedNesterov([parameter], buffer_size=3)
    parameter.grad = torch.ones(1)
    optimizer.step()
    assert optimizer.room == 2
    with pytest.raises(ValueError, match="`count` must be between 1 and 2"):
        optimizer.step(count=count)
    with pytest.raises(RuntimeError, match="pass the number of workers"):
        _ = DelayedNesterov([parameter]).room


# ---- in the global state ---------------------------------------------------------------------------------------------


def state_of(*transforms: Transform, sums: bool, outer: Any = None, quorum: int = 1) -> GlobalState:
    layout = Layout(nn.Sequential(nn.Linear(9, 5), nn.BatchNorm1d(5)))
    return GlobalState(layout, outer, 4, quorum, transforms=transforms, sums=sums)


def delta_of(state: GlobalState, seed: int) -> Tensor:
    flat = state.layout.empty()
    for i, view in enumerate(state.layout.views(flat)):
        view.copy_(torch.randn(view.shape, generator=torch.Generator().manual_seed(100 * seed + i)))
    return flat


@pytest.mark.parametrize(
    ("outer", "transforms"),
    [
        (partial(DelayedNesterov, growth=0.4, reach=0.1), ()),
        (partial(DelayedNesterov, momentum_activation=0.25), ()),
        (partial(DelayedNesterov, buffer_size=3), (PolyThres(threshold=3), DelayCompensation(0.1))),
    ],
)
def test_a_turn_by_sums_is_a_turn_by_single_deltas(outer: Any, transforms: tuple[Transform, ...]) -> None:
    one, other = (state_of(*transforms, sums=sums, outer=outer) for sums in (False, True))
    for turn in range(50):
        arrivals = [Arrival(worker, (turn + worker) % 5) for worker in range(1 + turn * turn % 4)]
        accepted = [arrival for arrival in arrivals if other.accepts(arrival)]
        sent = {arrival.worker: delta_of(one, 4 * turn + arrival.worker) for arrival in accepted}
        for arrival in accepted:
            one.transform_delta(sent[arrival.worker], arrival, delta_of(one, 1000 + turn))
        for state in (one, other):
            waiting = list(accepted)
            for size in state.update_sizes(len(accepted)):
                group, waiting = waiting[:size], waiting[size:]
                state.pseudo_gradient.copy_(torch.stack([sent[arrival.worker] for arrival in group]).sum(0))
                state.apply(group)
            state.apply([], refused=len(arrivals) - len(accepted))
        assert one.version == other.version
    error = torch.linalg.vector_norm(one.flat - other.flat) / torch.linalg.vector_norm(one.flat)
    assert error <= 1e-5


def test_with_one_delta_per_turn_sums_give_the_same_bits() -> None:
    one, other = (state_of(Poly(), sums=sums) for sums in (False, True))
    for turn in range(20):
        for state in (one, other):
            assert state.update_sizes(1) == [1]
            state.pseudo_gradient.copy_(delta_of(state, turn))
            state.apply([Arrival(turn % 4, 1)])
    assert one.digest() == other.digest()


def test_updates_are_as_large_as_they_may_be() -> None:
    by_sum = state_of(sums=True, outer=DelayedNesterov)
    assert [by_sum.update_sizes(count) for count in (0, 3, 9)] == [[], [3], [4, 4, 1]]
    assert [state_of(sums=True).update_sizes(count) for count in (0, 3, 9)] == [[], [3], [9]]
    assert state_of(sums=False).update_sizes(3) == [1, 1, 1]
    for sums in (False, True):
        assert [state_of(sums=sums, quorum=2).update_sizes(count) for count in (0, 3)] == [[], [3]]


class Own(Transform):
    """A transformation that does not say what it needs."""


@pytest.mark.parametrize(
    ("outer", "transforms", "quorum", "named"),
    [
        (None, (), 1, None),
        (None, (Poly(), DelayCompensation()), 1, None),
        (SGD, (), 4, None),
        (SGD, (PolyThres(),), 2, None),
        (SGD, (), 1, "SGD"),
        (None, (Poly(), AsyncBuffer()), 1, "AsyncBuffer"),
        (SGD, (AsyncBuffer(),), 2, "AsyncBuffer"),
        (None, (Own(),), 1, "Own"),
    ],
)
def test_sums_take_place_where_nothing_needs_single_deltas(
    outer: Any, transforms: tuple[Transform, ...], quorum: int, named: str | None
) -> None:
    state = state_of(*transforms, sums=False, outer=outer, quorum=quorum)
    assert state.can_sum is takes_sums(state.optimizer, transforms, quorum) is (named is None)
    if named is None:
        assert needs_single_deltas(state.optimizer, transforms, quorum) is None
        state_of(*transforms, sums=True, outer=outer, quorum=quorum)
    else:
        with pytest.raises(ValueError, match=named):
            state_of(*transforms, sums=True, outer=outer, quorum=quorum)
