"""Which buffers are averaged over the workers, and which each keeps for itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_async_localsgd.outer.kinds import find_local_buffers, statistics
from lightning_async_localsgd.outer.layout import Layout


class RunningNorm(nn.Module):
    """A normalization layer of the user's own; its name says what it is."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("memory", torch.zeros(3))


class Buffers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 2)
        self.batch_norm = nn.BatchNorm1d(2)
        self.own_norm = RunningNorm()
        self.register_buffer("variance", torch.ones(4))
        self.register_buffer("codebook_average", torch.randn(5, 3))
        self.register_buffer("hidden", torch.zeros(2), persistent=False)
        self.register_buffer("queue", torch.zeros(2, 8))
        self.register_buffer("memory_bank2", torch.zeros(2, 8))
        self.register_buffer("negatives", nn.functional.normalize(torch.randn(4, 8), dim=0))
        self.register_buffer("seen", torch.tensor(0))
        self.register_buffer("seconds", torch.zeros((), dtype=torch.float64))
        self.register_buffer("phase", torch.zeros(2, dtype=torch.complex64))
        self.register_buffer("mask", torch.full((2,), -torch.inf))
        self.register_buffer("nothing", torch.zeros(0))
        self.register_buffer("sparse", torch.zeros(3, 3).to_sparse())


def names(module: nn.Module, local: Any = ()) -> list[str]:
    return [name for name, _ in statistics(module, local)]


def test_running_statistics_are_averaged_and_nothing_else() -> None:
    assert sorted(names(Buffers())) == [
        "batch_norm.running_mean",
        "batch_norm.running_var",
        "codebook_average",
        "hidden",
        "own_norm.memory",
        "variance",
    ]


def test_in_a_module_of_doubles_so_are_statistics_in_double() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).double()
    module.register_buffer("variance", torch.ones(2, dtype=torch.float64))
    assert "variance" in names(module)


@pytest.mark.parametrize("pattern", ["variance", "var*", "*iance"])
def test_a_user_says_by_name_what_is_local(pattern: str) -> None:
    module = Buffers()
    assert "variance" not in [slot.name for slot in Layout(module, local_buffers=[pattern]).slots]
    assert "variance" in Layout(module, local_buffers=[pattern]).others(module)


def test_a_pattern_means_the_full_name_or_the_last_part() -> None:
    module = Buffers()
    assert find_local_buffers(module, ["running_var"]) == ["batch_norm.running_var"]
    assert find_local_buffers(module, ["batch_norm.*mean"]) == ["batch_norm.running_mean"]
    with pytest.raises(
        ValueError, match=r"'running_vra', which no buffer of Buffers is called.*batch_norm\.running_var"
    ):
        find_local_buffers(module, ["running_var", "running_vra"])
