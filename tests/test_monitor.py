"""What the monitor logs, and what the progress bar shows."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger

from lightning_async_localsgd import AsyncLocalSGDMonitor, AsyncLocalSGDStrategy
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
    assert len(rows) >= 5
    last = rows[-1]
    assert last["async_localsgd/version"] == summary.version
    for worker, steps in enumerate(summary.local_steps):
        assert last[f"async_localsgd/local_steps/{worker}"] == steps
    assert last["async_localsgd/steps_per_second/0"] > last["async_localsgd/steps_per_second/1"] > 0
    assert last["async_localsgd/bytes_sent"] == summary.bytes_sent
    assert all(row["async_localsgd/delta_norm"] > 0 for row in rows)
    assert all(-1.001 <= row["async_localsgd/alignment"] <= 1.001 for row in rows[1:])
    assert all(0 <= row["async_localsgd/staleness"] <= summary.max_staleness for row in rows)
    assert all(0 < row["async_localsgd/goodput"] < 2 for row in rows[1:])
    assert shown["job_steps"] == "60/60"
    assert not patched


def watching_nothing(rank: int, size: int, strategy: Any) -> None:
    trainer = make_trainer(1, strategy, max_steps=1, callbacks=[AsyncLocalSGDMonitor()])
    trainer.fit(Regression(), stream(0))


@pytest.mark.parametrize("strategy", ["auto", "async_localsgd"])
def test_the_monitor_refuses_to_watch_nothing(strategy: str) -> None:
    (outcome,) = run_processes(watching_nothing, 1, 1, strategy)
    assert "MisconfigurationException" in outcome.error and "leave the callback out" in outcome.error
