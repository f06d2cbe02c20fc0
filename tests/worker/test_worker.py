"""The worker without Lightning, in real processes: its learning, and its errors."""

from __future__ import annotations

import math
import os
import signal
import statistics
import sys
import threading
import time
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from lightning_async_localsgd import PeerLostError, RunSummary, Settings, Worker
from lightning_async_localsgd.exchange.standing import Standing
from lightning_async_localsgd.exchange.transport import GlooTransport
from lightning_async_localsgd.protocol.header import HEADER_BYTES, Header
from lightning_async_localsgd.protocol.pace import DynamicLocalUpdates
from lightning_async_localsgd.protocol.speed_meter import SpeedMeter
from lightning_async_localsgd.worker.round_trip import RoundTrip
from tests import pacing
from tests.modules import SPEEDS, Batches, make_net
from tests.processes import STILL_RUNNING, Outcome, job_store, results, run_processes

QUICK = Settings(local_steps=5, grace_period=0.01, timeout=timedelta(seconds=20))


class Loop:
    """A plain PyTorch training loop around a worker."""

    def __init__(
        self, rank: int, size: int, settings: Settings = QUICK, pause: float = 0.0, module: nn.Module | None = None
    ) -> None:
        self.module = module if module is not None else make_net(seed=rank)
        self.optimizer = torch.optim.AdamW([p for p in self.module.parameters() if p.requires_grad], lr=1e-2)
        self.worker = Worker(self.module, [self.optimizer], job_store(), rank, size, settings)
        self.batches = iter(Batches(100 + rank))
        self.pause = pause

    def train_step(self) -> None:
        x, y = next(self.batches)
        nn.functional.mse_loss(self.module(x), y).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        pacing.step(self.pause)

    def run(self, max_steps: int | None, before_step: Any = None) -> RunSummary:
        self.worker.start(max_steps)
        running = True
        while running:
            if before_step is not None:
                before_step(self)
            self.train_step()
            running = self.worker.step(samples=4)
        return self.worker.finish()


def flat(module: nn.Module) -> list[float]:
    return torch.cat([t.detach().double().flatten() for t in module.state_dict().values()]).tolist()


def errors_of(outcomes: list[Outcome]) -> list[str]:
    return [outcome.error for outcome in outcomes]


# ---- learning --------------------------------------------------------------------------------------------------------


def train(rank: int, size: int, settings: Settings, max_steps: int, pause: float = 0.0) -> Any:
    loop = Loop(rank, size, settings, pause)
    before = flat(loop.module)
    summary = loop.run(max_steps)
    return summary, before, flat(loop.module), loop.worker.local_steps


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("quorum", [1, 2, 3])
@pytest.mark.parametrize("codec", ["fp32", "bf16"])
def test_all_workers_end_with_the_same_bits(overlap: bool, quorum: int, codec: str) -> None:
    settings = Settings(local_steps=10, overlap=overlap, quorum=quorum, codec=codec, timeout=timedelta(seconds=20))
    ends = results(run_processes(train, 3, 3, settings, 40, 0.004))
    summaries = [end[0] for end in ends]
    assert len({summary.digest for summary in summaries}) == 1
    assert ends[0][2] == ends[1][2] == ends[2][2]
    assert ends[0][1] == ends[1][1] == ends[2][1]  # all started from worker 0's parameters
    assert sum(end[3] for end in ends) == summaries[0].total_local_steps == sum(summaries[0].local_steps)
    assert 0 <= summaries[0].total_local_steps - 120 <= 10
    assert sum(summary.bytes_sent for summary in summaries) == sum(summary.bytes_received for summary in summaries)


