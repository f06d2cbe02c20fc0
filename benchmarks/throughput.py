"""How many local steps four unequal workers make per second, over the sum of what each makes alone.

    python benchmarks/throughput.py

Workers are slowed to the device speeds of the paper's toy experiment, 0.58 : 0.75 : 1.51 : 3.33 seconds per step,
scaled down. One run measures, one after the other and each in processes of its own:

- each worker alone: the reference. All four run at the same time, without knowing of each other, so that they share
  the processor as the workers of every other mode do;
- this library as it is by default, and in its synchronous mode;
- Lightning's DDP and torchft's DiLoCo;
- the cost of the exchange while there is nothing to send.

A mode's time goes from the begin of the first step of any worker to the end of the last one of any worker. A wait for
other workers at the end counts; starting processes and building models does not.
"""

import argparse
import json
import math
import os
import platform
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import DDPStrategy
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from _devices import TOY_SECONDS_PER_STEP, SimulatedDevice, scaled
from _workers import run_workers
from lightning_async_localsgd import AsyncLocalSGDStrategy

WORKERS = len(TOY_SECONDS_PER_STEP)
ALONE = "each worker alone"
ASYNC = "asynchronous"
SYNC = "synchronous"
DDP = "Lightning DDP"
TORCHFT = "torchft DiLoCo"
MODES = (ALONE, ASYNC, SYNC, DDP, TORCHFT)

COLORS = ("#4477aa", "#66ccee", "#ccbb44", "#ee6677")
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Config:
    """Settings of all workers of a mode; times in seconds."""

    mode: str
    seconds: float
    scale: float
    local_steps: int
    idle_seconds: float = 0.0

    @property
    def step_seconds(self) -> list[float]:
        return scaled(self.scale)

    def max_steps(self, rank: int) -> int:
        """The trainer's ``max_steps`` for a run of about ``seconds``."""
        if self.mode == ALONE:
            return max(2, round(self.seconds / self.step_seconds[rank]))
        if self.mode == ASYNC:
            together = sum(self.seconds / step for step in self.step_seconds)
            return max(2, round(together / WORKERS))
        # Whole rounds: a peer would not send the rest of one.
        rounds = math.ceil(self.seconds / (self.step_seconds[-1] * self.local_steps))
        return rounds * self.local_steps


@dataclass(frozen=True)
class WorkerTimes:
    """Times of one worker, on the clock shared by all processes."""

    begin: float
    end: float
    steps: int
    late_steps: int
    blocked_seconds: float | None


@dataclass(frozen=True)
class IdleCost:
    """Cores that one worker keeps busy while nothing is sent and its training thread sleeps."""

    exchange: float
    """Its exchange and bell threads alone."""
    process: float
    """All of its process: also the threads of gloo and, in worker 0, of the store."""


# ---- worker processes -----------------------------------------------------------------------------------------------


class Batches(IterableDataset[tuple[Tensor, Tensor]]):
    """Endless random batches of the paper's toy: 512 dimensions, 4 classes."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield torch.randn(32, 512), torch.randint(4, (32,))


class Classifier(L.LightningModule):
    """The paper's toy model, one hidden layer, with about half a million parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 4))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-4)


def make_trainer(strategy: Any, max_steps: int, callbacks: list[L.Callback]) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        devices=1 if strategy == "auto" else WORKERS,
        strategy=strategy,
        max_steps=max_steps,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )


def make_strategy(config: Config) -> Any:
    if config.mode == ASYNC:
        return AsyncLocalSGDStrategy(local_steps=config.local_steps)
    if config.mode == SYNC:
        return AsyncLocalSGDStrategy(
            local_steps=config.local_steps, quorum=WORKERS, overlap=False, pace="fixed", budget="per_worker"
        )
    if config.mode == DDP:
        return DDPStrategy(process_group_backend="gloo")
    return "auto"  # a single device: alone, or under a callback that does the rest


def train(rank: int, config: Config) -> WorkerTimes:
    """Train in one mode, as worker ``rank``."""
    quiet()
    L.seed_everything(0, verbose=False)
    device = SimulatedDevice(config.step_seconds[rank])
    callbacks: list[L.Callback] = [device]
    if config.mode == TORCHFT:
        from _torchft import TorchftDiLoCo  # no other mode needs torchft

        callbacks.append(TorchftDiLoCo(rank, WORKERS, config.local_steps))
    strategy = make_strategy(config)
    trainer = make_trainer(strategy, config.max_steps(rank), callbacks)
    trainer.fit(Classifier(), DataLoader(Batches(), batch_size=None))
    summary = getattr(strategy, "summary", None)  # ours alone has one
    blocked = None if summary is None else summary.blocked_seconds
    return WorkerTimes(device.begin, device.end, device.steps, device.late_steps, blocked)


