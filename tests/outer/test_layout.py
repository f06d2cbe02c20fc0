"""The layout holds every trainable parameter and float buffer once, in the same place on every worker."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from lightning_async_localsgd.outer.layout import Layout


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5, bias=False)
        self.frozen = nn.Linear(5, 5)
        self.frozen.requires_grad_(False)
        self.norm = nn.BatchNorm1d(5)
        self.last = nn.Linear(5, 5)
        self.last.weight = self.first.weight


def test_slots_are_aligned_disjoint_and_without_frozen_or_tied_copies() -> None:
    layout = Layout(Tied())
    names = [slot.name for slot in layout.slots]
    assert names == [
        "first.weight",
        "norm.weight",
        "norm.bias",
        "last.bias",
        "norm.running_mean",
        "norm.running_var",
    ]
    assert layout.parameter_count == 4
    ends = [slot.offset + slot.numel for slot in layout.slots]
    starts = [slot.offset for slot in layout.slots[1:]] + [layout.numel]
    assert all(end <= start for end, start in zip(ends, starts, strict=True))
    assert all(slot.offset % 16 == 0 for slot in layout.slots) and layout.numel % 16 == 0


def test_values_survive_the_way_through_the_flat_vector() -> None:
    module, other = Tied(), Tied()
    layout = Layout(module)
    flat = layout.empty()
    torch._foreach_copy_(layout.views(flat), layout.tensors(module))
    torch._foreach_copy_(layout.tensors(other), layout.views(flat))
    assert torch.equal(module.last.weight, other.first.weight)
    assert torch.equal(module.norm.running_var, other.norm.running_var)
    assert next(iter(layout.describe())) == "first.weight: float32[5, 5]"


def test_a_module_without_trainable_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="no trainable parameters"):
        Layout(nn.Linear(2, 2).requires_grad_(False))


def test_complex_parameters_are_refused_by_name() -> None:
    module = nn.Module()
    module.phase = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(ValueError, match="'phase'"):
        Layout(module)


def test_frozen_parameters_have_a_place_where_they_may_be_unfrozen() -> None:
    module = Tied()
    module.mask = nn.Parameter(torch.full((3,), -torch.inf), requires_grad=False)
    module.codes = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    layout = Layout(module, frozen=True)
    names = [slot.name for slot in layout.parameter_slots]
    assert names == [
        "first.weight",
        "frozen.weight",
        "frozen.bias",
        "norm.weight",
        "norm.bias",
        "last.bias",
    ]
    with pytest.raises(ValueError, match="no trainable parameters"):
        Layout(nn.Linear(2, 2).requires_grad_(False), frozen=True)


def test_parameters_that_are_views_of_the_same_memory_appear_once() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    module[1].weight.data = module[0].weight.data
    layout = Layout(module)
    assert [slot.name for slot in layout.slots] == ["0.weight", "0.bias", "1.bias", "2.weight", "2.bias"]
    layout.check_trainable(module)


def test_parameters_that_share_a_part_of_their_memory_are_refused_by_name() -> None:
    memory = torch.zeros(4, 8)
    module = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    module[0].weight.data, module[1].weight.data = memory[:, :4], memory[:, 4:]  # beside each other, in each row
    assert len(Layout(module).slots) == 2
    for other in (memory[:, 2:6], memory[:, :4].t(), memory.view(torch.int32)[:, :4].view(torch.float32).t()):
        module[1].weight.data = other
        with pytest.raises(ValueError, match=r"'0\.weight' and '1\.weight' share a part of their memory"):
            Layout(module)


def test_parameters_beyond_fp32_are_refused_by_name() -> None:
    module = nn.Linear(2, 2).double()
    nn.init.constant_(module.bias, 1e200)
    with pytest.raises(ValueError, match=r"'bias' has elements beyond 3\.4e\+38"):
        Layout(module)


def test_a_buffer_that_has_gone_or_grown_leaves_a_tensor_of_nan() -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    module.register_buffer("mean", torch.zeros(3))
    layout = Layout(module)
    for changed in (torch.zeros(4), None, torch.zeros(3, dtype=torch.int64)):
        module.mean = changed
        assert layout.tensors(module)[-1].isnan().tolist() == [True] * 3


def test_lazy_parameters_are_refused_with_the_way_out() -> None:
    for lazy in (nn.LazyLinear(2), nn.LazyBatchNorm1d()):
        with pytest.raises(ValueError, match=r"weight' of Sequential is lazy.*`configure_model`"):
            Layout(nn.Sequential(nn.Linear(2, 2), lazy))


def test_a_tensor_that_has_gone_since_is_named() -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    layout = Layout(module)
    prune.identity(module[0], "weight")
    with pytest.raises(RuntimeError, match=r"'0\.weight' was a parameter .* before `fit`"):
        layout.tensors(module)
