"""Host memory that a checkpoint needs at its peak, in copies of the trainable parameters, and how long it holds up.

Two real workers train a module with AdamW. Compared are the peaks of resident memory of as many steps with and without
a checkpoint of the whole job among them, and measured is the time that each training thread spends on it.

    python benchmarks/checkpoint_memory.py [--parameters 10]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed import TCPStore
from torch.utils.data import DataLoader

from lightning_async_localsgd import AsyncLocalSGDStrategy
from memory import peak, reset_peak

RESULT = Path(__file__).parent / "results" / "checkpoint_memory.json"
SPAN = 12  # steps over which peaks are taken


class Wide(L.LightningModule):
    """Eight square layers."""

    def __init__(self, parameters: float) -> None:
        super().__init__()
        width = int((parameters * 1e6 / 8) ** 0.5)
        self.net = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(8)))
        self.width = width

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """A loss that keeps every layer busy."""
        return self.net(batch.expand(4, self.width)).square().mean()

    def configure_optimizers(self) -> Any:
        """Its state is two copies."""
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class Measure(L.Callback):
    """Has worker 0 save a checkpoint in the second of three spans, and notes each span's peak and longest step."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.peaks: list[int] = []
        self.longest: list[float] = []
        self._last = 0.0

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """Counts local steps."""
        step, now = trainer.global_step, time.monotonic()
        if step == 2 * SPAN + SPAN // 3 and trainer.global_rank == 0:
            trainer.save_checkpoint(f"{self.folder}/one.ckpt")
            now = time.monotonic()
        if self.longest:
            self.longest[-1] = max(self.longest[-1], now - self._last)
        self._last = time.monotonic()
        if step % SPAN == 0 and step > 0:
            self.peaks.append(peak())
            self.longest.append(0.0)
            reset_peak()


def worker(rank: int, port: int, folder: str, args: argparse.Namespace, result: Connection) -> None:
    """One worker; sends the copies that the checkpoint adds and the seconds that it adds to its longest step."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ.update(GROUP_RANK="0", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(TORCHELASTIC_RUN_ID="memory", TORCHELASTIC_USE_AGENT_STORE="True")
    module, measure = Wide(args.parameters), Measure(folder)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=AsyncLocalSGDStrategy(local_steps=4, budget="per_worker", timeout=timedelta(minutes=5)),
        max_steps=5 * SPAN,
        callbacks=[measure],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, DataLoader([torch.zeros(1)] * 10_000, batch_size=None))
    copy = 4 * sum(p.numel() for p in module.parameters())
    # The first span begins before anything is measured.
    added = (measure.peaks[2] - measure.peaks[1]) / copy
    result.send((added, measure.longest[1] - measure.longest[0]))


def main() -> None:
    """Run two workers and print what their checkpoint needs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=10, help="millions of trainable parameters")
    args = parser.parse_args()
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(2)]
        processes = [context.Process(target=worker, args=(r, store.port, folder, args, pipes[r][1])) for r in range(2)]
        for process in processes:
            process.start()
        results = [receiver.recv() for receiver, _ in pipes]
        for process in processes:
            process.join(30)
    for rank, (copies, seconds) in enumerate(results):
        print(f"worker {rank}: {copies:.2f} copies, longest step {seconds:+.2f} s")
    RESULT.write_text(
        json.dumps({"parameters": args.parameters, "copies": [c for c, _ in results], "s": [s for _, s in results]})
        + "\n"
    )


if __name__ == "__main__":
    main()
