"""How good a ResNet with BatchNorm and a GAN become, against the same modules under DDP with the same samples.

    python benchmarks/quality.py

Four workers. Under Lightning's DDP they are equal and make ``--steps`` steps each; under this library they are slowed
to the device speeds of the paper's toy experiment, and make the same number of local steps together, each with the
batch that a DDP process has: the same number of samples. Both are judged on held-out data, the ResNet by its running
statistics. A GAN goes round its optimum instead of into it: it is judged at moments of the run's last quarter, and
their mean counts.

``--tune`` tries the learning rates of both sides on a seed that is not reported. The outer optimizer is the default
one, unless ``--outer-lr`` and ``--outer-momentum`` say otherwise.
"""

import argparse
import json
import os
import platform
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from _devices import TOY_SECONDS_PER_STEP, SimulatedDevice, scaled
from _quality_modules import GAN, ResNet, compare, draw_characters, draw_ring, recognize
from _workers import run_workers
from lightning_async_localsgd import AsyncLocalSGDStrategy
from lightning_async_localsgd.outer import DelayedNesterov

WORKERS = len(TOY_SECONDS_PER_STEP)
RESULTS = Path(__file__).parent / "results"
DDP = "ddp"
ASYNC = "async"
RESNET = "resnet"
GAN_ = "gan"
TUNING_SEED = 100
MOMENTS = 25
"""How many times a GAN is judged, in the last quarter of its run."""


@dataclass(frozen=True)
class Task:
    """A module and the length of its training."""

    quality: str
    """The quality metric, the higher the better."""
    steps: int
    """Per worker, on average."""
    local_steps: int
    """H, local steps per round of the fastest worker."""
    scale: float
    """Of the toy's seconds per step."""
    batch_size: int
    """Per worker, on both sides."""
    learning_rates: dict[str, float]
    grid: tuple[float, ...]
    draw: Callable[[int, int], TensorDataset]
    samples: int
    make: Callable[[float], L.LightningModule]


TASKS = {
    RESNET: Task(
        quality="accuracy",
        steps=4800,
        local_steps=50,
        scale=0.03,
        batch_size=32,
        learning_rates={DDP: 0.2, ASYNC: 0.05},
        grid=(0.025, 0.05, 0.1, 0.2, 0.4),
        draw=draw_characters,
        samples=40_000,
        make=ResNet,
    ),
    GAN_: Task(
        quality="mode_overlap",
        steps=2000,
        local_steps=50,
        scale=0.04,
        batch_size=64,
        learning_rates={DDP: 1e-3, ASYNC: 1e-3},
        grid=(5e-4, 1e-3, 2e-3),
        draw=draw_ring,
        samples=50_000,
        make=GAN,
    ),
}
HELD_OUT_SAMPLES = 10_000


@dataclass(frozen=True)
class Run:
    """One run of one task on one side."""

    task: str
    method: str
    seed: int
    learning_rate: float
    steps: int
    local_steps: int
    outer: tuple[float, float] | None
    """Learning rate and momentum of the outer optimizer, delayed Nesterov."""
    folder: str
    """Folder of the data."""


# ---- worker processes -----------------------------------------------------------------------------------------------


