"""The global state is a state machine: same deltas, same bits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_async_localsgd.outer import Arrival, GlobalState
from lightning_async_localsgd.outer.layout import Layout
from tests.modules import make_net


def deltas(layout: Layout, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    result = []
    for _ in range(count):
        flat = layout.empty()
        for view in layout.views(flat):
            view.copy_(torch.randn(view.shape, generator=generator))
        result.append(flat)
    return result


def apply(state: GlobalState, flat: Tensor) -> None:
    state.pseudo_gradient.copy_(flat)
    state.apply([Arrival(worker=0, staleness=0)])


@pytest.mark.parametrize(
    "outer_optimizer",
    [None, partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True), partial(torch.optim.Adam, lr=0.1)],
)
def test_replicas_agree_also_after_a_round_trip(outer_optimizer: Callable[..., Any] | None) -> None:
    layout = Layout(make_net())
    first, second, restored = (GlobalState(layout, outer_optimizer, workers=3) for _ in range(3))
    for i, delta in enumerate(deltas(layout, 7)):
        if i == 4:
            restored.load_state_dict(first.state_dict())
        for state in (first, second) if i < 4 else (first, second, restored):
            apply(state, delta)
    assert first.digest() == second.digest() == restored.digest()
    assert first.checksum() == second.checksum() == restored.checksum()
    assert first.version == 7


def test_digest_tells_a_single_bit_version_and_outer_state() -> None:
    layout = Layout(make_net())
    one, other = GlobalState(layout, workers=2), GlobalState(layout, workers=2)
    apply(one, deltas(layout, 1)[0])
    apply(other, deltas(layout, 1)[0])
    digest, checksum = one.digest(), one.checksum()
    assert other.digest() == digest
    other.flat.view(torch.int32)[3] ^= 1
    assert other.digest() != digest and other.checksum() != checksum
    other.flat.view(torch.int32)[3] ^= 1
    next(iter(other.optimizer.state.values()))["momentum"].view(torch.int32).view(-1)[0] ^= 1
    assert other.digest() != digest
    one.version += 1
    assert one.digest() != digest


def test_buffers_are_averaged_and_parameters_are_optimized() -> None:
    module = nn.BatchNorm1d(3)
    layout = Layout(module)
    state = GlobalState(layout, workers=4)
    state.flat.copy_(torch.zeros(layout.numel))
    delta = layout.empty()
    views = dict(zip([slot.name for slot in layout.slots], layout.views(delta), strict=True))
    views["running_mean"].fill_(-4.0)  # a worker whose mean has grown by 4
    views["weight"].fill_(-4.0)
    apply(state, delta)
    after = state.state_dict()["tensors"]
    assert after["running_mean"].tolist() == [1.0] * 3  # a quarter of the way: one of four workers
    assert after["weight"][0].item() == pytest.approx(1.0)
    assert "num_batches_tracked" not in after


def test_a_sum_of_deltas_is_applied_and_measured_as_their_mean() -> None:
    layout = Layout(nn.BatchNorm1d(3))
    of_sum, of_mean = (GlobalState(layout, partial(torch.optim.SGD, lr=1.0), workers=4, quorum=3) for _ in range(2))
    arrived = deltas(layout, 3)
    total = torch.stack(arrived).sum(0)
    of_sum.pseudo_gradient.copy_(total)
    of_mean.pseudo_gradient.copy_(total / 3)
    assert of_sum.measure(3)[0] == pytest.approx(of_mean.measure()[0])
    of_sum.apply([Arrival(worker, 0) for worker in range(3)])
    numel = layout.parameter_numel
    assert torch.equal(of_sum.flat[:numel], -(total / 3)[:numel])
    torch.testing.assert_close(of_sum.flat[numel:], -total[numel:] / 4)  # each of the four workers weighs a quarter
    assert of_sum.version == 1


def test_a_foreign_state_is_refused_and_changes_nothing() -> None:
    layout = Layout(make_net())
    state = GlobalState(layout, workers=2)
    digest = state.digest()
    other = GlobalState(Layout(nn.Linear(2, 2)), workers=2).state_dict()
    with pytest.raises(ValueError, match=r"'0\.weight'"):
        state.load_state_dict(other)
    saved = state.state_dict()
    saved["tensors"]["extra"] = torch.zeros(1)
    with pytest.raises(ValueError, match="extra"):
        state.load_state_dict(saved)
    assert state.digest() == digest