def quiet() -> None:
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*`IterableDataset` has `__len__` defined.*")


# ---- the cost of a sleeping exchange --------------------------------------------------------------------------------


class IdleProbe(L.Callback):
    """Lets the training thread sleep in the middle of a round, and measures the time its process computes meanwhile."""

    WARM_UP_STEPS = 5
    MARGIN_SECONDS = 1.0  # workers do not start all at once: none measures while another still makes steps
    THREADS = ("async-localsgd-exchange", "async-localsgd-bell")

    cost: IdleCost

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx != self.WARM_UP_STEPS:
            return
        time.sleep(self.MARGIN_SECONDS)
        begin, exchange, process = time.monotonic(), self._exchange_seconds(), time.process_time()
        time.sleep(self.seconds)
        wall = time.monotonic() - begin
        exchange, process = self._exchange_seconds() - exchange, time.process_time() - process
        self.cost = IdleCost(exchange / wall, process / wall)
        time.sleep(self.MARGIN_SECONDS)

    def _exchange_seconds(self) -> float:
        """Processor time of the library's threads so far."""
        threads = [thread for thread in threading.enumerate() if thread.name in self.THREADS]
        assert len(threads) == len(self.THREADS) and all(thread.ident for thread in threads)
        return sum(time.clock_gettime(time.pthread_getcpuclockid(thread.ident or 0)) for thread in threads)


def sleep_through_a_round(rank: int, config: Config) -> IdleCost:
    """Measure the idle cost, as worker ``rank``."""
    quiet()
    probe = IdleProbe(config.idle_seconds)
    endless = AsyncLocalSGDStrategy(local_steps=1_000_000)
    trainer = make_trainer(endless, 2 * IdleProbe.WARM_UP_STEPS, [probe])
    trainer.fit(Classifier(), DataLoader(Batches(), batch_size=None))
    return probe.cost


# ---- measuring ------------------------------------------------------------------------------------------------------


def measure(config: Config) -> dict[str, Any]:
    """Run one mode; returns its figures."""
    times = run_workers(train, config, WORKERS)
    if config.mode == ALONE:
        per_second = [t.steps / (t.end - t.begin) for t in times]
        seconds = max(t.end - t.begin for t in times)
    else:
        seconds = max(t.end for t in times) - min(t.begin for t in times)
        per_second = [t.steps / seconds for t in times]
    blocked = [t.blocked_seconds / seconds for t in times if t.blocked_seconds is not None]
    return {
        "seconds": seconds,
        "steps": [t.steps for t in times],
        "steps_per_second": per_second,
        "blocked_fraction": max(blocked, default=None),
        "blocked_fraction_per_worker": blocked,
        # A late step of DDP is one that waited for the others, since they average their gradients within it.
        "late_steps": sum(t.late_steps for t in times) if config.mode != DDP else None,
    }


def measure_all(config: Config) -> dict[str, dict[str, Any]]:
    """Run every mode once; returns the figures of each, with its ratio to the reference."""
    figures = {}
    for mode in MODES:
        print(f"  {mode} ...", flush=True)
        figures[mode] = measure(replace(config, mode=mode))
        figures[mode]["ratio"] = sum(figures[mode]["steps_per_second"]) / sum(figures[ALONE]["steps_per_second"])
    return figures


def measure_idle(config: Config) -> dict[str, Any]:
    """The idle cost of the most expensive worker, and the processes of all."""
    print("  idle exchange ...", flush=True)
    costs = run_workers(sleep_through_a_round, config, WORKERS)
    return {
        "seconds": config.idle_seconds,
        "exchange_and_bell_threads": max(cost.exchange for cost in costs),
        "whole_process": max(cost.process for cost in costs),
        "whole_process_per_worker": [cost.process for cost in costs],
    }


