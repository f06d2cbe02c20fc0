"""Workers that come and go: killed, frozen, added, restarted. No applied step is lost, and none is applied twice.

Each local step adds exactly 1 to the one parameter, and an outer update adds what the workers have added: so the global
parameter is the number of local steps applied.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from lightning_async_localsgd import AsyncLocalSGD
from lightning_async_localsgd.exchange.tcp import TcpTransport
from lightning_async_localsgd.exchange.transport import Channel, Wait
from lightning_async_localsgd.membership.elastic import Lighthouse
from tests.elastic import lighthouse
from tests.processes import Outcome, results, run_processes

pytest.importorskip("torchft")

PLAIN = partial(torch.optim.SGD, lr=1.0)
STEPS = 100
PAUSE = 0.01


class End(NamedTuple):
    """How a worker's run ended."""

    weight: float
    total: int
    own: int
    digest: str
    steps: tuple[int, ...]
    version: int


class Signs:
    """What the processes of a test tell each other past the library."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    def give(self, sign: str, text: str = "") -> None:
        path = self._folder / sign
        path.with_suffix(".new").write_text(text)
        path.with_suffix(".new").rename(path)

    def given(self, sign: str) -> bool:
        return (self._folder / sign).exists()

    def wait(self, sign: str) -> str:
        while not self.given(sign):
            time.sleep(0.01)
        return (self._folder / sign).read_text()


def train(
    at: Lighthouse,
    name: str,
    before_step: Callable[[AsyncLocalSGD, int], object] = lambda job, step: None,
    pause: float = PAUSE,
    **settings: Any,
) -> End:
    """Count, until the run is over."""
    module = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(module.weight)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    given = {"local_steps": 10, "outer_optimizer": PLAIN, "timeout": timedelta(seconds=60)} | settings
    made = 0
    with AsyncLocalSGD(module, optimizer, max_steps=STEPS, lighthouse=at, name=name, **given) as job:
        while job.running:
            before_step(job, made)
            if not job.running:
                break
            time.sleep(pause)
            module.weight.grad = -torch.ones(1, 1)
            optimizer.step()
            made += 1
    assert job.summary is not None
    summary = job.summary
    return End(
        module.weight.item(), summary.total_local_steps, made, summary.digest, summary.local_steps, summary.version
    )


def agree(ends: list[End], total: int) -> None:
    """All have spent the whole budget, and hold what was learned in it."""
    for end in ends:
        assert end.weight == end.total == total, ends
        assert end.digest == ends[0].digest, ends


def run(function: Callable[..., Any], size: int, folder: Path, heartbeat_timeout: float = 8.0) -> list[Outcome]:
    with lighthouse(heartbeat_timeout) as address:
        return run_processes(function, size, address, str(folder), timeout=150)


def staying(rank: int, address: str, folder: str) -> End:
    return train(Lighthouse(address, max_workers=3), f"w{rank}", pause=PAUSE * (1 + rank))


def test_workers_that_stay_spend_the_budget_exactly(tmp_path: Path) -> None:
    ends = results(run(staying, 3, tmp_path))
    agree(ends, 3 * STEPS)
    assert ends[0].own > ends[2].own


def dying(
    rank: int, address: str, folder: str, victim: int, channel: Channel | None, settings: dict[str, Any] | None = None
) -> End:
    receive, struck = TcpTransport.receive, []

    def die(job: AsyncLocalSGD, step: int) -> None:
        if rank == victim and step == 35:
            struck.append(step)
            if channel is None:
                os.kill(os.getpid(), signal.SIGKILL)

    def die_in_turn(self: TcpTransport, wire: Tensor, peer: int, of: Channel) -> Wait:
        if struck and of is channel:
            os.kill(os.getpid(), signal.SIGKILL)
        return receive(self, wire, peer, of)

    TcpTransport.receive = die_in_turn  # type: ignore[method-assign]
    return train(Lighthouse(address, max_workers=3), f"w{rank}", die, **settings or {})


@pytest.mark.parametrize("channel", [None, Channel.HEADER, Channel.BROADCAST])
@pytest.mark.parametrize("victim", [0, 1])
def test_the_others_go_on_when_one_is_killed(tmp_path: Path, victim: int, channel: Channel | None) -> None:
    outcomes = run(partial(dying, victim=victim, channel=channel), 3, tmp_path)
    assert outcomes.pop(victim).error == "killed"
    agree(results(outcomes), 3 * STEPS)


def frozen(rank: int, address: str, folder: str) -> End:
    signs = Signs(folder)
    signs.give(f"pid{rank}", str(os.getpid()))

    def freeze(job: AsyncLocalSGD, step: int) -> None:
        present = job.worker.present  # type: ignore[attr-defined]
        if rank == 0 and step == 20:
            os.kill(int(signs.wait("pid1")), signal.SIGSTOP)
        if rank == 0 and step > 20 and not present[1] and not signs.given("gone"):
            signs.give("gone")
            os.kill(int(signs.wait("pid1")), signal.SIGCONT)

    return train(Lighthouse(address, max_workers=3), f"w{rank}", freeze, pause=5 * PAUSE)


def test_one_that_was_frozen_is_missed_and_comes_back_with_what_it_had_learned(tmp_path: Path) -> None:
    ends = results(run(frozen, 3, tmp_path, heartbeat_timeout=3.0))
    agree(ends, 3 * STEPS)
    assert (tmp_path / "gone").exists()
    assert sum(end.own for end in ends) == 3 * STEPS


def joining(rank: int, address: str, folder: str) -> End:
    signs = Signs(folder)
    if rank == 2:
        signs.wait("begun")

    def tell(job: AsyncLocalSGD, step: int) -> None:
        if rank == 0 and step == 20:
            signs.give("begun")

    return train(Lighthouse(address), f"w{rank}", tell, pause=2 * PAUSE)


def test_whoever_comes_takes_part_in_the_same_budget(tmp_path: Path) -> None:
    ends = results(run(joining, 3, tmp_path))
    agree(ends, 2 * STEPS)
    assert ends[2].own > 0 and sum(end.own for end in ends) == 2 * STEPS


def leaving(rank: int, address: str, folder: str) -> End:
    def leave(job: AsyncLocalSGD, step: int) -> None:
        if rank == 1 and step == 33:
            job.leave()

    return train(Lighthouse(address, max_workers=3), f"w{rank}", leave)


def test_what_a_worker_that_leaves_has_learned_stays(tmp_path: Path) -> None:
    first, gone, last = results(run(leaving, 3, tmp_path))
    agree([first, last], 3 * STEPS)
    assert gone.own == 33 and first.steps[1] == 33
    assert first.own + last.own == 3 * STEPS - 33


def restarted(rank: int, address: str, folder: str) -> End:
    signs = Signs(folder)
    if rank == 3:
        signs.wait("dies")
        return train(Lighthouse(address, max_workers=3), "w1")

    def die(job: AsyncLocalSGD, step: int) -> None:
        if rank == 1 and step == 25:
            signs.give("dies")
            os.kill(os.getpid(), signal.SIGKILL)

    return train(Lighthouse(address, max_workers=3), f"w{rank}", die, pause=2 * PAUSE)


def test_a_worker_that_is_started_again_comes_back_under_its_name(tmp_path: Path) -> None:
    outcomes = run(restarted, 4, tmp_path)
    assert outcomes.pop(1).error == "killed"
    ends = results(outcomes)
    assert len({end.digest for end in ends}) == 1
    for end in ends:
        assert end.weight == 3 * STEPS
        assert len(end.steps) == 3


@pytest.mark.parametrize(
    ("victim", "channel"),
    # The one slice of this small model is the second worker's.
    [(2, None), (1, Channel.DELTA), (0, Channel.SUM)],
)
def test_survivors_agree_on_momentum_and_codec(tmp_path: Path, victim: int, channel: Channel | None) -> None:
    settings = {"outer_optimizer": None, "codec": "int4"}
    outcomes = run(partial(dying, victim=victim, channel=channel, settings=settings), 3, tmp_path)
    assert outcomes.pop(victim).error == "killed"
    first, last = results(outcomes)
    assert first.digest == last.digest and first.weight == last.weight
    assert first.total == last.total == 3 * STEPS


def without_lighthouse(rank: int, address: str, folder: str) -> End:
    signs = Signs(folder)

    def go_on(job: AsyncLocalSGD, step: int) -> None:
        if rank == 0 and step == 20:
            signs.give("end")
        if rank == 1 and signs.given("another"):
            os.kill(os.getpid(), signal.SIGKILL)

    return train(Lighthouse(address, max_workers=3), f"w{rank}", go_on, pause=5 * PAUSE)


def test_without_a_lighthouse_those_who_are_there_go_on_and_with_another_one_as_before(tmp_path: Path) -> None:
    signs, steps_without = Signs(str(tmp_path)), 2 * 5 * PAUSE * 20

    def serve(address: Future[str]) -> None:
        with lighthouse() as first:
            address.set_result(first)
            signs.wait("end")
        time.sleep(steps_without)
        with lighthouse(port=int(first.rpartition(":")[2])):
            signs.give("another")
            signs.wait("over")

    address: Future[str] = Future()
    thread = threading.Thread(target=serve, args=(address,))
    thread.start()
    outcomes = run_processes(without_lighthouse, 3, address.result(), str(tmp_path), timeout=150)
    signs.give("end")
    signs.give("over")
    thread.join()
    assert outcomes.pop(1).error == "killed"
    agree(results(outcomes), 3 * STEPS)


def flipped(rank: int, address: str, folder: str) -> End:
    def flip(job: AsyncLocalSGD, step: int) -> None:
        if rank == 0 and step == 30:
            with job.worker._mailbox.global_state():
                state = job.worker._state
                state.flat.add_(1)
                state._checksums.clear()

    return train(Lighthouse(address, max_workers=3), f"w{rank}", flip, pause=2 * PAUSE)


@pytest.mark.filterwarnings("ignore:.*held other global parameters.*")
def test_one_that_holds_something_else_takes_over_what_the_others_hold(tmp_path: Path) -> None:
    agree(results(run(flipped, 3, tmp_path)), 3 * STEPS)


def saving(rank: int, address: str, folder: str) -> End:
    """The leader asks for a checkpoint, and another worker dies in the turn that carries the message."""
    signs, receive, asked = Signs(folder), TcpTransport.receive, []

    def die_in_turn(self: TcpTransport, wire: Tensor, peer: int, channel: Channel) -> Wait:
        if rank == 2 and signs.given("asked"):
            os.kill(os.getpid(), signal.SIGKILL)
        return receive(self, wire, peer, channel)

    def ask(job: AsyncLocalSGD, step: int) -> None:
        if job.leads and step >= 30 and not asked:
            asked.append(step)
            signs.give("asked")
            job.checkpoint("saved")

    def save(name: str, state: dict[str, Any]) -> None:
        signs.give(f"{name}{rank}", str(state["global"]["global"]["version"]))

    TcpTransport.receive = die_in_turn  # type: ignore[method-assign]
    return train(Lighthouse(address, max_workers=3), f"w{rank}", ask, on_checkpoint=save)


def test_a_checkpoint_is_saved_by_those_who_are_there_whoever_dies_meanwhile(tmp_path: Path) -> None:
    outcomes = run(saving, 3, tmp_path)
    assert outcomes.pop(2).error == "killed"
    agree(results(outcomes), 3 * STEPS)
    assert (tmp_path / "saved0").read_text() == (tmp_path / "saved1").read_text()


def other_token(rank: int, address: str, folder: str) -> End:
    return train(Lighthouse(address, token=f"secret {rank // 2}"), f"w{rank}")


@pytest.mark.filterwarnings("ignore:.*ask the same Lighthouse.*")
def test_a_process_with_another_token_changes_nothing(tmp_path: Path) -> None:
    *ends, other = results(run(other_token, 3, tmp_path))
    agree(ends, 2 * STEPS)
    agree([other], STEPS)


def other_model(rank: int, address: str, folder: str) -> Any:
    signs = Signs(folder)
    if rank == 2:
        signs.wait("begun")
        return train(Lighthouse(address), f"w{rank}", grace_period=0.1)

    def tell(job: AsyncLocalSGD, step: int) -> None:
        if rank == 0 and step == 10:
            signs.give("begun")

    return train(Lighthouse(address), f"w{rank}", tell, pause=2 * PAUSE)


def test_who_was_started_differently_is_refused_and_the_others_go_on(tmp_path: Path) -> None:
    *outcomes, refused = run(other_model, 3, tmp_path)
    assert "WorkerMismatchError" in refused.error and "started differently" in refused.error
    agree(results(outcomes), 2 * STEPS)
