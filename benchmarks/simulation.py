"""The cost of a simulation beside its training steps, and the memory of many virtual workers.

    python benchmarks/simulation.py            # both
    python benchmarks/simulation.py --quick    # a smoke run

Time: a small GPT is trained by virtual workers of unequal speed, and by a plain PyTorch loop that makes as many steps
with the same batches, optimizer, clipping and schedule. Both take turns in one process; the figure is the median of the
ratios. Memory: the highest resident memory of a process that simulates 256 workers, imports and data included.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from itertools import cycle
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.utils.data import DataLoader

from _devices import TOY_SECONDS_PER_STEP
from _language import LanguageModel, Task, load_tokens, make_optimizer
from lightning_async_localsgd.simulation import simulate

RESULT = Path(__file__).parent / "results" / "simulation.json"
CACHE = Path(tempfile.gettempdir()) / "async-localsgd-benchmarks"
SMALL = Task(width=48, heads=4)
"""About 100k parameters."""


def make_loader(task: Task) -> DataLoader[Any]:
    windows, _ = load_tokens(CACHE, task)
    return DataLoader(windows, batch_size=task.batch_size, shuffle=True, drop_last=True)


def speeds(workers: int) -> list[float]:
    """The device speeds of the paper's toy experiment, repeated."""
    return [1 / seconds for seconds, _ in zip(cycle(TOY_SECONDS_PER_STEP), range(workers), strict=False)]


def simulated(task: Task, workers: int, steps: int, local_steps: int) -> tuple[float, int]:
    """Seconds, and local steps of all workers together."""
    module = LanguageModel(task, steps)
    began = time.perf_counter()
    result = simulate(
        module,
        make_loader(task),
        speeds(workers),
        steps,
        local_steps=local_steps,
        trainer_options={"gradient_clip_val": 1.0, "accelerator": "cpu"},
    )
    return time.perf_counter() - began, result.total_local_steps


def alone(task: Task, steps: int) -> float:
    """Seconds that one plain loop takes for as many steps."""
    module = LanguageModel(task, steps)
    began = time.perf_counter()
    optimizer = make_optimizer(module.gpt, task)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, module._learning_rate_factor)
    batches = iter(make_loader(task))
    for index in range(steps):
        batch = next(batches, None)
        if batch is None:
            batches = iter(make_loader(task))
            batch = next(batches)
        optimizer.zero_grad()
        loss = module.training_step(batch, index)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.gpt.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        loss.item()
    return time.perf_counter() - began


def measure_time(workers: int, steps: int, local_steps: int, repeats: int) -> dict[str, Any]:
    """The ratios of several turns."""
    task = Task()
    alone(task, 20)  # warm up
    ratios = []
    for _ in range(repeats):
        seconds, total = simulated(task, workers, steps, local_steps)
        ratios.append(seconds / alone(task, total))
    return {"workers": workers, "local_steps": total, "ratios": ratios, "ratio": median(ratios)}


def measure_memory(workers: int, steps: int, local_steps: int) -> dict[str, Any]:
    """Highest resident memory of a process of its own, bytes."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(_memory, (workers, steps, local_steps))


def _memory(workers: int, steps: int, local_steps: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    parameters = sum(p.numel() for p in LanguageModel(SMALL, steps).parameters())
    _, total = simulated(SMALL, workers, steps, local_steps)
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024
    return {"workers": workers, "parameters": parameters, "local_steps": total, "peak_bytes": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke run; writes nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    scale = 10 if args.quick else 1
    figures = {
        "time": [
            measure_time(4, 500 // scale, 50 // scale, 1 if args.quick else 5),
            measure_time(64, 100 // scale, 50 // scale, 1 if args.quick else 3),
        ],
        "memory": measure_memory(256, 40 // scale, 20 // scale),
    }
    for row in figures["time"]:
        ratios = ", ".join(f"{ratio:.3f}" for ratio in row["ratios"])
        print(f"{row['workers']} workers: {row['ratio']:.3f} of the time of the steps alone ({ratios})")
    memory = figures["memory"]
    print(
        f"{memory['workers']} workers of {memory['parameters'] / 1e3:.0f}k parameters: "
        f"{memory['peak_bytes'] / 2**30:.2f} GiB at most"
    )
    if not args.quick:
        RESULT.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
