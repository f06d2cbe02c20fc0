"""The metrics of the monitor, and the progress bar."""

from __future__ import annotations

import csv
import random
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger

from lightning_async_localsgd import AsyncLocalSGDMonitor, AsyncLocalSGDStrategy
from lightning_async_localsgd.trainer.monitor import Goodput
from tests.modules import Regression, make_trainer, stream
from tests.processes import results, run_processes


class Bar(TQDMProgressBar):
    """Keeps what is shown last."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: dict[str, Any] = {}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self.shown = self.get_metrics(trainer, pl_module)


def monitored(rank: int, size: int, folder: str) -> Any:
    plan, bar = AsyncLocalSGDStrategy(local_steps=5), Bar()
    trainer = make_trainer(
        size,
        plan,
        max_steps=60,
        callbacks=[AsyncLocalSGDMonitor(), bar],
        logger=CSVLogger(folder, name="", version=""),
        log_every_n_steps=10,
        enable_progress_bar=True,
    )
    trainer.fit(Regression([0.002, 0.006]), stream(rank))
    return plan.summary, bar.shown, "get_metrics" in vars(bar)


def test_the_monitor_logs_how_the_exchange_goes(tmp_path: Path) -> None:
    (summary, shown, patched), _ = results(run_processes(monitored, 2, 2, str(tmp_path)))
    with (tmp_path / "metrics.csv").open() as file:
        rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    assert len(rows) >= 2  # worker 0 may have made few of the steps, on a busy machine
    last = rows[-1]
    assert last["async_localsgd/version"] == summary.version
    for worker, steps in enumerate(summary.local_steps):
        assert last[f"async_localsgd/local_steps/{worker}"] == steps
    for worker, seconds in enumerate((0.002, 0.006)):  # of a step at least: a busy machine makes it longer
        assert 0 < last[f"async_localsgd/steps_per_second/{worker}"] <= 1.01 / seconds
    assert last["async_localsgd/bytes_sent"] == summary.bytes_sent
    assert all(row["async_localsgd/delta_norm"] > 0 for row in rows)
    assert all(-1.001 <= row["async_localsgd/alignment"] <= 1.001 for row in rows[1:])
    assert all(0 <= row["async_localsgd/staleness"] <= summary.max_staleness for row in rows)
    assert all(row["async_localsgd/goodput"] > 0 for row in rows[2:])
    assert shown["job_steps"] == "60/60"
    assert not patched


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    speeds=st.lists(st.floats(0.2, 5.0), min_size=1, max_size=6),
    local_steps=st.integers(20, 100),
    trip=st.floats(0.0, 2.0),
    seed=st.integers(0, 1000),
)
def test_goodput_is_1_at_constant_speeds(speeds: list[float], local_steps: int, trip: float, seed: int) -> None:
    fastest = max(speeds)
    rounds = random.Random(seed)
    goodput = Goodput(4 * local_steps * len(speeds))
    now, found = 0.0, []
    for _ in range(60):  # an exchange at any moment, seen at once or much later
        now += rounds.uniform(0.2, 1.0) * local_steps / fastest
        goodput.note(now + trip, sum(int(now * speed) for speed in speeds))
        found.append(goodput.of(speeds))
    settled = [value for value in found[40:] if value is not None]
    assert len(settled) == 20
    assert all(abs(value - 1) < 0.05 for value in settled)


def watching_nothing(rank: int, size: int, strategy: Any) -> None:
    trainer = make_trainer(1, strategy, max_steps=1, callbacks=[AsyncLocalSGDMonitor()])
    trainer.fit(Regression(), stream(0))


@pytest.mark.parametrize("strategy", ["auto", "async_localsgd"])
def test_the_monitor_refuses_to_watch_nothing(strategy: str) -> None:
    (outcome,) = run_processes(watching_nothing, 1, 1, strategy)
    assert "MisconfigurationException" in outcome.error and "leave the callback out" in outcome.error