def summarize(repeats: list[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Of every mode the repeat with the median ratio, and the ratios of all."""
    summary = {}
    for mode in MODES:
        ordered = sorted((repeat[mode] for repeat in repeats), key=lambda figures: figures["ratio"])
        ratios = [figures["ratio"] for figures in ordered]
        summary[mode] = {
            **ordered[(len(ordered) - 1) // 2],
            "ratio": median(ratios),
            "ratios": ratios,
        }
        if summary[mode]["blocked_fraction"] is not None:
            summary[mode]["blocked_fraction"] = max(figures["blocked_fraction"] for figures in ordered)
    return summary


# ---- showing --------------------------------------------------------------------------------------------------------


def print_table(summary: dict[str, dict[str, Any]], idle: dict[str, Any]) -> None:
    print(f"\n{'':20}{'of the sum':>11}{'steps/s':>9}{'blocked':>9}{'seconds':>9}   steps per worker")
    for mode, figures in summary.items():
        blocked = figures["blocked_fraction"]
        print(
            f"{mode:20}{figures['ratio']:11.3f}{sum(figures['steps_per_second']):9.2f}"
            f"{'' if blocked is None else f'{blocked:.2%}':>9}{figures['seconds']:9.1f}"
            f"   {', '.join(map(str, figures['steps']))}"
        )
    print(
        f"\nidle: exchange and bell threads {idle['exchange_and_bell_threads']:.3%} of a core, "
        f"whole process {idle['whole_process']:.3%} (worst worker, over {idle['seconds']:g} s)"
    )
    late = {mode: figures["late_steps"] for mode, figures in summary.items() if figures["late_steps"]}
    if late:
        print(f"steps whose computation alone took longer than their device would: {late}")


def draw(summary: dict[str, dict[str, Any]], config: Config, path: Path) -> None:
    """Write the bar chart: throughput of each mode, made up of its workers', over the sum of the workers alone."""
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    axes = figure.subplots()
    reference = sum(summary[ALONE]["steps_per_second"])
    labels = [f"{mode}\n(this library)" if mode in (ASYNC, SYNC) else mode for mode in summary]
    bottoms = [0.0] * len(summary)
    for worker, seconds in enumerate(config.step_seconds):
        heights = [figures["steps_per_second"][worker] / reference for figures in summary.values()]
        label = f"worker {worker}: {seconds * 1e3:.0f} ms per step"
        axes.bar(labels, heights, 0.62, bottoms, color=COLORS[worker], edgecolor="white", label=label)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    for position, top in enumerate(bottoms):
        axes.text(position, top + 0.015, f"{top:.3f}", ha="center", va="bottom", fontweight="bold")
    axes.axhline(1.0, color="black", linewidth=0.8, linestyle=":", zorder=0)
    axes.set_ylim(0, 1.12)
    axes.set_ylabel("local steps per second,\nover the sum of the workers alone")
    axes.set_title(f"Throughput of {WORKERS} workers of unequal speed (H = {config.local_steps})", loc="left")
    axes.legend(frameon=False, loc="upper right", bbox_to_anchor=(1.0, 0.92), reverse=True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def environment() -> dict[str, Any]:
    """Versions and hardware of the measurement."""
    versions: dict[str, str | None] = {}
    for package in ("lightning-async-localsgd", "torch", "lightning", "torchft"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # run from a checkout
            versions[package] = None
    return {"python": platform.python_version(), "cores": os.cpu_count(), **versions}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=25.0, help="about how long each mode trains")
    parser.add_argument("--scale", type=float, default=0.05, help="of the toy's seconds per step")
    parser.add_argument("--local-steps", type=int, default=50, help="H, local steps per round of the fastest worker")
    parser.add_argument("--idle-seconds", type=float, default=10.0, help="how long the idle exchange is watched")
    parser.add_argument("--repeats", type=int, default=1, help="times that all modes are run; the median counts")
    parser.add_argument("--quick", action="store_true", help="a smoke run: short, with short rounds")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for JSON and PNG")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if args.quick:
        args.seconds, args.local_steps, args.idle_seconds = 4.0, 10, 2.0
    config = Config(ALONE, args.seconds, args.scale, args.local_steps, args.idle_seconds)

    repeats = []
    for repeat in range(args.repeats):
        print(f"repeat {repeat + 1} of {args.repeats}", flush=True)
        repeats.append(measure_all(config))
    idle = measure_idle(config)
    summary = summarize(repeats)
    print_table(summary, idle)

    args.output.mkdir(parents=True, exist_ok=True)
    report = {
        "settings": {
            "seconds": args.seconds,
            "step_seconds": config.step_seconds,
            "local_steps": args.local_steps,
            "repeats": args.repeats,
            "parameters": sum(p.numel() for p in Classifier().parameters()),
        },
        "environment": environment(),
        "modes": summary,
        "idle": idle,
    }
    (args.output / "throughput.json").write_text(json.dumps(report, indent=2) + "\n")
    draw(summary, config, args.output / "throughput.png")
    print(f"\nwritten: {args.output / 'throughput.json'}, {args.output / 'throughput.png'}")


if __name__ == "__main__":
    main()
