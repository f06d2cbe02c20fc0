"""From 2 to 16 real workers: bytes of a delta, length of rounds beside what `plan` predicts, and CPU time.

    python benchmarks/scaling_up.py              # needs root: network namespaces and tc
    python benchmarks/scaling_up.py --workers 2 4

Two kinds of runs, each with every number of workers:

- *limited*: each worker on a host of its own, joined by links so slow that an fp32 exchange of four workers takes about
  two rounds. A step is a sleep, so that two cores do for all workers. Figures: bytes that a worker sends per delta over
  the size of an fp32 delta (headers, scales and the measuring of links included), and local steps per round, predicted
  over real.
- *computing*: no limit, and steps that compute (a small language model), sharing the cores. Figure: the part of the CPU
  time of all processes that is not the training threads': exchange, bell and network threads.

In each the digests of all workers are compared.
"""

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.distributed import PrefixStore, TCPStore

from _language import Task, make_optimizer, next_token_loss
from _links import INTERFACE, Host, hosts
from _workers import free_port, run_workers
from lightning_async_localsgd import Settings, Worker
from lightning_async_localsgd.simulation import Network, plan
from throughput import environment

RESULTS = Path(__file__).parent / "results"
WORKERS = (2, 4, 8, 16)
CODECS = ("fp32", "int8", "int4", "e3m0")
COMPUTING = "computing"
HIDDEN = 6000  # 3.1M parameters
STEP_SECONDS = 0.2
LOCAL_STEPS = 10
COMPUTED_LOCAL_STEPS = 50
_TAKEN_FOR_PAYLOAD = 0.955
"""Of a link's rate: the rest is headers of Ethernet, IP and TCP, and acknowledgements."""


@dataclass(frozen=True)
class Config:
    """One run."""

    kind: str
    """A codec, of a limited run; or ``COMPUTING``."""
    workers: int
    rounds: int
    mbit: float
    port: int = 0
    hosts: tuple[Host, ...] = ()

    @property
    def settings(self) -> dict[str, Any]:
        if self.kind == COMPUTING:
            return {"local_steps": COMPUTED_LOCAL_STEPS}
        return {"local_steps": LOCAL_STEPS, "codec": self.kind}


@dataclass(frozen=True)
class WorkerFigures:
    """How one worker fared; seconds of CPU time from the start of training to its end."""

    steps: int
    bytes_sent: int
    version: int
    round_steps: float
    """Mean local steps of a round, of all workers; without the first two rounds and the last one of each."""
    digest: str
    training_seconds: float
    process_seconds: float


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(512, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 4))


def limited_step(module: nn.Module) -> Callable[[], object]:
    """A step that costs no processor: a little noise in the parameters, which the optimizer has made."""
    next_step = time.monotonic()

    def step() -> None:
        nonlocal next_step
        next_step = max(next_step + STEP_SECONDS, time.monotonic())
        time.sleep(max(0.0, next_step - time.monotonic()))
        for parameter in module.parameters():
            parameter.grad = parameter.detach() * 1e-3
        optimizer.step()

    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    step.optimizer = optimizer  # type: ignore[attr-defined]
    return step


def computing_step(module: nn.Module, rank: int) -> Callable[[], object]:
    """A step of a small language model, on random tokens."""
    task = Task()
    generator = torch.Generator().manual_seed(rank)
    optimizer = make_optimizer(module, task)  # type: ignore[arg-type]

    def step() -> None:
        windows = torch.randint(task.vocab_size, (task.batch_size, task.context + 1), generator=generator)
        next_token_loss(module, windows).backward()  # type: ignore[arg-type]
        optimizer.step()
        optimizer.zero_grad()

    step.optimizer = optimizer  # type: ignore[attr-defined]
    return step


def train(rank: int, config: Config) -> WorkerFigures:
    """Train as worker ``rank``."""
    address = "127.0.0.1"
    if config.hosts:
        config.hosts[rank].enter()
        address = config.hosts[0].address
        os.environ.update(GLOO_SOCKET_IFNAME=INTERFACE)
    store = TCPStore(address, config.port, config.workers, is_master=rank == 0, timeout=timedelta(minutes=5))
    module = Task().make_gpt() if config.kind == COMPUTING else make_net()
    step = computing_step(module, rank) if config.kind == COMPUTING else limited_step(module)
    optimizer = step.optimizer  # type: ignore[attr-defined]
    worker = Worker(module, [optimizer], PrefixStore("run", store), rank, config.workers, Settings(**config.settings))
    worker.start(max_steps=config.rounds * config.settings["local_steps"])
    thread, process = time.thread_time(), _process_seconds()
    steps, running = 0, True
    while running:
        step()
        steps += 1
        running = worker.step(samples=1)
    thread, process = time.thread_time() - thread, _process_seconds() - process
    summary = worker.finish()
    store.set(f"done/{rank}", "1")
    if rank == 0:
        store.wait([f"done/{r}" for r in range(config.workers)], timedelta(minutes=5))
    rounds: dict[int, list[int]] = {}
    for update in worker.take_updates():
        rounds.setdefault(update.worker, []).append(update.local_steps)
    round_steps = fmean(steps for of_worker in rounds.values() for steps in of_worker[2:-1])
    return WorkerFigures(steps, summary.bytes_sent, summary.version, round_steps, summary.digest, thread, process)