class Snapshots(L.Callback):
    """Keeps copies of the parameters that all have in common, at ``MOMENTS`` moments of the last quarter of the run."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.batches = 0
        self.taken: list[dict[str, Tensor]] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.batches += 1
        strategy = trainer.strategy
        ours = isinstance(strategy, AsyncLocalSGDStrategy)
        step = strategy.job_steps if ours else self.batches
        if step < self.steps * (0.75 + 0.25 * (len(self.taken) + 1) / MOMENTS):
            return
        if ours:
            assert strategy.worker is not None
            self.taken.append(strategy.worker.global_tensors())
        else:
            self.taken.append({name: tensor.clone() for name, tensor in pl_module.state_dict().items()})


def train_each(rank: int, runs: list[Run]) -> list[dict[str, Any]]:
    """One run after the other in the same processes, since those take longer to start than to train."""
    return [train(rank, run) for run in runs]


def train(rank: int, run: Run) -> dict[str, Any]:
    """Train one task on one side, as worker ``rank``; worker 0 returns the quality."""
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*find_unused_parameters.*")
    L.seed_everything(run.seed, verbose=False)
    task = TASKS[run.task]
    module = task.make(run.learning_rate)
    device = SimulatedDevice(scaled(task.scale)[rank] if run.method == ASYNC else 0.0)
    callbacks: list[L.Callback] = [device]
    snapshots = Snapshots(run.steps)
    if run.task == GAN_ and rank == 0:
        callbacks.append(snapshots)
    outer_optimizer = None if run.outer is None else partial(DelayedNesterov, lr=run.outer[0], momentum=run.outer[1])
    strategy: Any = AsyncLocalSGDStrategy(local_steps=run.local_steps, outer_optimizer=outer_optimizer)
    if run.method == DDP:
        # In each half of a GAN's step the other half's parameters have no gradient.
        strategy = DDPStrategy(process_group_backend="gloo", find_unused_parameters=run.task == GAN_)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=WORKERS,
        strategy=strategy,
        # Under DDP Lightning counts the steps of all optimizers, here the batches in which one stepped.
        max_steps=run.steps * (2 if run.task == GAN_ and run.method == DDP else 1),
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    train_set = TensorDataset(*torch.load(data_path(run, "train")))
    trainer.fit(module, DataLoader(train_set, batch_size=task.batch_size, shuffle=True, drop_last=True))
    seconds = device.end - device.begin
    figures = judge(module, snapshots.taken, run) if rank == 0 else {}
    summary = getattr(strategy, "summary", None)  # ours alone has one
    return {
        "figures": figures,
        "seconds": seconds,
        "steps": device.steps,
        "late_steps": device.late_steps if run.method == ASYNC else None,
        "summary": asdict(summary) if summary else None,
    }


def judge(module: L.LightningModule, snapshots: list[dict[str, Tensor]], run: Run) -> dict[str, float]:
    """The quality metric, and further metrics, on held-out data."""
    held_out = TensorDataset(*torch.load(data_path(run, "held-out")))
    if isinstance(module, ResNet):
        return recognize(module.net, held_out)._asdict()
    assert isinstance(module, GAN)
    figures = []
    for snapshot in snapshots:
        module.load_state_dict(snapshot)
        figures.append(compare(module.generator, held_out)._asdict())
    return {name: fmean(each[name] for each in figures) for name in figures[0]}


def data_path(run: Run, part: str) -> Path:
    return Path(run.folder, f"{run.task}-{part}.pt")


# ---- running --------------------------------------------------------------------------------------------------------


def draw_data(names: list[str], folder: str) -> None:
    """Make the data of all runs once."""
    for name in names:
        task = TASKS[name]
        torch.save(task.draw(task.samples, 1).tensors, Path(folder, f"{name}-train.pt"))
        torch.save(task.draw(HELD_OUT_SAMPLES, 2).tensors, Path(folder, f"{name}-held-out.pt"))


def execute(runs: list[Run]) -> list[dict[str, Any]]:
    """Make some runs of one task on one side; returns the figures of each."""
    print(f"{runs[0].task}, {runs[0].method} ...", flush=True)
    by_worker = run_workers(train_each, runs, WORKERS, timeout=300.0 * len(runs))
    results = [describe(run, list(workers)) for run, workers in zip(runs, zip(*by_worker, strict=True), strict=True)]
    for run, result in zip(runs, results, strict=True):
        figures = ", ".join(f"{name} {value:.4f}" for name, value in result["figures"].items())
        print(
            f"  seed {run.seed}, learning rate {run.learning_rate:g}: {figures} ({result['seconds']:.0f} s)", flush=True
        )
    return results


def describe(run: Run, workers: list[dict[str, Any]]) -> dict[str, Any]:
    """A run in figures."""
    result = {key: value for key, value in asdict(run).items() if key != "folder"}
    result |= {
        "figures": workers[0]["figures"],
        "seconds": max(worker["seconds"] for worker in workers),
        "samples": TASKS[run.task].batch_size * sum(worker["steps"] for worker in workers),
        "steps_per_worker": [worker["steps"] for worker in workers],
    }
    if run.method == ASYNC:
        result["late_steps"] = sum(worker["late_steps"] for worker in workers)
        result["outer_updates"] = workers[0]["summary"]["version"]
        result["mean_staleness"] = workers[0]["summary"]["mean_staleness"]
    return result


def plan(args: argparse.Namespace, folder: str) -> Iterator[list[Run]]:
    """The runs of each task on each side."""
    for name in args.tasks:
        task = TASKS[name]
        steps, local_steps = args.steps or task.steps, args.local_steps or task.local_steps
        for method in (DDP, ASYNC):
            learning_rate = task.learning_rates[method]
            outer = None if args.outer_lr is None else (args.outer_lr, args.outer_momentum)
            run = Run(name, method, TUNING_SEED, learning_rate, steps, local_steps, outer, folder)
            if args.quick:
                run = replace(run, steps=steps // 10, local_steps=local_steps // 5)
            if args.tune:
                yield [replace(run, learning_rate=learning_rate) for learning_rate in task.grid]
            else:
                yield [replace(run, seed=seed) for seed in args.seeds]


def compared(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The quality of both sides by task, with the ratio of each seed."""
    tasks = {}
    for name in dict.fromkeys(result["task"] for result in results):
        quality = TASKS[name].quality
        by_seed = {
            method: {r["seed"]: r["figures"][quality] for r in results if (r["task"], r["method"]) == (name, method)}
            for method in (DDP, ASYNC)
        }
        ratios = {seed: by_seed[ASYNC][seed] / value for seed, value in by_seed[DDP].items()}
        tasks[name] = {
            "quality": quality,
            DDP: fmean(by_seed[DDP].values()),
            ASYNC: fmean(by_seed[ASYNC].values()),
            "ratio": fmean(by_seed[ASYNC].values()) / fmean(by_seed[DDP].values()),
            "ratio_by_seed": ratios,
        }
    return tasks


