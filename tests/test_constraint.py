"""A constraint that the module keeps after its steps holds after adoptions, and for the global parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_async_localsgd import AsyncLocalSGD, Settings
from lightning_async_localsgd.outer import DelayedNesterov
from tests.modules import Batches, make_net
from tests.processes import results, run_processes

BOUND = 0.5


def clip(parameters: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        if name.endswith("weight"):
            parameter.clamp_(-BOUND, BOUND)


def largest(module: nn.Module) -> float:
    return max(float(p.detach().abs().max()) for name, p in module.named_parameters() if name.endswith("weight"))


def train(rank: int, constraint: Callable[[Mapping[str, Tensor]], None] | None) -> Any:
    module = make_net()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.05)
    global_: list[float] = []
    own = 0.0
    plan: dict[str, Any] = {"local_steps": 5, "timeout": timedelta(seconds=30), "constraint": constraint}
    plan["outer_optimizer"] = DelayedNesterov  # its momentum leads beyond the bound
    with AsyncLocalSGD(module, optimizer, max_steps=100, **plan) as job:
        for x, y in Batches(100 + rank):
            if not job.running:
                break
            nn.functional.mse_loss(module(x), y).backward()
            version = job.worker.version
            optimizer.step()
            if job.worker.version > version:  # taken over with the step
                own = max(own, largest(module))
            with torch.no_grad():
                clip(dict(module.named_parameters()))
            optimizer.zero_grad()
            if rank == 0 and job.worker.version > 0 and job.worker.local_steps % 10 == 0:
                with job.global_parameters():
                    global_.append(largest(module))
    return own, largest(module), max(global_, default=0.0), len(global_), job.summary.digest if job.summary else ""


def both(rank: int) -> Any:
    return train(rank, clip), train(rank, None)


def test_a_constraint_holds_for_the_global_parameters_and_not_without_being_named() -> None:
    ends = results(run_processes(both, 2))
    for (own, final, global_, _, digest), (_, unconstrained, *_) in ends:
        assert 0 < own <= BOUND and final <= BOUND < unconstrained and global_ <= BOUND
        assert digest == ends[0][0][-1]
    assert ends[0][0][3] > 0


def test_a_constraint_that_is_no_function_is_refused() -> None:
    with pytest.raises(ValueError, match="constraint"):
        Settings(constraint="clip")  # type: ignore[arg-type]
