"""A module's tensors of every kind and precision in a run of real workers."""

from __future__ import annotations

import math
import time
import warnings
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_async_localsgd import RunSummary, Settings, Worker
from lightning_async_localsgd.protocol.progress import OuterUpdate
from tests.modules import FEATURES
from tests.processes import job_store, results, run_processes

PLAIN_SUM = partial(torch.optim.SGD, lr=1.0)  # an outer update adds the delta as it is


class Run:
    """A worker whose steps are given by hand; keeps what it warns of."""

    def __init__(self, rank: int, size: int, module: nn.Module, **settings: Any) -> None:
        self.module = module
        plain = {
            "local_steps": 4,
            "outer_optimizer": PLAIN_SUM,
            "budget": "per_worker",  # each makes its steps, however busy the machine is
            "timeout": timedelta(seconds=20),
        }
        self.updates: list[OuterUpdate] = []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.worker = Worker(module, [], job_store(), rank, size, Settings(**(plain | settings)))
        self.warned = [str(warning.message) for warning in caught]

    def train(self, max_steps: int, step: Any, pause: float = 0.002) -> RunSummary:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.worker.start(max_steps)
            self.worker.measure_updates()
            running = True
            while running:
                with torch.no_grad():
                    step(self)
                time.sleep(pause)
                running = self.worker.step()
            summary = self.worker.finish()
        self.warned += [str(warning.message) for warning in caught]
        self.updates = self.worker.take_updates()
        return summary


# ---- precision -------------------------------------------------------------------------------------------------------


def one_learns(rank: int, size: int, dtype: torch.dtype, overlap: bool) -> Any:
    """Worker 0 moves its parameters by what bf16 and fp16 round; worker 1 learns nothing."""
    torch.manual_seed(rank)
    generator = torch.Generator().manual_seed(1)

    def step(run: Run) -> None:
        for parameter in run.module.parameters():
            if rank == 0:
                parameter.add_(0.003 * torch.randn(parameter.shape, generator=generator))

    off_the_grid = partial(torch.optim.SGD, lr=0.7)  # of what the module can hold
    run = Run(rank, size, nn.Linear(64, 64).to(dtype), overlap=overlap, outer_optimizer=off_the_grid)
    run.train(40, step, 0.002 + 0.001 * rank)
    return [(update.worker, update.norm) for update in run.updates]


@pytest.mark.parametrize("overlap", [True, False])
def test_in_bf16_a_worker_that_learns_nothing_sends_nothing(overlap: bool) -> None:
    for updates in results(run_processes(one_learns, 2, 2, torch.bfloat16, overlap)):
        norms = [[norm for sender, norm in updates if sender == worker] for worker in range(2)]
        assert len(norms[1]) > 1 and max(norms[1]) < 1e-5
        assert max(norms[0]) > 0.1


def tiny_steps(rank: int, size: int) -> Any:
    """Steps of a fraction of what fp32 resolves at 1: 2^-23."""
    module = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(module.weight, 1.0 + 2.0**-40)
    first: list[float] = []

    def step(run: Run) -> None:
        first.append(run.module.weight.item())
        run.module.weight.add_(2.0**-27)

    summary = Run(rank, size, module, overlap=False).train(400, step, 0.0)
    return first[0], module.weight.item(), summary.total_local_steps


def test_float64_parameters_keep_what_fp32_cannot_carry_until_it_adds_up() -> None:
    for first, last, steps in results(run_processes(tiny_steps, 2, 2)):
        assert first == 1.0 + 2.0**-40
        assert last == pytest.approx(1 + steps * 2.0**-27, abs=4 * 2.0**-23)


# ---- non-finite values -----------------------------------------------------------------------------------------------