def spend(rank: int, size: int, max_steps: int) -> int:
    """Train, while turns take this worker's header between the decision on a step and its beginning."""
    may_begin = Standing.may_begin_step

    def late(standing: Standing) -> bool:
        loop.worker._mailbox.announce()
        time.sleep(0.01)  # a turn opens
        return may_begin(standing)

    settings = Settings(local_steps=4, grace_period=0.0, timeout=timedelta(seconds=20))
    loop = Loop(rank, size, settings, 0.01 * rank)
    with pytest.MonkeyPatch.context() as monkey:
        monkey.setattr(Standing, "may_begin_step", late)
        return loop.run(max_steps).total_local_steps


@pytest.mark.parametrize("max_steps", [6, 7, 8, 9])
def test_a_step_that_a_turn_has_not_counted_is_not_made_beyond_the_budget(max_steps: int) -> None:
    assert results(run_processes(spend, 3, 3, max_steps)) == [3 * max_steps] * 3


def count_steps(rank: int, size: int, settings: Settings) -> Any:
    """A module that counts: each local step adds exactly 1 to its parameter."""
    module = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(module.weight)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    worker = Worker(module, [optimizer], job_store(), rank, size, settings)
    worker.start(60)
    running = True
    while running:
        time.sleep(0.001 * (1 + 3 * rank))
        module.weight.grad = -torch.ones(1, 1)
        optimizer.step()
        running = worker.step()
    return worker.finish(), worker.take_updates(), module.weight.item()


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("quorum", [1, 3])
def test_no_local_step_is_lost_or_applied_twice(overlap: bool, quorum: int) -> None:
    # With lr 1 and no momentum an outer update adds the delta (or, with a quorum, the mean of the deltas) as it is.
    settings = Settings(
        local_steps=4,
        outer_optimizer=partial(torch.optim.SGD, lr=1.0),
        overlap=overlap,
        quorum=quorum,
        timeout=timedelta(seconds=20),
    )
    ends = results(run_processes(count_steps, 3, 3, settings))
    summary, updates, _ = ends[0]
    assert sum(u.local_steps for u in updates) == summary.total_local_steps
    batches: dict[int, list[int]] = {}
    for u in updates:
        batches.setdefault(u.version, []).append(u.local_steps)
    expected = sum(statistics.mean(steps) for steps in batches.values())
    if quorum == 1:
        assert expected == summary.total_local_steps
    assert len({end[2] for end in ends}) == 1
    assert ends[0][2] == pytest.approx(expected, rel=1e-5)


def test_synchronous_workers_make_exactly_their_steps_and_one_update_a_round() -> None:
    settings = Settings(local_steps=5, quorum=3, overlap=False, pace="fixed", timeout=timedelta(seconds=20))
    summary = results(run_processes(train, 3, 3, settings, 20))[0][0]
    assert summary.local_steps == (20, 20, 20)
    assert summary.version == 4
    assert summary.max_staleness == 0


def counting_samples(rank: int, size: int) -> Any:
    loop = Loop(rank, size)
    loop.worker.start(20)
    running, steps = True, 0
    while running:
        loop.train_step()
        running = loop.worker.step(samples=(4, 4.0, torch.tensor(4), torch.tensor([4.0]))[steps % 4])
        steps += 1
    refused = []
    for samples in (-1, 3.5, math.nan, math.inf, 1 << 40, "four", None, torch.ones(2)):
        try:
            loop.worker.step(samples=samples)
        except (TypeError, ValueError) as error:
            refused.append("`samples` must be a whole number" in str(error))
    loop.worker.finish()
    updates = loop.worker.take_updates()
    return sum(u.samples for u in updates), sum(u.local_steps for u in updates), refused


def test_samples_are_any_whole_number_and_nothing_else() -> None:
    for samples, steps, refused in results(run_processes(counting_samples, 2, 2)):
        assert samples == 4 * steps > 0
        assert refused == [True] * 8


def own_budget(rank: int, size: int) -> Any:
    settings = Settings(local_steps=5, budget="per_worker", timeout=timedelta(seconds=20))
    return Loop(rank, size, settings, pause=0.01 * rank).run(max_steps=23)


