"""H, as given or chosen: as few steps as are cheap."""

from __future__ import annotations

from datetime import timedelta

import pytest
from torch.distributed import PrefixStore
from torch.utils.data import DataLoader

from lightning_async_localsgd import RunSummary, Settings, make_method
from lightning_async_localsgd.protocol.messages import SaveNamed
from lightning_async_localsgd.protocol.round_length import RoundLength
from lightning_async_localsgd.simulation import Network, simulate
from lightning_async_localsgd.worker.worker import Worker
from tests.modules import Regression, make_net, regression_data
from tests.processes import job_store, results, run_processes
from tests.worker.test_worker import Loop


@pytest.mark.parametrize(("max_steps", "expected"), [(20, 1), (400, 10), (2000, 50), (100_000, 50), (None, 5)])
def test_before_anything_is_measured_it_goes_by_the_length_of_the_run(max_steps: int | None, expected: int) -> None:
    assert RoundLength("auto", max_steps).first() == expected


def test_a_number_stays_a_number() -> None:
    length = RoundLength(7, 10_000)
    assert length.first() == length.next(7, 500, [100.0], [10.0], [10.0]) == 7


@pytest.mark.parametrize(
    ("seconds", "cost", "expected"),
    [
        (0.0, 0.0, 50),
        (1.0, 0.0, 50),  # two are 40 steps of the fastest, which it makes anyway
        (2.0, 0.0, 80),
        (0.1, 0.06, 60),  # the faster worker's processor: 60 steps in 3 s, of which 0.06 are 2%
        (0.1, 0.5, 100),  # it would be 500, but learning comes first
        (1e9, 0.0, 1000),
    ],
)
def test_an_exchange_fits_in_and_costs_little(seconds: float, cost: float, expected: int) -> None:
    length = RoundLength("auto", 10_000)
    assert length.next(50, 0, [10.0, 20.0], [0.0, seconds], [cost / 4, cost]) == expected


def test_it_does_not_follow_each_measurement() -> None:
    length = RoundLength("auto", 10_000)
    assert length.next(100, 0, [10.0], [4.0], [0.0]) == 100  # 80 would do
    assert length.next(160, 0, [10.0], [4.0], [0.0]) == 80  # half as many are worth a change


def test_without_an_end_rounds_grow_with_the_steps_made() -> None:
    length = RoundLength("auto", None)
    now = length.first()
    made, rounds = 0, [now]
    while made < 3000:
        made += now
        now = length.next(now, made, [1.0], [0.0], [0.0])
        rounds.append(now)
    assert rounds == sorted(rounds) and rounds[:20] == [5] * 20 and rounds[-1] == 50
    assert sum(rounds[:60]) <= 1000  # short rounds first


def loader() -> DataLoader[object]:
    return DataLoader(regression_data(64), batch_size=4, shuffle=True)


def test_a_simulated_run_has_forty_rounds_and_longer_ones_over_a_slow_link() -> None:
    fast = simulate(Regression(), loader(), [2.0, 2.0], 200)
    slow = simulate(Regression(), loader(), [2.0, 2.0], 200, network=Network(latency=4.0))
    assert fast.version == 2 * 40
    assert {r.local_steps for r in fast.rounds} == {5}
    assert max(r.local_steps for r in slow.rounds) >= 16  # the exchange takes some 8 s, of which there are two


@pytest.mark.parametrize("max_steps", [120, None])
@pytest.mark.parametrize("method", ["dn-growing", "sync"])
def test_real_workers_agree_on_it(method: str, max_steps: int | None) -> None:
    settings = Settings(**make_method(method, 3), timeout=timedelta(seconds=20))
    assert settings.local_steps == "auto"
    ends = results(run_processes(choosing, 3, 3, settings, max_steps))
    assert len({summary.digest for summary, _ in ends}) == 1
    assert len({summary.round_length for summary, _ in ends}) == 1
    assert ends[0][0].round_length >= (3 if max_steps == 120 else 5)  # the best for learning, or cheaper ones
    if method == "sync" and max_steps is not None:
        assert len(set(ends[0][0].local_steps)) == 1  # all make the same rounds, whenever they hear of another length


def choosing(rank: int, size: int, settings: Settings, max_steps: int | None) -> tuple[RunSummary, list[int]]:
    loop = Loop(rank, size, settings, pause=0.002 * (1 + rank))
    loop.worker.start(max_steps)
    running = True
    while running and (max_steps is not None or loop.worker.job_steps < 120):
        loop.train_step()
        running = loop.worker.step(samples=4)
    summary = loop.worker.finish(stop=max_steps is None)
    return summary, [update.local_steps for update in loop.worker.take_updates()]


def resuming(rank: int, size: int, then: int | str, now: int | str) -> int:
    before = Loop(rank, size, Settings(local_steps=then))
    before.worker.start(4000)
    before.train_step()
    before.worker.step()
    with before.worker.cut(SaveNamed("", 0)):
        state = before.worker.saved_state.global_state_dict()
    before.worker.finish(stop=True)
    settings = Settings(local_steps=now)
    again = Worker(make_net(), [], PrefixStore("again", job_store()), rank, size, settings)
    again.saved_state.load_global_state_dict(state, same_workers=True)
    again.start(200)
    length = again.summary().round_length
    again.finish(stop=True)
    return length


@pytest.mark.parametrize(("then", "now", "expected"), [("auto", "auto", 50), (30, "auto", 30), ("auto", 20, 20)])
def test_a_resumed_run_goes_on_with_the_length_it_had(then: int | str, now: int | str, expected: int) -> None:
    assert results(run_processes(resuming, 1, 1, then, now)) == [expected]
