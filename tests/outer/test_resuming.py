"""An outer optimizer that goes on has the settings that are given now, and the state of then."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from lightning_async_localsgd.outer import DelayedNesterov, GlobalState, Poly
from lightning_async_localsgd.outer.layout import Layout
from lightning_async_localsgd.outer.transforms import Arrival, AsyncBuffer


def make_state(outer: Any = None, workers: int = 2, steps: int = 0, transforms: Any = ()) -> GlobalState:
    state = GlobalState(Layout(nn.Linear(3, 2)), outer, workers, transforms=transforms)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        state.pseudo_gradient.copy_(torch.randn(state.layout.numel, generator=generator))
        state.apply([Arrival(step % workers, 0)])
    return state


def momentum(state: GlobalState) -> list[torch.Tensor]:
    return [state.optimizer.state[p]["momentum"] for p in state.parameters]


def test_what_is_given_counts_and_what_differs_is_told() -> None:
    before = make_state(partial(DelayedNesterov, lr=0.7), steps=3)
    after = make_state(partial(DelayedNesterov, lr=0.1, momentum=0.5))
    told = after.load_state_dict(before.state_dict())
    assert [(g["lr"], g["momentum"], g["received"]) for g in after.optimizer.param_groups] == [(0.1, 0.5, 1)]
    assert told == [
        "`lr` of the outer optimizer was 0.7 and is 0.1",
        "`momentum` of the outer optimizer was 0.9 and is 0.5",
    ]
    assert all(torch.equal(a, b) for a, b in zip(momentum(after), momentum(before), strict=True))


def test_a_value_that_a_schedule_has_changed_goes_on() -> None:
    before = make_state(partial(DelayedNesterov, lr=0.7), steps=1)
    before.optimizer.param_groups[0]["lr"] = 0.3
    after = make_state(partial(DelayedNesterov, lr=0.7))
    assert after.load_state_dict(before.state_dict()) == []
    assert after.optimizer.param_groups[0]["lr"] == 0.3


def test_settings_are_those_of_the_workers_of_now() -> None:
    before = make_state(partial(DelayedNesterov, momentum_activation=0.5), workers=2, steps=3)
    after = make_state(DelayedNesterov, workers=4)
    assert after.load_state_dict(before.state_dict()) == [
        "`momentum_activation` of the outer optimizer was 0.5 and is 0.0"
    ]
    group = after.optimizer.param_groups[0]
    assert (group["buffer_size"], group["momentum_activation"]) == (4, 0.0)
    with pytest.raises(ValueError, match=r"between 0 and 1/buffer_size = 0\.25"):
        make_state(partial(DelayedNesterov, momentum_activation=0.5), workers=4)


def test_activation_may_begin_later() -> None:
    before = make_state(DelayedNesterov, steps=3)
    after = make_state(partial(DelayedNesterov, momentum_activation=0.5))
    assert len(after.load_state_dict(before.state_dict())) == 1
    after.apply([Arrival(0, 0)])
    assert all("buffer" in after.optimizer.state[p] for p in after.parameters)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    ("then", "now"),
    [(None, partial(torch.optim.SGD, lr=0.5, momentum=0.9)), (partial(torch.optim.Adam, lr=0.1), None)],
)
def test_the_state_of_another_outer_optimizer_begins_anew(then: Any, now: Any, known: bool) -> None:
    before, after = make_state(then, steps=3), make_state(now)
    saved = before.state_dict()
    if not known:  # as earlier versions saved it
        del saved["optimizer_name"], saved["optimizer_given"]
    told = after.load_state_dict(saved)
    assert len(told) == 1 and "its state begins anew" in told[0] and type(after.optimizer).__name__ in told[0]
    assert torch.equal(after.flat, before.flat) and after.version == 3
    after.apply([Arrival(0, 0)])


def test_a_state_that_lacks_what_is_needed_now_begins_anew() -> None:
    before = make_state(partial(torch.optim.Adam, lr=0.1), steps=2)
    after = make_state(partial(torch.optim.Adam, lr=0.1, amsgrad=True))
    told = after.load_state_dict(before.state_dict())
    assert any("needs ['max_exp_avg_sq'], which was not saved: its state begins anew" in line for line in told)
    after.apply([Arrival(0, 0)])


def test_other_parameter_groups_are_refused() -> None:
    before = make_state(steps=1)
    after = make_state(lambda ps: DelayedNesterov([{"params": [p]} for p in ps]))
    with pytest.raises(ValueError, match=r"DelayedNesterov of the checkpoint has parameter groups of \[2\] parameters"):
        after.load_state_dict(before.state_dict())


def test_other_transformations_are_told() -> None:
    before = make_state(steps=3, transforms=[AsyncBuffer(2)])
    after = make_state(transforms=[Poly(), AsyncBuffer(2)])
    assert (
        "`transforms` were ['AsyncBuffer'] and are ['Poly', 'AsyncBuffer']"
        in after.load_state_dict(before.state_dict())[0]
    )


def test_earlier_checkpoints_take_the_settings_of_now_too() -> None:
    before = make_state(partial(DelayedNesterov, lr=0.7), steps=3)
    saved = before.state_dict()
    del saved["optimizer_name"], saved["optimizer_given"]
    after = make_state(partial(DelayedNesterov, lr=0.1))
    assert after.load_state_dict(saved) == ["`lr` of the outer optimizer was 0.7 and is 0.1"]
    assert after.optimizer.param_groups[0]["lr"] == 0.1