def test_with_a_budget_per_worker_each_makes_its_own_steps() -> None:
    summary = results(run_processes(own_budget, 2, 2))[0]
    assert summary.local_steps == (23, 23)


def stopping(rank: int, size: int) -> Any:
    loop = Loop(rank, size, pause=0.005)
    loop.worker.start(None)
    for _ in range(10_000):
        loop.train_step()
        if not loop.worker.step():
            break
        if rank == 1 and loop.worker.local_steps == 12:
            break
    return loop.worker.finish(stop=rank == 1)


def test_one_worker_can_end_the_run_of_all() -> None:
    summaries = results(run_processes(stopping, 3, 3))
    assert len({summary.digest for summary in summaries}) == 1
    assert summaries[0].local_steps[1] == 12
    assert max(summaries[0].local_steps) < 10_000  # which they would make by themselves


def leaving_early(rank: int, size: int) -> Any:
    loop = Loop(rank, size, pause=0.003)
    loop.worker.start(20)
    running = True
    while running and not (rank == 1 and loop.worker.local_steps == 7):
        loop.train_step()
        running = loop.worker.step()
    return loop.worker.finish()


def test_what_a_worker_leaves_of_the_budget_goes_to_the_others() -> None:
    summary = results(run_processes(leaving_early, 3, 3))[0]
    assert summary.local_steps[1] == 7
    assert abs(summary.total_local_steps - 60) <= 5


