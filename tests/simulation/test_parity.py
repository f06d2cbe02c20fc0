"""The simulation against four real processes: with the same schedule of events, the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from itertools import count, groupby, islice
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from lightning_async_localsgd import AsyncLocalSGDStrategy, Settings, Worker, make_method
from lightning_async_localsgd.data.division import Shards
from lightning_async_localsgd.data.loader import WorkerLoader
from lightning_async_localsgd.outer import Arrival, DelayCompensation, Poly
from lightning_async_localsgd.protocol.header import Flag, Header
from lightning_async_localsgd.protocol.ledger import DueDelta, Group
from lightning_async_localsgd.protocol.progress import Progress
from lightning_async_localsgd.simulation import Simulation, simulate
from tests import pacing
from tests.modules import FEATURES, make_trainer, regression_data
from tests.processes import job_store, results, run_processes

SIZE = 4
STEPS = 40


@pytest.fixture(autouse=True)
def as_many_threads_as_the_processes() -> Iterator[None]:
    """How a sum is split over threads decides how it is rounded."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Net(L.LightningModule):
    """A net with BatchNorm, AdamW and a schedule by steps."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(FEATURES, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 1))

    def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step / 20))
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def make_loader() -> DataLoader[Any]:
    return DataLoader(regression_data(128), batch_size=4, shuffle=True)


# ---- any schedule: recorded from real workers, replayed on the simulation's replicas ---------------------------------


@dataclass
class Recording:
    """What one real worker did, in its order: steps (with shard and steps of the job), pushes and adoptions."""

    events: list[tuple[Any, ...]]
    updates: list[Any]
    digest: str


class RecordedWorker(Worker):
    """A worker that writes down what it does."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.events: list[tuple[Any, ...]] = []
        super().__init__(*args, **kwargs)

    def start(self, *args: Any, **kwargs: Any) -> None:
        super().start(*args, **kwargs)
        end_round = self._rounds.end_round

        def recorded(progress: Any, seconds: float, fragment: int, *args: Any) -> Any:
            extended = [event for event in self.events if event[:2] == ("push", self.round)]
            if extended:  # the round was extended: it ends here instead
                self.events.remove(extended[0])
            self.events.append(("push", self.round, fragment))
            return end_round(progress, seconds, fragment, *args)

        self._rounds.end_round = recorded  # type: ignore[method-assign]

    def _adopted(self, adoption: Any) -> None:
        self.events.append(("adopt", self.version))


def record(rank: int, settings: Settings) -> Recording:
    module = Net()
    [optimizer], [schedule] = module.configure_optimizers()
    worker = RecordedWorker(module, [optimizer], job_store(), rank, SIZE, settings)
    sampler = DistributedSampler(regression_data(128), num_replicas=1, rank=0, shuffle=True, seed=0)
    loader = DataLoader(regression_data(128), batch_size=4, sampler=sampler)
    own = WorkerLoader(loader, Shards(rank, SIZE, lambda: worker.shard), seed=0, fetches=lambda: (0, 0))
    worker.start(STEPS)
    scheduled, running = 0, True
    for batch in passes(own):
        worker.events.append(("step", worker.shard, scheduled))
        pacing.step(0.001 * (1 + rank))  # unequal, so that rounds end in the middle of others
        optimizer.zero_grad()
        module.training_step(batch).backward()
        optimizer.step()
        running = worker.step(samples=len(batch[0]))
        job_steps = worker.job_steps  # read once: it goes on while the exchange does
        for _ in range(scheduled, job_steps):
            schedule["scheduler"].step()
        scheduled = job_steps
        if not running:
            break
    summary = worker.finish()
    return Recording(worker.events, worker.take_updates(), summary.digest)


def passes(loader: WorkerLoader) -> Iterator[Any]:
    for number in count():
        loader.sampler.set_epoch(number)
        yield from loader


