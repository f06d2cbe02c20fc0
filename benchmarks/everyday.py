"""The cost of validation, checkpoints and logging for two unequal workers, against the same training without these.

    python benchmarks/everyday.py

Two workers, one five times slower, train the same module for the same number of local steps: plainly, and with
validation every 50 batches of worker 0, a checkpoint every 100 of its steps, and a metric logged with
``sync_dist=True`` in every step. Both ways take turns, in the same processes.

Throughput is local steps of all workers over those possible at the speeds of their devices in the time from the first
step of any worker to the last step of any. Worker 0's time for validation batches is its own work, not the library's,
and is subtracted. All else counts: putting the global parameters into the module for validation and restoring its own,
writing checkpoints on both workers, waiting.
"""

import argparse
import json
import os
import platform
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from _devices import SimulatedDevice
from _workers import run_workers
from lightning_async_localsgd import AsyncLocalSGDStrategy

WORKERS = 2
SLOWER = 5
"""How much slower worker 1 is."""
VALIDATE_EVERY = 50
SAVE_EVERY = 100
FEATURES = 512
CLASSES = 4
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Config:
    """Settings of all workers."""

    step_seconds: float
    """Of worker 0."""
    width: int
    steps: int
    """Per worker, on average."""
    repeats: int
    validation_batches: int
    background: bool
    """Whether Lightning's ``AsyncCheckpointIO`` writes worker 0's checkpoints in the background."""
    folder: str

    def seconds(self, rank: int) -> float:
        return self.step_seconds * (SLOWER if rank else 1)


@dataclass(frozen=True)
class WorkerRun:
    """Times of one worker in one run, on the clock shared by all processes."""

    begin: float
    end: float
    steps: int
    late_steps: int
    validations: int
    validation_seconds: float
    saves: int
    save_seconds: float
    blocked_seconds: float
    checkpoint_megabytes: float


# ---- worker processes -----------------------------------------------------------------------------------------------


class Batches(IterableDataset[tuple[Tensor, Tensor]]):
    """Endless random batches."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield torch.randn(16, FEATURES), torch.randint(CLASSES, (16,))


class Classifier(L.LightningModule):
    """A perceptron with two hidden layers.

    Args:
        width: of the hidden layers.
        everyday: whether to log a metric in every step.
    """

    def __init__(self, width: int, everyday: bool) -> None:
        super().__init__()
        self.everyday = everyday
        self.net = nn.Sequential(
            nn.Linear(FEATURES, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, CLASSES)
        )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.everyday:  # after the step: its simulated time would hide the cost of logging
            self.log("train_loss", outputs["loss"], on_step=True, sync_dist=True)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.net(x), y), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-4)


class Times(L.Callback):
    """Measures the time of worker 0's training thread for validation batches and for checkpoints."""

    def __init__(self) -> None:
        self.validations = 0
        self.validation_seconds = 0.0
        self.saves = 0
        self.save_seconds = 0.0
        self._begin = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        save = trainer.strategy.save_checkpoint

        def measured(*args: Any, **kwargs: Any) -> None:
            with self._saving():
                save(*args, **kwargs)

        trainer.strategy.save_checkpoint = measured  # type: ignore[method-assign]

    @contextmanager
    def _saving(self) -> Iterator[None]:
        begin = time.monotonic()
        yield
        self.saves += 1
        self.save_seconds += time.monotonic() - begin

    # The library swaps the global parameters in before the first of these, and the worker's own after the second.

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin = time.monotonic()

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.validations += 1
            self.validation_seconds += time.monotonic() - self._begin


def train_by_turns(rank: int, config: Config) -> list[list[WorkerRun]]:
    """Train plainly and with all three, as worker ``rank``; returns both runs of each repeat."""
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*`IterableDataset` has `__len__` defined.*")
    runs = []
    for repeat in range(config.repeats):
        ways = (False, True) if repeat % 2 == 0 else (True, False)
        folder = Path(config.folder, str(repeat))
        pair = {everyday: train(rank, config, everyday, folder) for everyday in ways}
        runs.append([pair[False], pair[True]])
    return runs


