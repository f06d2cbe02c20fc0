"""The delta of a round, and the module after an adoption, in every precision."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lightning_async_localsgd.outer import Adopter, Arrival, DelayCompensation, GlobalState, Unsendable, write_delta
from lightning_async_localsgd.outer.layout import Layout

LARGEST = torch.finfo(torch.float32).max


def make(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Layout]:
    module = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)).to(dtype)
    return module, Layout(module)


def flatten(layout: Layout, tensors: list[Tensor]) -> Tensor:
    flat = layout.empty()
    torch._foreach_copy_(layout.views(flat), tensors)
    return flat


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("learned_meanwhile", [True, False])
def test_the_next_delta_is_what_was_learned_and_no_rounding(dtype: torch.dtype, learned_meanwhile: bool) -> None:
    module, layout = make(dtype)
    tensors, adopter = layout.tensors(module), Adopter(layout)
    for tensor in tensors[: layout.parameter_count]:
        nn.init.normal_(tensor)
    generator = torch.Generator().manual_seed(0)
    snapshot = flatten(layout, tensors)
    base = snapshot + 0.01 * torch.randn(layout.numel, generator=generator)  # on no grid of a narrow dtype
    correction = base - snapshot
    if learned_meanwhile:
        for tensor in tensors:
            tensor.add_(torch.randn(tensor.shape, generator=generator).to(dtype))
        meanwhile = flatten(layout, tensors) - snapshot
        adopter.advance(tensors, base, correction, ())
    else:
        meanwhile = torch.zeros_like(base)
        adopter.replace(tensors, base, correction)
    for found, expected in zip(
        layout.views(flatten(layout, tensors) - base)[: layout.parameter_count], layout.views(meanwhile), strict=False
    ):
        assert torch.allclose(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("local", [0.0, 0.25, 1.0])
def test_a_shared_correction_moves_to_the_mean_of_local_and_global_parameters(dtype: torch.dtype, local: float) -> None:
    torch.manual_seed(0)
    module, layout = make(dtype)
    tensors, adopter = layout.tensors(module), Adopter(layout)
    before = flatten(layout, tensors)
    base = flatten(layout, [torch.randn(slot.shape) for slot in layout.slots])
    given, correction = base.clone(), torch.full_like(base, math.nan)
    adopter.share(tensors, base, correction, local)
    adopter.advance(tensors, base, correction, ())
    expected = local * before + (1 - local) * given
    assert torch.allclose(flatten(layout, tensors), expected, rtol=0, atol=1e-6 if dtype == torch.float32 else 0.02)
    # The next delta is what is left of the local progress, without what the dtype has rounded.
    left, count = flatten(layout, tensors) - base, layout.parameter_numel
    assert torch.allclose(left[:count], (local * (before - given))[:count], rtol=0, atol=1e-6)


def test_float64_keeps_the_bits_that_fp32_cannot_carry() -> None:
    module, layout = make(torch.float64)
    tensors, adopter = layout.tensors(module), Adopter(layout)
    for tensor in tensors:
        tensor.fill_(1 + 2.0**-40)
    base = flatten(layout, tensors) + 0.5
    for adopt in (
        lambda correction: adopter.replace(tensors, base, correction),
        lambda correction: adopter.advance(tensors, base, correction, ()),
    ):
        adopt(base - flatten(layout, tensors))
        assert all(bool((t == 1.5 + 2.0**-40).all()) for t in tensors[: layout.parameter_count])


def test_a_buffer_that_is_not_finite_is_left_out_and_the_rest_is_sent() -> None:
    module, layout = make()
    state = GlobalState(layout, workers=2)
    state.begin(layout.tensors(module))
    base = state.flat.clone()
    with torch.no_grad():
        module[0].weight.add_(1)
        module[1].running_var[2] = math.inf
    snapshot = flatten(layout, layout.tensors(module))
    unsendable = write_delta(state, base, snapshot, base[layout.parameter_numel :], base, LARGEST)
    assert [layout.slots[index].name for index in unsendable.buffers] == ["1.running_var"]
    assert unsendable.parameters == ()
    assert bool(torch.isfinite(base).all()) and torch.allclose(layout.views(base)[0], torch.tensor(-1.0))


def test_of_a_parameter_that_is_not_finite_any_more_the_name_is_told() -> None:
    module, layout = make()
    state = GlobalState(layout, workers=2)
    state.begin(layout.tensors(module))
    with torch.no_grad():
        module[0].bias[0] = math.nan
    snapshot = flatten(layout, layout.tensors(module))
    buffers, out = state.flat[layout.parameter_numel :], layout.empty()
    assert write_delta(state, state.flat, snapshot, buffers, out, LARGEST) == Unsendable((), ("0.bias",))
    assert write_delta(state, state.flat, state.flat + 9, buffers, out, 8.0).parameters != ()


def test_elements_that_were_never_finite_stay_and_the_others_move() -> None:
    module, layout = make()
    with torch.no_grad():
        module[0].weight[0, 3:] = -math.inf
    # Both look at the parameters themselves.
    state = GlobalState(
        layout,
        lambda parameters: torch.optim.SGD(parameters, lr=1.0, weight_decay=0.1, momentum=0.9),
        transforms=[DelayCompensation()],
    )
    assert state.begin(layout.tensors(module)) == ["0.weight"]
    for _ in range(3):
        before = state.flat.clone()
        snapshot = torch.where(before.isfinite(), before + 0.5, before)
        buffers = before[layout.parameter_numel :]
        unsendable = write_delta(state, before.clone(), snapshot, buffers, state.pseudo_gradient, LARGEST)
        assert unsendable == Unsendable()
        state.transform_delta(state.pseudo_gradient, Arrival(0, 2), snapshot)
        assert bool(torch.isfinite(state.pseudo_gradient).all())
        state.apply([Arrival(0, 2)])
        weight = layout.views(state.flat)[0]
        assert bool((weight[0, 3:] == -math.inf).all())
        assert bool(torch.isfinite(weight[1:]).all()) and not torch.equal(weight[1:], layout.views(before)[0][1:])
