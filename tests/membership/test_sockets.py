"""Connections between workers: a killed one is noticed although processes that it has forked live on."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from lightning_async_localsgd import Settings
from tests.processes import run_processes
from tests.worker.test_worker import Loop


class SlowToRead(Dataset[torch.Tensor]):
    """Keeps whoever reads it busy until a file is there."""

    def __init__(self, until: Path) -> None:
        self.until = until

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> torch.Tensor:
        while index > 3 and not self.until.exists():
            time.sleep(0.05)
        return torch.zeros(1)


def killed_beside_its_children(rank: int, size: int, ended: Path) -> Any:
    loop = Loop(rank, size, Settings(local_steps=5, timeout=timedelta(minutes=5)), pause=0.002)
    batches = iter(DataLoader(SlowToRead(ended), batch_size=2, num_workers=2, multiprocessing_context="fork"))

    def die(loop: Loop) -> None:
        if rank == 1 and loop.worker.local_steps == 13:
            next(batches)  # both children are at work
            os.kill(os.getpid(), signal.SIGKILL)

    return loop.run(10_000, die)


def test_a_killed_worker_is_noticed_though_its_data_loading_processes_live_on(tmp_path: Path) -> None:
    ended = tmp_path / "ended"
    try:
        outcomes = run_processes(killed_beside_its_children, 3, 3, ended, timeout=40, lost=[1])
    finally:
        ended.touch()
    for outcome in (outcomes[0], outcomes[2]):
        assert "Worker 1 (host " in outcome.error and "its connection was closed" in outcome.error