class Odd(nn.Module):
    """Beside a weight that each step moves by 1: what keeps a delta from being sent, each in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.bias = nn.Parameter(torch.tensor([0.0, -math.inf, 0.0]))
        self.register_buffer("largest", torch.zeros(2))
        self.register_buffer("seconds", torch.zeros(2, dtype=torch.float64))


def odd(rank: int, size: int, overlap: bool) -> Any:
    module = Odd()

    def step(run: Run) -> None:
        module.weight.add_(1)
        module.bias.add_(1)
        module.seconds.fill_(1e200 + rank)
        if rank == 1 and run.worker.local_steps > 5:
            module.largest[1] = math.inf

    run = Run(rank, size, module, overlap=overlap)
    summary = run.train(30, step, 0.003)
    values = {name: tensor.tolist() for name, tensor in module.state_dict().items()}
    return summary.dropped, summary.total_local_steps, values, run.warned


@pytest.mark.parametrize("overlap", [True, False])
def test_what_is_not_finite_is_left_out_and_named_and_the_rest_is_learned(overlap: bool) -> None:
    ends = results(run_processes(odd, 2, 2, overlap))
    for dropped, steps, values, _ in ends:
        assert dropped == (0, 0)
        assert values["weight"] == [steps] * 3
        assert values["bias"] == [steps, -math.inf, steps]
        assert values["largest"] == [0, 0]
        assert values["seconds"] == [1e200] * 2
    for rank, (*_, warned) in enumerate(ends):
        assert sum("'bias' have elements that are not finite" in text for text in warned) == 1
        assert sum("'largest'" in text for text in warned) == rank


def hopeless(rank: int, size: int) -> Any:
    module = nn.Linear(2, 2)

    def step(run: Run) -> None:
        if rank == 1:
            module.bias[0] = math.nan

    run = Run(rank, size, module)
    try:
        return run.train(10_000, step)
    except Exception as error:
        run.worker.abort(error)
        raise


def test_several_drops_in_a_row_end_the_run_with_the_names_of_worker_and_tensor() -> None:
    outcomes = run_processes(hopeless, 2, 2, timeout=60)
    assert [outcome.exitcode for outcome in outcomes] == [1, 1]
    assert "NotFiniteError: Worker 1 (host " in outcomes[1].error and "5 deltas in a row" in outcomes[1].error
    for outcome in outcomes:
        assert "'bias' had NaN" in outcome.error and "Worker 1" in outcome.error


# ---- memory that is shared -------------------------------------------------------------------------------------------


def shared_memory(rank: int, size: int) -> Any:
    module = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    module[1].weight.data = module[0].weight.data
    nn.init.zeros_(module[0].weight)

    def step(run: Run) -> None:
        module[0].weight.add_(1)

    summary = Run(rank, size, module).train(40, step, 0.002 + 0.002 * rank)
    return summary.total_local_steps, module[0].weight.flatten().tolist(), module[1].weight.flatten().tolist()


def test_parameters_that_share_memory_get_each_correction_once() -> None:
    for steps, first, second in results(run_processes(shared_memory, 2, 2)):
        assert first == second == [steps] * 4


# ---- buffers ---------------------------------------------------------------------------------------------------------


class Buffered(nn.Module):
    """With a queue of normalized features, a cache that grows, a phase, a counter, and one that the user names."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.register_buffer("queue", nn.functional.normalize(torch.randn(FEATURES, 16), dim=0))
        self.register_buffer("pointer", torch.tensor(0))
        self.register_buffer("table", torch.zeros(4))
        self.register_buffer("phase", torch.zeros(3, dtype=torch.complex64))
        self.register_buffer("seconds", torch.zeros((), dtype=torch.float64))
        self.register_buffer("prototypes", torch.full((4,), float(rank)))
        self.register_buffer("mean", torch.zeros(2))

    def enqueue(self, features: Tensor) -> None:
        at = int(self.pointer)
        self.queue[:, at : at + 4] = nn.functional.normalize(features, dim=0)
        self.pointer.fill_((at + 4) % 16)


def buffered(rank: int, size: int, overlap: bool) -> Any:
    module = Buffered(rank)
    generator = torch.Generator().manual_seed(rank)
    lengths: list[float] = []
    kept = True

    def step(run: Run) -> None:
        nonlocal kept
        lengths.extend(module.queue.norm(dim=0).tolist())
        kept &= bool((module.prototypes == (rank if run.worker.local_steps else 0)).all())
        module.prototypes.fill_(rank)
        module.enqueue(torch.randn(FEATURES, 4, generator=generator))
        module.weight.add_(1)
        module.phase.add_(1j)
        module.seconds.add_(2.0**-30).clamp_(min=1.0)
        module.mean.fill_(rank)
        if rank == 0 and run.worker.local_steps == 7:  # as in a validation on longer inputs
            run.worker.swap_in_global()
            module.table = torch.ones(6)
            run.worker.swap_in_local()

    run = Run(rank, size, module, overlap=overlap, local_buffers=["proto*"])
    summary = run.train(40, step, 0.003)
    ends = {name: tensor.tolist() for name, tensor in module.state_dict().items()}
    return summary, ends, lengths, kept, run.warned


@pytest.mark.parametrize("overlap", [True, False])
def test_buffers_that_are_no_statistics_stay_whole(overlap: bool) -> None:
    (summary, first, lengths, kept, warned), (_, second, other_lengths, other_kept, _) = results(
        run_processes(buffered, 2, 2, overlap)
    )
    assert min(lengths + other_lengths) > 0.999 and max(lengths + other_lengths) < 1.001
    assert kept and other_kept
    assert [len(first.pop("table")), len(second.pop("table"))] == [6, 4]
    assert any("'table'" in text for text in warned)
    assert first == second  # worker 0's
    steps = summary.local_steps[0]
    assert first["phase"] == [steps * 1j] * 3
    assert first["seconds"] == 1 + (steps - 1) * 2.0**-30
    assert first["prototypes"] == [0] * 4
    assert 0 < first["mean"][0] < 1
    assert first["weight"] == [summary.total_local_steps] * 2