def print_table(tasks: dict[str, Any]) -> None:
    print(f"\n{'':10}{'quality':16}{'DDP':>8}{'async':>8}{'ratio':>8}   by seed")
    for name, figures in tasks.items():
        by_seed = ", ".join(f"{ratio:.3f}" for ratio in figures["ratio_by_seed"].values())
        means = f"{figures[DDP]:8.4f}{figures[ASYNC]:8.4f}{figures['ratio']:8.3f}"
        print(f"{name:10}{figures['quality']:16}{means}   {by_seed}")


def environment() -> dict[str, Any]:
    """Versions and hardware of the measurement."""
    return {
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        **{package: version(package) for package in ("torch", "lightning")},
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK", help=", ".join(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED")
    parser.add_argument(
        "--steps",
        type=int,
        help="per worker on average, instead of those of the task; no learning rate is tuned for it",
    )
    parser.add_argument("--local-steps", type=int, help="H of the fastest worker, instead of that of the task")
    parser.add_argument("--outer-lr", type=float, help="of delayed Nesterov, in the place of the default")
    parser.add_argument("--outer-momentum", type=float, default=0.9, help="of that delayed Nesterov")
    parser.add_argument("--tune", action="store_true", help="try the learning rates of both sides, on a seed apart")
    parser.add_argument("--quick", action="store_true", help="a smoke run: one seed, a tenth of the steps")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for JSON")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if args.quick:
        args.seeds = args.seeds[:1]
    with tempfile.TemporaryDirectory() as folder:
        draw_data(args.tasks, folder)
        results = [result for runs in plan(args, folder) for result in execute(runs)]
    report: dict[str, Any] = {"environment": environment(), "runs": results}
    if not args.tune:
        tasks = compared(results)
        print_table(tasks)
        report = {"tasks": tasks, **report}
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / ("quality_tuning.json" if args.tune else "quality.json")
    path.write_text(json.dumps(report, indent=2) + "\n")
    print(f"\nwritten: {path}")


if __name__ == "__main__":
    main()