class Replay:
    """A recorded schedule in the place of the timeline."""

    recordings: list[Recording]

    def __init__(
        self, workers: Any, max_steps: int, settings: Settings, state: Any, replicas: Any, *_: Any, **__: Any
    ) -> None:
        self.now, self.over, self.local_steps = 0.0, False, 0
        self.lanes: list[Any] = []
        self.exchange = SimpleNamespace(bytes_sent=[], bytes_received=[])
        self.progress = Progress.at_start(SIZE, settings.local_steps)
        self._state, self._replicas = state, replicas
        [self._codec] = settings.codecs().values()
        state.set_round_length(settings.local_steps)

    def run(self) -> None:
        scripts = [iter(recording.events) for recording in self.recordings]
        adopted = self._adopted_versions()
        for worker in range(SIZE):
            self._replicas.join(worker)
        for _, turn in groupby(self.recordings[0].updates, key=lambda u: adopted[u.worker, u.round]):
            updates = list(turn)
            fragments = [
                self._advance(update.worker, scripts[update.worker], until=("push", update.round)) for update in updates
            ]
            groups = []
            for fragment, of_fragment in groupby(zip(fragments, updates, strict=True), key=lambda pair: pair[0]):
                groups += self._groups(fragment, [Arrival(u.worker, u.staleness) for _, u in of_fragment])
            for group in self._replicas.trade(groups, self._codec):
                accepted = [delta.arrival for delta in group.deltas if delta.accepted]
                state = self._state.fragments[group.fragment]
                state.apply(accepted, refused=len(group.deltas) - len(accepted))
            self._replicas.publish([u.worker for u in updates])
        self.over = True

    def _groups(self, fragment: int, arrivals: list[Arrival]) -> list[Group]:
        """The deltas of a turn by update: the refused ones, of which nothing moves, each for itself."""
        state = self._state.fragments[fragment]
        deltas = [DueDelta(Header(a.worker, 0, flags=Flag.DELTA), a, state.accepts(a)) for a in arrivals]
        accepted = iter([delta for delta in deltas if delta.accepted])
        sizes = state.update_sizes(sum(delta.accepted for delta in deltas))
        refused = [[delta] for delta in deltas if not delta.accepted]
        return [Group(fragment, group) for group in refused + [list(islice(accepted, size)) for size in sizes]]

    def _adopted_versions(self) -> dict[tuple[int, int], int]:
        """The version that each worker adopted after each of its rounds: alike for all deltas of a turn."""
        versions: dict[tuple[int, int], int] = {}
        for worker, recording in enumerate(self.recordings):
            pushes = [event[1] for event in recording.events if event[0] == "push"]
            adoptions = [event[1] for event in recording.events if event[0] == "adopt"]
            versions.update({(worker, r): v for r, v in zip(pushes, adoptions, strict=True)})
        return versions

    def _advance(self, worker: int, script: Iterator[tuple[Any, ...]], until: tuple[str, int]) -> int:
        """Let a worker do what it did until then; returns the fragment that it pushed."""
        for event in script:
            if event[0] == "step":
                rounds = SimpleNamespace(shard=event[1], job_steps=lambda _, steps=event[2]: steps)
                self._replicas.step(worker, rounds, self.progress)
            elif event[0] == "adopt":
                self._replicas.adopt(worker, restart=False)
            else:
                self._replicas.push(worker, event[2])
            if event[:2] == until:
                return int(event[2])
        raise AssertionError(until)


@pytest.mark.parametrize(
    "settings",
    [
        {"overlap": True},
        {"overlap": False},
        {"overlap": True, "codec": "bf16"},
        {"overlap": True, "codec": "int4"},
        {"overlap": True, "codec": "topk"},
        {"overlap": True, "exchange": "gather"},
        {"overlap": True, "quorum": 2},
        {"overlap": True} | make_method("delay-compensation", SIZE, strength=10.0),
        {"overlap": True, "quorum": 2, "transforms": (DelayCompensation(10.0), Poly())},
        {"overlap": True} | make_method("polythres", SIZE, threshold=1),
        {"overlap": False} | make_method("async-buffer", SIZE),
        {"overlap": True} | make_method("sparseloco", SIZE, density=0.01),
        {"overlap": True, "fragments": 3},
        {"overlap": False, "fragments": 2, "codec": "int4"},
        {"overlap": True, "fragments": 2, "exchange": "gather", "merge": 0.5},
        {"overlap": True, "fragments": 3, "quorum": 2, "transforms": (DelayCompensation(10.0), Poly())},
    ],
    ids=[
        "overlap",
        "no overlap",
        "bf16",
        "int4",
        "topk",
        "gather",
        "quorum",
        "delay compensation",
        "senders and quorum",
        "refused",
        "async buffer",
        "sparseloco",
        "fragments",
        "fragments in int4",
        "fragments gathered and merged",
        "fragments and quorum",
    ],
)
def test_a_schedule_of_real_workers_gives_the_same_bits(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"local_steps": 6, "codec": "fp32", "timeout": timedelta(seconds=30)} | settings
    recordings = results(run_processes(record, SIZE, Settings(**settings)))
    assert len({recording.digest for recording in recordings}) == 1
    assert any(update.staleness > 0 for update in recordings[0].updates) or settings.get("quorum", 1) > 1
    monkeypatch.setattr(Replay, "recordings", recordings, raising=False)
    monkeypatch.setattr("lightning_async_localsgd.simulation.simulation.Timeline", Replay)
    simulation = Simulation(Net(), make_loader(), [1.0] * SIZE, STEPS, **settings)
    simulation.run()
    assert simulation.result().digest == recordings[0].digest


# ---- a schedule that both find by themselves: synchronous DiLoCo under Lightning -------------------------------------


SYNC: dict[str, Any] = {"local_steps": 6, **make_method("sync", SIZE)}


def train(rank: int, fragments: int) -> str:
    L.seed_everything(0, verbose=False)
    strategy = AsyncLocalSGDStrategy(timeout=timedelta(seconds=30), fragments=fragments, **SYNC)
    trainer = make_trainer(SIZE, strategy, max_steps=STEPS, max_epochs=-1, gradient_clip_val=0.5)
    trainer.fit(Net(), make_loader())
    assert strategy.summary is not None
    return strategy.summary.digest


@pytest.mark.parametrize("fragments", [1, 4])
def test_in_lockstep_a_simulation_and_four_processes_under_lightning_give_the_same_bits(fragments: int) -> None:
    digests = results(run_processes(train, SIZE, fragments))
    speeds, options = [1.0, 2.0, 0.5, 0.7], {"gradient_clip_val": 0.5}
    result = simulate(Net(), make_loader(), speeds, STEPS, trainer_options=options, fragments=fragments, **SYNC)
    assert set(digests) == {result.digest}
