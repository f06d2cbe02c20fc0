"""A plain PyTorch loop as a worker, in real processes."""

from __future__ import annotations

import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_async_localsgd import AsyncLocalSGD, Settings
from lightning_async_localsgd.outer import AsyncBuffer, DelayCompensation
from tests import pacing
from tests.modules import Batches, make_net
from tests.processes import job_store, results, run_processes

TIMEOUT = timedelta(seconds=30)


def flat(module: nn.Module) -> list[float]:
    return nn.utils.parameters_to_vector(module.parameters()).tolist()


def train(job: AsyncLocalSGD, module: nn.Module, optimizer: torch.optim.Optimizer, pause: float = 0.0) -> None:
    batches = iter(Batches(100 + job.rank))
    while job.running:
        x, y = next(batches)
        nn.functional.mse_loss(module(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        pacing.step(pause)


def parts(rank: int, **kwargs: Any) -> tuple[nn.Module, torch.optim.Optimizer, AsyncLocalSGD]:
    module = make_net(seed=rank)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    return module, optimizer, AsyncLocalSGD(module, optimizer, **({"timeout": TIMEOUT, "local_steps": 5} | kwargs))


# ---- the run ---------------------------------------------------------------------------------------------------------


def plain_loop(rank: int) -> Any:
    module, optimizer, job = parts(rank, max_steps=40, samples=4)
    with job:
        started = flat(module)
        train(job, module, optimizer, 0.002 * (1 + 2 * rank))
    assert not job.running
    optimizer.step()  # after the job it is an ordinary optimizer again
    ended = job.summary
    with job:  # a second run of the same job
        train(job, module, optimizer)
    return started, flat(module), ended, job.summary


def test_steps_of_the_optimizer_are_local_steps_and_all_workers_end_alike() -> None:
    ends = results(run_processes(plain_loop, 2))
    for started, parameters, first, second in ends:
        assert started == flat(make_net(seed=0))  # worker 0's
        assert parameters == ends[0][1] != started
        assert abs(first.total_local_steps - 80) <= 2 * 5  # the budget is shared: a round of each worker more or less
        assert first.digest == ends[0][2].digest != second.digest == ends[0][3].digest
        assert abs(second.total_local_steps - 80) <= 2 * 5


def two_optimizers(rank: int) -> Any:
    generator, discriminator = make_net(0), make_net(1)
    module = nn.ModuleList([generator, discriminator])
    first = torch.optim.SGD(discriminator.parameters(), lr=1e-3)
    last = torch.optim.SGD(generator.parameters(), lr=1e-3)
    turns = 0
    plan = {"local_steps": 5, "budget": "per_worker", "timeout": TIMEOUT}
    with AsyncLocalSGD(module, first, last, max_steps=20, **plan) as job:
        while job.running:
            for optimizer, net in ((first, discriminator), (first, discriminator), (last, generator)):
                net(torch.ones(2, 8)).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
            turns += 1
    return turns, job.summary, flat(module)


def test_with_several_optimizers_a_turn_is_counted_once_when_the_last_one_steps() -> None:
    ends = results(run_processes(two_optimizers, 2))
    assert [turns for turns, _, _ in ends] == [20, 20]
    assert ends[0][1].local_steps == (20, 20)
    assert ends[0][2] == ends[1][2] != flat(nn.ModuleList([make_net(0), make_net(1)]))


def stopping(rank: int) -> Any:
    _, optimizer, job = parts(rank)
    with job:
        while job.running:
            optimizer.step()
            time.sleep(0.002)
            if rank == 1 and job.worker.local_steps == 30:
                job.stop()
    return job.summary


def test_stop_ends_the_training_of_all_workers() -> None:
    first, second = results(run_processes(stopping, 2))
    assert second.local_steps[1] == 30 and first.digest == second.digest


def failing(rank: int) -> None:
    _, optimizer, job = parts(rank)
    with job:
        while job.running:
            optimizer.step()
            time.sleep(0.002)
            if rank == 1 and job.worker.local_steps == 20:
                raise ArithmeticError("a bad batch")


def test_an_error_in_the_loop_ends_the_others_with_its_name() -> None:
    other, own = run_processes(failing, 2)
    assert "ArithmeticError: a bad batch" in own.error
    assert "PeerAbortedError" in other.error and "Worker 1" in other.error and "a bad batch" in other.error


def overrun(rank: int) -> None:
    _, optimizer, job = parts(rank, max_steps=10, budget="per_worker")
    with job:
        for _ in range(11):
            optimizer.step()


def test_a_step_after_the_end_is_an_error_that_says_what_to_look_at() -> None:
    assert all("`job.running`" in outcome.error for outcome in run_processes(overrun, 2))


# ---- validation and checkpoints --------------------------------------------------------------------------------------


def validating(rank: int) -> Any:
    # Longer than the run, so that the global parameters stay what they were at the start.
    module, optimizer, job = parts(rank, max_steps=30, budget="per_worker", local_steps=1000, pace="fixed")
    batches, seen, store = iter(Batches(rank)), [], job_store()
    with job:
        while job.running:
            x, y = next(batches)
            nn.functional.mse_loss(module(x), y).backward()
            if rank == 1:
                store.wait(["validated"])  # else its last round moves them, if worker 0 is late
            optimizer.step()
            if rank == 0 and job.worker.local_steps == 20:
                seen.append(flat(module))
                with job.global_parameters():
                    seen.append(flat(module))
                seen.append(flat(module))
                store.set("validated", "")
    return seen


def test_the_module_can_hold_the_global_parameters_for_a_while() -> None:
    (own, of_all, own_again), _ = results(run_processes(validating, 2))
    assert of_all == flat(make_net(seed=0)) != own == own_again


SETTINGS: list[dict[str, Any]] = [{}, {"transforms": (DelayCompensation(10.0), AsyncBuffer(3))}, {"fragments": 3}]


def save(folder: str, rank: int, name: str, state: dict[str, Any]) -> None:
    torch.save(state, f"{folder}/{name}-{rank}.pt")


def interrupted(rank: int, folder: str, max_steps: int, settings: dict[str, Any], slow: int = -1) -> Any:
    """Writes a checkpoint at worker 0's step 20; the worker ``slow`` is in its first step until it hears of that.

    Without a slow worker, worker 0 is in its step 20 until it hears of a step of worker 1.
    """
    module, optimizer, job = parts(rank, max_steps=max_steps, on_checkpoint=partial(save, folder, rank), **settings)
    batches = iter(Batches(100 + rank))
    with job:
        while job.running:
            x, y = next(batches)
            while rank == slow and job.worker.summary().local_steps[0] < 20:
                time.sleep(0.001)
            while (rank, slow, job.worker.local_steps) == (0, -1, 19) and job.worker.summary().local_steps[1] == 0:
                time.sleep(0.001)
            nn.functional.mse_loss(module(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            time.sleep(0.002)
            if rank == 0 and job.worker.local_steps == 20:
                job.checkpoint("middle")
    return job.summary


def resumed(rank: int, folder: str, from_rank: int, max_steps: int, settings: dict[str, Any]) -> Any:
    module, optimizer, job = parts(rank, max_steps=max_steps, **settings)
    state = torch.load(f"{folder}/middle-{from_rank if from_rank >= 0 else rank}.pt", weights_only=True)
    job.load_state_dict(state)
    with job:
        version, own_steps, job_steps = job.worker.version, job.worker.local_steps, job.job_steps
        assert optimizer.state_dict()["state"][0]["step"] == state["worker"]["local_steps"] > 0
        train(job, module, optimizer)
    return version, own_steps, job_steps, job.summary


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_checkpoint_is_one_moment_of_all_workers_and_the_run_goes_on_from_it(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    results(run_processes(interrupted, 2, str(tmp_path), 40, settings))
    states = [torch.load(tmp_path / f"middle-{rank}.pt", weights_only=True) for rank in range(2)]
    first, second = (state["global"] for state in states)
    assert first["progress"] == second["progress"] and first["global"]["version"] == second["global"]["version"]
    assert all(torch.equal(t, second["global"]["tensors"][n]) for n, t in first["global"]["tensors"].items())
    assert states[0]["worker"]["local_steps"] == 20
    digests = set()
    for state in (first, second):
        plan = Settings(**settings)
        replica = plan.global_model(plan.layout(make_net()), workers=2)
        replica.load_state_dict(state["global"])
        digests.add(replica.digest())
    assert len(digests) == 1

    ends = results(run_processes(resumed, 2, str(tmp_path), -1, 60, settings))
    for rank, (version, own_steps, _, summary) in enumerate(ends):
        assert version == first["global"]["version"]
        assert own_steps == states[rank]["worker"]["local_steps"]
        assert abs(summary.total_local_steps - 120) <= 2 * 5 and summary.digest == ends[0][3].digest


def test_a_round_that_a_checkpoint_cuts_stays_as_stale_as_it_was(tmp_path: Path) -> None:
    settings = {"pace": "fixed", "grace_period": 0.0}
    results(run_processes(interrupted, 2, str(tmp_path), 30, settings, 1))  # worker 1 is in its first round
    states = [torch.load(tmp_path / f"middle-{rank}.pt", weights_only=True) for rank in range(2)]
    stale = states[1]["global"]["global"]["version"] - states[1]["worker"]["start_versions"][0]
    assert stale > 0 and states[1]["global"]["progress"]["max_staleness"] < stale
    ends = results(run_processes(resumed, 2, str(tmp_path), -1, 40, settings))
    assert ends[0][3].max_staleness >= stale


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_checkpoint_can_be_gone_on_from_with_another_number_of_workers(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    results(run_processes(interrupted, 2, str(tmp_path), 40, settings))
    made = torch.load(tmp_path / "middle-0.pt", weights_only=True)["job_steps"]
    ends = results(run_processes(resumed, 3, str(tmp_path), 0, 60, settings))
    for _, own_steps, job_steps, summary in ends:
        assert own_steps == 0 and job_steps == made
        assert abs(summary.total_local_steps - 3 * (60 - made)) <= 3 * 5 and summary.digest == ends[0][3].digest


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_impossible_arguments_are_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    module, stranger = make_net(), make_net()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match="torchrun"):
        AsyncLocalSGD(module, optimizer)
    with pytest.raises(RuntimeError, match="MASTER_ADDR"), AsyncLocalSGD(module, optimizer, rank=0, size=1):
        pass
    with pytest.raises(TypeError, match="optimizers"):
        AsyncLocalSGD(module, rank=0, size=1)
    with pytest.raises(ValueError, match="ModuleList"):
        AsyncLocalSGD(module, torch.optim.SGD(stranger.parameters(), lr=0.1), rank=0, size=1)
    with pytest.raises(ValueError, match="max_steps"):
        AsyncLocalSGD(module, optimizer, rank=0, size=1, max_steps=0)
    with pytest.raises(ValueError, match="local_steps"):
        AsyncLocalSGD(module, optimizer, rank=0, size=1, local_steps=0)
    with pytest.raises(RuntimeError, match="`with`"):
        _ = AsyncLocalSGD(module, optimizer, rank=0, size=1).worker