def _process_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def measure(config: Config) -> dict[str, Any]:
    """Run one setting."""
    with ExitStack() as stack:
        if config.kind != COMPUTING:
            config = replace(config, hosts=tuple(stack.enter_context(hosts(config.workers, config.mbit))))
        figures = run_workers(train, replace(config, port=free_port()), config.workers, timeout=1200)
    if len({f.digest for f in figures}) != 1:
        sys.exit(f"The digests differ: {figures}")
    row: dict[str, Any] = {"kind": config.kind, "workers": config.workers, "version": figures[0].version}
    if config.kind == COMPUTING:
        total = sum(f.process_seconds for f in figures)
        return row | {"exchange_cpu": 1 - sum(f.training_seconds for f in figures) / total, "cpu_seconds": total}
    parameters = sum(p.numel() for p in make_net().parameters())
    predicted = plan(
        parameters,
        [1 / STEP_SECONDS] * config.workers,
        network=Network(bandwidth=_TAKEN_FOR_PAYLOAD * config.mbit * 1e6 / 8),
        **config.settings,
    )
    deltas = figures[0].version
    return row | {
        "sent": sum(f.bytes_sent for f in figures) / deltas / (4 * parameters),
        "steps_per_round": figures[0].round_steps,
        "predicted_steps_per_round": predicted.round_steps,
    }


def describe(row: dict[str, Any]) -> str:
    head = f"{row['workers']:3d} workers  {row['kind']:<10}"
    if row["kind"] == COMPUTING:
        return f"{head} exchange {row['exchange_cpu']:.1%} of {row['cpu_seconds']:.0f} s of CPU time"
    real, predicted = row["steps_per_round"], row["predicted_steps_per_round"]
    return (
        f"{head} sent {row['sent']:.3f} of fp32, steps per round {real:.2f}, predicted {predicted:.2f} "
        f"({predicted / real:.3f})"
    )


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    sent, stretch = figure.subplots(1, 2)
    for codec, color in zip(CODECS, ("#4477aa", "#228833", "#ee6677", "#ccbb44"), strict=True):
        of_codec = [row for row in rows if row["kind"] == codec]
        if of_codec:
            workers = [row["workers"] for row in of_codec]
            sent.plot(workers, [row["sent"] for row in of_codec], "o-", color=color, label=codec)
            real = [row["steps_per_round"] / LOCAL_STEPS for row in of_codec]
            stretch.plot(workers, real, "o-", color=color, label=codec)
            predicted = [row["predicted_steps_per_round"] / LOCAL_STEPS for row in of_codec]
            stretch.plot(workers, predicted, "x--", color=color, alpha=0.6)
    sent.set(title="bytes sent per delta, over fp32", xlabel="workers", ylim=(0, 2.2))
    stretch.set(title="local steps per round over H (dashed: predicted)", xlabel="workers")
    for axes in (sent, stretch):
        axes.set_xscale("log", base=2)
        axes.set_xticks(WORKERS, [str(number) for number in WORKERS])
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--workers", nargs="+", type=int, default=list(WORKERS))
    parser.add_argument("--kinds", nargs="+", choices=(*CODECS, COMPUTING), default=[*CODECS, COMPUTING])
    parser.add_argument("--rounds", type=int, default=12, help="per worker")
    parser.add_argument("--mbit", type=float, default=25.0, help="of every link in limited runs")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for JSON and PNG")
    args = parser.parse_args()
    rows = []
    for workers in args.workers:
        for kind in args.kinds:
            rounds = args.rounds * (2 if kind == "fp32" else 1)  # its rounds get longer
            rows.append(measure(Config(kind, workers, rounds, args.mbit)))
            print(describe(rows[-1]), flush=True)
    report = {"mbit": args.mbit, "rounds": args.rounds, "environment": environment(), "settings": rows}
    (args.output / "scaling_up.json").write_text(json.dumps(report, indent=2) + "\n")
    draw(rows, args.output / "scaling_up.png")


if __name__ == "__main__":
    main()