class WithBuffers(nn.Module):
    """A frozen head, an attention mask and a counter beside what is trained; all differ between workers at first."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.net = make_net(rank)
        self.head = nn.Linear(1, 1).requires_grad_(False)
        nn.init.constant_(self.head.weight, rank + 1.0)
        self.register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1))
        self.register_buffer("seen", torch.tensor(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        return self.head(self.net(x))


def with_buffers(rank: int, size: int) -> Any:
    loop = Loop(rank, size, pause=0.002 * (1 + rank), module=WithBuffers(rank))
    summary = loop.run(20)
    return summary, flat(loop.module), loop.module.head.weight.item(), loop.module.seen.item()


def test_what_is_not_trained_follows_worker_zero() -> None:
    ends = results(run_processes(with_buffers, 2, 2))
    assert ends[0][1:] == ends[1][1:]
    assert ends[0][2] == 1.0
    assert ends[0][3] == ends[0][0].local_steps[0]
    assert ends[0][0].dropped == (0, 0)


class WithStatistic(nn.Module):
    """A net beside a statistic that falls from 1 to 0.01 within a few steps, as a running variance may."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_net()
        self.register_buffer("variance", torch.tensor(1.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.variance.lerp_(torch.tensor(0.01), 0.5)
        return self.net(x)


def with_statistic(rank: int, size: int, overlap: bool) -> Any:
    settings = Settings(local_steps=8, pace="fixed", overlap=overlap, timeout=timedelta(seconds=20))
    loop = Loop(rank, size, settings, pause=(0.002, 0.04)[rank], module=WithStatistic())
    seen: list[float] = []

    def look(loop: Loop) -> None:
        seen.append(loop.worker.global_tensors()["variance"].item())
        while rank == 1 and loop.worker.local_steps == 4 and loop.worker.summary().version < 2:
            time.sleep(0.001)  # its first delta is to come late, however busy the machine is

    summary = loop.run(40, look)
    return summary, [*seen, loop.module.variance.item()]


@pytest.mark.parametrize("overlap", [True, False])
def test_a_late_delta_pulls_statistics_towards_its_own_and_not_past_them(overlap: bool) -> None:
    ends = results(run_processes(with_statistic, 2, 2, overlap))
    assert ends[0][0].max_staleness > 1
    assert min(min(seen) for _, seen in ends) > 0.009
    assert ends[0][1][-1] == ends[1][1][-1] < 0.6


def unfreezing(rank: int, size: int) -> Any:
    module = WithBuffers(0)

    def unfreeze(loop: Loop) -> None:
        if loop.worker.local_steps == 3:
            module.head.requires_grad_(True)

    return Loop(rank, size, module=module).run(20, unfreeze)


def test_a_parameter_that_is_unfrozen_on_the_way_is_refused() -> None:
    outcomes = run_processes(unfreezing, 2, 2, timeout=60)
    assert [outcome.exitcode for outcome in outcomes] == [1, 1]
    assert any("'head.weight' was frozen" in error for error in errors_of(outcomes))


def unequal(rank: int, size: int) -> Any:
    loop = Loop(rank, size, Settings(local_steps=60, timeout=timedelta(seconds=30)), pause=SPEEDS[rank] / 100)
    updates: list[Any] = []
    job_steps: list[int] = []
    plans: set[Any] = set()

    def watch(loop: Loop) -> None:
        updates.extend(loop.worker.take_updates())
        job_steps.append(loop.worker.job_steps)
        progress = loop.worker._mailbox.progress
        plans.add((progress.speeds, progress.round_steps))

    summary = loop.run(480, watch)
    updates.extend(loop.worker.take_updates())
    return summary, updates, [*job_steps, loop.worker.job_steps], plans


def test_unequal_workers_keep_their_pace_and_spend_the_budget() -> None:
    size, local_steps = len(SPEEDS), 60
    summaries, logs, job_steps, plans = zip(*results(run_processes(unequal, size, size)), strict=True)
    assert len({summary.digest for summary in summaries}) == 1
    assert 0 <= summaries[0].total_local_steps - 480 * size <= local_steps
    assert all(log == logs[0] for log in logs)  # everyone saw the same updates
    assert [u.version for u in logs[0]] == list(range(1, summaries[0].version + 1))
    # Whatever the machine gives each of them, rounds are planned by the speeds that it has measured.
    pace = DynamicLocalUpdates()
    assert all(
        list(steps) == pace.steps(speeds, local_steps) for seen in plans for speeds, steps in seen if any(speeds)
    )
    for worker in range(size):
        rounds = [u.local_steps for u in logs[0] if u.worker == worker]
        shortest = min(steps[worker] for _, steps in plans[worker])
        assert all(steps >= math.floor((1 - pace.tolerance) * shortest) for steps in rounds[:-1])
    assert summaries[0].local_steps[0] > summaries[0].local_steps[-1]
    for counted in job_steps:
        assert list(counted) == sorted(counted)
        assert counted[-1] == 480


class StepClock:
    """A clock that local steps move on by a second, and waits for an exchange by a hundred."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


def timed(rank: int, size: int, settings: Settings) -> list[tuple[int, float]]:
    loop, clock = Loop(rank, size, settings), StepClock()
    vars(sys.modules[RoundTrip.__module__])["time"] = clock
    worker = loop.worker
    worker.start(20)
    wait = worker._mailbox.wait_for_adoption

    def wait_for_adoption() -> Any:
        clock.now += 100
        return wait()

    worker._mailbox.wait_for_adoption = wait_for_adoption  # type: ignore[method-assign]
    running = True
    while running:
        loop.train_step()
        clock.now += 1
        running = worker.step(samples=4)
    worker.finish()
    return [(update.local_steps, update.seconds) for update in worker.take_updates()]


@pytest.mark.parametrize("quorum", [1, 2])
def test_a_round_lasts_as_long_as_its_steps_and_not_as_the_wait_before_it(quorum: int) -> None:
    settings = replace(QUICK, overlap=False, pace="fixed", quorum=quorum)
    updates, _ = results(run_processes(timed, 2, 2, settings))
    assert len(updates) >= 6
    assert all(seconds == steps for steps, seconds in updates)


# ---- errors ----------------------------------------------------------------------------------------------------------


def dying(rank: int, size: int, pause: float) -> Any:
    def die(loop: Loop) -> None:
        if rank == 1 and loop.worker.local_steps == (13 if pause < 0.1 else 6):
            os.kill(os.getpid(), signal.SIGKILL)

    # In long rounds the exchange is asleep when it happens, in short ones probably in the middle of a turn.
    return Loop(rank, size, pause=pause).run(10_000, die)


@pytest.mark.parametrize("pause", [0.002, 0.2])
def test_a_killed_worker_ends_the_others_with_its_name(pause: float) -> None:
    outcomes = run_processes(dying, 3, 3, pause, timeout=40)
    assert outcomes[1].exitcode == -signal.SIGKILL
    for outcome in (outcomes[0], outcomes[2]):
        assert outcome.exitcode == 1
        assert "PeerLostError" in outcome.error and "Worker 1 (host " in outcome.error


def freezing(rank: int, size: int) -> Any:
    def freeze(loop: Loop) -> None:
        if rank == 2 and loop.worker.local_steps == 13:
            os.kill(os.getpid(), signal.SIGSTOP)

    settings = Settings(local_steps=5, timeout=timedelta(seconds=5))
    return Loop(rank, size, settings, pause=0.01).run(10_000, freeze)


def test_a_frozen_worker_is_named_after_the_timeout() -> None:
    outcomes = run_processes(freezing, 3, 3, timeout=40, lost=[2])
    assert outcomes[2].error == STILL_RUNNING
    for outcome in outcomes[:2]:
        assert outcome.exitcode == 1
        assert "Worker 2 (host " in outcome.error and "did not answer within 5 s" in outcome.error


def hanging(rank: int, size: int, quorum: int) -> Any:
    store = job_store()

    def hang(loop: Loop) -> None:
        if rank == 0 and loop.worker.local_steps == 7:
            store.wait(["noticed"], timedelta(seconds=30))

    settings = Settings(local_steps=5, quorum=quorum, timeout=timedelta(seconds=5))  # in which they must connect, too
    try:
        return Loop(rank, size, settings, pause=0.002).run(30, hang)
    except PeerLostError:
        store.set("noticed", "")
        raise


@pytest.mark.parametrize("quorum", [1, 2])
def test_a_worker_whose_training_hangs_is_named_by_those_who_wait_for_it(quorum: int) -> None:
    outcomes = run_processes(hanging, 2, 2, quorum, timeout=40)
    assert [outcome.exitcode for outcome in outcomes] == [1, 1]
    assert "Worker 0" in outcomes[1].error and "has made no step" in outcomes[1].error


def failing(rank: int, size: int) -> Any:
    loop = Loop(rank, size, pause=0.002)

    def fail(loop: Loop) -> None:
        if rank == 0 and loop.worker.local_steps == 13:
            raise ZeroDivisionError("a bug in the user's code")

    try:
        return loop.run(10_000, fail)
    except Exception as error:
        loop.worker.abort(error)
        raise


def test_an_exception_in_one_worker_ends_the_others_with_its_text() -> None:
    outcomes = run_processes(failing, 3, 3, timeout=40)
    assert "ZeroDivisionError" in outcomes[0].error
    for outcome in outcomes[1:]:
        assert "PeerAbortedError" in outcome.error
        assert "Worker 0" in outcome.error and "a bug in the user's code" in outcome.error


def poisoned(rank: int, size: int, quorum: int) -> Any:
    loop = Loop(rank, size, Settings(local_steps=10, quorum=quorum, timeout=timedelta(seconds=20)), pause=0.004)

    def poison(loop: Loop) -> None:
        if rank == 1 and loop.worker.local_steps == 13:
            with torch.no_grad():
                next(loop.module.parameters()).view(-1)[0] = float("nan")

    return loop.run(60, poison), flat(loop.module)


@pytest.mark.parametrize("quorum", [1, 3])
def test_a_non_finite_delta_is_dropped_and_counted_and_training_goes_on(quorum: int) -> None:
    ends = results(run_processes(poisoned, 3, 3, quorum))
    assert len({end[0].digest for end in ends}) == 1
    assert ends[0][0].dropped == (0, 1, 0)
    assert all(torch.isfinite(torch.tensor(end[1])).all() for end in ends)
    assert abs(ends[0][0].total_local_steps - 180) <= 10


def mismatched(rank: int, size: int, what: str) -> Any:
    settings = Settings(local_steps=5 + rank if what == "settings" else 5, timeout=timedelta(seconds=20))
    module = nn.Linear(3, 1 + rank) if what == "model" else nn.Linear(3, 1)
    return Loop(rank, size, settings, module=module)


@pytest.mark.parametrize(("what", "named"), [("settings", "`local_steps` is 5 against 6"), ("model", "`model` is 'w")])
def test_workers_that_were_started_differently_are_all_refused(what: str, named: str) -> None:
    for error in errors_of(run_processes(mismatched, 2, 2, what)):
        assert "WorkerMismatchError" in error and named in error


def diverging(rank: int, size: int) -> Any:
    loop = Loop(rank, size)

    def flip(loop: Loop) -> None:
        if rank == 1 and loop.worker.local_steps == 13:
            with loop.worker._mailbox.global_state():
                loop.worker._state.flat.view(torch.int32)[0] ^= 1 << 12  # beyond what rounding may absorb

    return loop.run(10_000, flip)


def test_a_flipped_bit_in_a_replica_is_noticed() -> None:
    for error in errors_of(run_processes(diverging, 2, 2)):
        assert "ReplicaDivergedError" in error


def talking_nonsense(rank: int, size: int) -> Any:
    if rank == 1:
        gather = GlooTransport.gather

        def talk(self: GlooTransport, data: bytes) -> list[bytes]:
            return gather(self, b"GET / HTTP/1.1\r\n".ljust(len(data)) if len(data) == HEADER_BYTES else data)

        GlooTransport.gather = talk  # type: ignore[method-assign]
    return Loop(rank, size).run(100)


def test_a_malformed_header_names_its_sender() -> None:
    error = errors_of(run_processes(talking_nonsense, 2, 2))[0]
    assert "Worker 1" in error and "not a header" in error


def infinitely_fast(rank: int, size: int) -> Any:
    if rank == 1:  # as a worker of a faulty clock would say
        Header._check = lambda self: None  # type: ignore[method-assign]
        SpeedMeter.speed = lambda self, round_steps: math.inf  # type: ignore[method-assign]
    return Loop(rank, size).run(100)


def test_a_number_outside_its_range_names_its_sender() -> None:
    error = errors_of(run_processes(infinitely_fast, 2, 2))[0]
    assert "Worker 1" in error and "`speed` is inf" in error


# ---- memory and processor time ---------------------------------------------------------------------------------------


def idle(rank: int, size: int) -> Any:
    loop = Loop(rank, size, Settings(local_steps=10_000))
    loop.worker.start(None)
    for _ in range(20):
        loop.train_step()
        loop.worker.step()
    wall, cpu = time.monotonic(), time.process_time()
    threading.Event().wait(3)
    share = (time.process_time() - cpu) / (time.monotonic() - wall)
    loop.worker.finish(stop=True)
    return share


def test_an_idle_exchange_sleeps() -> None:
    assert max(results(run_processes(idle, 2, 2))) < 0.05  # polling at 1 ms costs several times that


def keys_left(rank: int, size: int, max_steps: int) -> Any:
    Loop(rank, size).run(max_steps)
    return job_store().num_keys()


def test_the_store_does_not_grow_with_the_run() -> None:
    short, long = (max(results(run_processes(keys_left, 2, 2, steps))) for steps in (20, 400))
    assert abs(long - short) <= 3
