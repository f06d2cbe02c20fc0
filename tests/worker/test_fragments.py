"""A model that is exchanged in fragments, in real processes: nothing is lost, whatever comes between."""

from __future__ import annotations

import time
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from lightning_async_localsgd import Settings, Worker
from tests.processes import job_store, results, run_processes

SIZES = (1, 20, 33)


class Counting(nn.Module):
    """Three parameters, each in a fragment of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ParameterList(torch.zeros(size) for size in SIZES)


def count_steps(rank: int, settings: Settings, max_steps: int, poisoned: int | None = None) -> Any:
    """Each local step adds exactly 1 to every parameter."""
    module = Counting()
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    worker = Worker(module, [optimizer], job_store(), rank, 3, settings)
    worker.start(max_steps)
    running = True
    seconds = 0.001 if poisoned is None else 0.01  # turns are to take place between the steps before and after it
    while running:
        time.sleep(seconds * (1 + 3 * rank))
        for part in module.parts:
            part.grad = -torch.ones_like(part)
        if rank == 1 and worker.local_steps == poisoned:
            module.parts[2].grad[7] = float("nan")
        optimizer.step()
        running = worker.step()
    return worker.finish(), worker.take_updates(), [part.detach().unique().tolist() for part in module.parts]


def counting(**settings: Any) -> Settings:
    sgd = partial(torch.optim.SGD, lr=1.0)
    return Settings(outer_optimizer=sgd, fragments=3, timeout=timedelta(seconds=20), **settings)


@pytest.mark.parametrize("local_steps", [3, 10])
@pytest.mark.parametrize("overlap", [True, False])
def test_every_local_step_is_applied_once_to_every_fragment(local_steps: int, overlap: bool) -> None:
    settings = counting(local_steps=local_steps, overlap=overlap)
    ends = results(run_processes(count_steps, 3, settings, 60))
    summary, updates, _ = ends[0]
    steps = summary.total_local_steps
    assert sum(update.local_steps for update in updates) == steps
    assert steps == 180
    for _, of_worker, parts in ends:  # with lr 1 and no momentum an outer update adds the delta as it is
        assert of_worker == updates
        assert parts == [[steps]] * 3
    assert len({end[0].digest for end in ends}) == 1
    assert summary.version == len(updates)


def test_synchronous_workers_apply_the_mean_of_each_fragment_once_a_round() -> None:
    settings = counting(local_steps=10, quorum=3, overlap=False, pace="fixed")
    ends = results(run_processes(count_steps, 3, settings, 40))
    for summary, _, parts in ends:
        assert summary.local_steps == (40, 40, 40) and summary.max_staleness == 0
        assert parts == [[40.0]] * 3
        # Four rounds; the pushes of the first one end after 3, 6 and 10 steps, so the run ends with rests of 7 and 4.
        assert summary.version == 4 * 3 + 2


def test_after_a_delta_that_is_not_finite_a_worker_begins_again_with_all_fragments() -> None:
    ends = results(run_processes(count_steps, 3, counting(local_steps=9), 60, 13))
    summary, updates, values = ends[0]
    assert summary.dropped == (0, 1, 0) and len({end[0].digest for end in ends}) == 1
    assert all(parts == values for _, _, parts in ends)
    assert summary.total_local_steps == 180
    # The steps that worker 1 lost: of the fragment that it pushed last before, only those since that push.
    lost = [summary.total_local_steps - value for [value] in values]
    assert 0 < min(lost) == summary.total_local_steps - sum(update.local_steps for update in updates)
    assert min(lost) < max(lost) < summary.local_steps[1]