def train(rank: int, config: Config, everyday: bool, folder: Path) -> WorkerRun:
    """Train once, as worker ``rank``."""
    L.seed_everything(0, verbose=False)
    device, times = SimulatedDevice(config.seconds(rank)), Times()
    strategy = AsyncLocalSGDStrategy()
    callbacks: list[L.Callback] = [device, times]
    checkpoints = ModelCheckpoint(folder / "checkpoints", every_n_train_steps=SAVE_EVERY)
    if everyday:
        callbacks.append(checkpoints)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=WORKERS,
        strategy=strategy,
        max_steps=config.steps,
        val_check_interval=VALIDATE_EVERY if everyday else None,
        check_val_every_n_epoch=None if everyday else 1,
        limit_val_batches=config.validation_batches if everyday else 0,
        num_sanity_val_steps=0,
        callbacks=callbacks,
        plugins=[AsyncCheckpointIO()] if config.background else None,
        logger=CSVLogger(folder),
        enable_checkpointing=everyday,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    held_out = TensorDataset(torch.randn(1600, FEATURES), torch.randint(CLASSES, (1600,)))
    trainer.fit(
        Classifier(config.width, everyday),
        DataLoader(Batches(), batch_size=None),
        DataLoader(held_out, batch_size=16) if everyday else None,
    )
    assert strategy.summary is not None
    written = Path(checkpoints.best_model_path) if everyday and rank == 0 else None
    return WorkerRun(
        device.begin,
        device.end,
        device.steps,
        device.late_steps,
        times.validations,
        times.validation_seconds,
        times.saves,
        times.save_seconds,
        strategy.summary.blocked_seconds,
        written.stat().st_size / 1e6 if written is not None else 0.0,
    )


# ---- measuring ------------------------------------------------------------------------------------------------------


def describe(workers: list[WorkerRun], config: Config) -> dict[str, Any]:
    """A run in figures."""
    seconds = max(worker.end for worker in workers) - min(worker.begin for worker in workers)
    possible = sum((seconds - w.validation_seconds) / config.seconds(rank) for rank, w in enumerate(workers))
    steps = sum(worker.steps for worker in workers)
    return {
        "of_possible": steps / possible,
        "steps_per_second": steps / seconds,
        "seconds": seconds,
        "workers": [asdict(worker) for worker in workers],
    }


def print_table(repeats: list[dict[str, Any]]) -> None:
    print(f"\n{'':9}{'plain':>8}{'all three':>11}{'ratio':>8}   of worker 0's time: validation, checkpoints")
    for i, repeat in enumerate(repeats):
        leader = repeat["everyday"]["workers"][0]
        parts = [leader[name] / repeat["everyday"]["seconds"] for name in ("validation_seconds", "save_seconds")]
        print(
            f"repeat {i + 1:<2}{repeat['plain']['of_possible']:8.3f}{repeat['everyday']['of_possible']:11.3f}"
            f"{repeat['ratio']:8.3f}   {parts[0]:.1%}, {parts[1]:.1%}"
        )
    print(f"{'median':9}{'':19}{median(repeat['ratio'] for repeat in repeats):8.3f}")
    late = sum(worker["late_steps"] for r in repeats for way in ("plain", "everyday") for worker in r[way]["workers"])
    if late:
        print(f"steps whose computation alone took longer than their device would: {late}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--step-seconds", type=float, default=0.05, help="of the fast worker")
    parser.add_argument("--width", type=int, default=1024, help="of the module's hidden layers")
    parser.add_argument("--steps", type=int, default=600, help="local steps per worker, on average")
    parser.add_argument("--validation-batches", type=int, default=20)
    parser.add_argument("--background", action="store_true", help="write worker 0's checkpoints in the background")
    parser.add_argument("--repeats", type=int, default=3, help="times that both ways are run; the median counts")
    parser.add_argument("--quick", action="store_true", help="a smoke run: two short repeats")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for JSON")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if args.quick:
        args.steps, args.repeats = 150, 2
    with tempfile.TemporaryDirectory() as folder:
        config = Config(
            args.step_seconds,
            args.width,
            args.steps,
            args.repeats,
            args.validation_batches,
            args.background,
            folder,
        )
        by_worker = run_workers(train_by_turns, config, WORKERS, timeout=3600)
    repeats = []
    for pairs in zip(*by_worker, strict=True):
        plain, everyday = (describe(list(workers), config) for workers in zip(*pairs, strict=True))
        ratio = everyday["of_possible"] / plain["of_possible"]
        repeats.append({"ratio": ratio, "plain": plain, "everyday": everyday})
    print_table(repeats)
    report = {
        "settings": {k: v for k, v in asdict(config).items() if k != "folder"}
        | {
            "workers": WORKERS,
            "slower": SLOWER,
            "parameters": sum(p.numel() for p in Classifier(config.width, True).parameters()),
        },
        "environment": {
            "python": platform.python_version(),
            "cores": os.cpu_count(),
            **{package: version(package) for package in ("torch", "lightning")},
        },
        "ratio": median(repeat["ratio"] for repeat in repeats),
        "repeats": repeats,
    }
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / ("everyday_background.json" if args.background else "everyday.json")
    path.write_text(json.dumps(report, indent=2) + "\n")
    print(f"\nwritten: {path}")


if __name__ == "__main__":
    main()
