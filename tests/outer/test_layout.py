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


class Blocks(nn.Module):
    """An embedding, blocks of a list, a head, and a statistic."""

    def __init__(self, blocks: int = 6, vocabulary: int = 1) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(blocks))
        self.head = nn.Linear(8, 1)
        self.norm = nn.BatchNorm1d(8, affine=False)


def blocks_of(layout: Layout) -> list[set[str]]:
    return [{".".join(slot.name.split(".")[:2]) for slot in part.parameter_slots} for part in layout.fragments]


def test_fragments_are_blocks_strided() -> None:
    layout = Layout(Blocks(), fragments=3)
    assert [sorted(name for name in names if name.startswith("blocks")) for names in blocks_of(layout)] == [
        ["blocks.2", "blocks.5"],
        ["blocks.0", "blocks.3"],
        ["blocks.1", "blocks.4"],
    ]
    assert {name for names in blocks_of(layout) for name in names} >= {"embedding.weight", "head.weight", "head.bias"}


def test_a_fragment_with_a_large_block_takes_fewer_of_the_others() -> None:
    layout = Layout(Blocks(vocabulary=40), fragments=2)
    first, second = layout.fragments
    assert first.parameter_slots[0].name == "embedding.weight"
    assert abs(first.parameter_numel - second.parameter_numel) <= 2 * (2 * 64 + 2 * 16)


@pytest.mark.parametrize("fragments", [1, 2, 5])
def test_fragments_are_the_vector_cut_at_tensors(fragments: int) -> None:
    torch.manual_seed(0)
    module = Blocks(blocks=3)
    layout = Layout(module, fragments=fragments)
    flat = layout.empty()
    torch._foreach_copy_(layout.views(flat), layout.tensors(module))
    assert len(layout.fragments) == fragments
    ends = [part.span.stop for part in layout.fragments]
    assert [part.span.start for part in layout.fragments] == [0, *ends[:-1]] and ends[-1] == layout.numel
    assert [slot.name for part in layout.fragments for slot in part.slots] == [slot.name for slot in layout.slots]
    tensors, named = layout.tensors(module), dict(module.named_parameters()) | dict(module.named_buffers())
    for part in layout.fragments:
        for slot, view, tensor in zip(part.slots, part.views(flat[part.span]), tensors[part.members], strict=True):
            assert torch.equal(view, named[slot.name]) and tensor.data_ptr() == named[slot.name].data_ptr()
    *before, last = layout.fragments
    assert all(part.numel == part.parameter_numel for part in before)
    assert [slot.name for slot in last.slots[last.parameter_count :]] == ["norm.running_mean", "norm.running_var"]


def test_gaps_are_cleared_and_nothing_else() -> None:
    layout = Layout(Tied())
    flat = torch.ones(layout.numel)
    layout.clear_gaps(flat)
    assert flat.sum() == sum(slot.numel for slot in layout.slots)
    assert all((view == 1).all() for view in layout.views(flat))


def test_more_fragments_than_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`fragments=3` are more than the 2 trainable parameters.* Pass at most 2"):
        Layout(nn.Linear(2, 2), fragments=3)
