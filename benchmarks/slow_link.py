"""Four workers on hosts of their own, joined by slow links: throughput and rounds of each codec, beside its peers.

    python benchmarks/slow_link.py             # needs root: network namespaces and tc
    python benchmarks/slow_link.py --quick     # one rate, two modes, short

The model is so large that at the middle rate its fp32 delta needs two rounds to be sent once. Each worker's step takes
the same simulated time, so long that two cores compute the steps and exchanges of all four with time to spare. Per rate
and mode:

- throughput: local steps of all workers per second, over the sum of what each makes alone, measured in the same run,
  from a fifth of the time to seven tenths: neither the start nor the end, when all wait for each other, is in it;
- stretch: local steps per round over H (a round cannot end before the exchange of the one before it has);
- blocked: the part of the time in which the training thread waits for the exchange or copies for it;
- sent: bytes that a worker sends per round, over the size of its fp32 delta.

``--slow-worker`` gives the last worker a link of a tenth and looks at the others.
"""

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import DDPStrategy
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from _devices import SimulatedDevice
from _links import INTERFACE, Host, hosts
from _workers import run_workers
from lightning_async_localsgd import AsyncLocalSGDStrategy
from throughput import environment, make_trainer, quiet

RESULTS = Path(__file__).parent / "results"
WORKERS = 4
ALONE, DDP, TORCHFT = "alone", "Lightning DDP", "torchft DiLoCo"
GATHER = "gather fp32"
CODECS = ("fp32", "bf16", "int8", "int4", "e3m0", "topk", "auto")
RATES = (250.0, 25.0, 5.0)
WIDTH, BLOCKS = 512, 12  # 3.2M parameters: 12.6 MB in fp32, 4 s at 25 Mbit/s
FRAGMENTED = "auto, 4 fragments"
MODES = (GATHER, *CODECS, FRAGMENTED, DDP, TORCHFT)
TENTH = 0.1


@dataclass(frozen=True)
class Config:
    """One setting; times in seconds."""

    mode: str
    mbit: float
    step_seconds: float
    local_steps: int
    seconds: float
    slow_worker: bool = False
    hosts: tuple[Host, ...] = ()

    @property
    def steps(self) -> int:
        if self.mode == DDP:  # each step waits for the network
            return 8
        rounds = max(2, round(self.seconds / self.step_seconds / self.local_steps))
        if self.mode == TORCHFT:
            rounds = min(rounds, 4)
        return rounds * self.local_steps

    @property
    def rates(self) -> list[float]:
        slow = TENTH if self.slow_worker else 1.0
        return [self.mbit] * (WORKERS - 1) + [self.mbit * slow]


@dataclass(frozen=True)
class WorkerFigures:
    """How one worker fared; times on the clock that all processes share."""

    begin: float
    end: float
    steps: int
    times: tuple[float, ...] = ()
    """When each step ended."""
    rounds: float = 0.0
    blocked_seconds: float = 0.0
    bytes_sent: int = 0
    codec: str = ""


class Recorder(SimulatedDevice):
    """Keeps the time of each step's end."""

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.times: list[float] = []

    def _fill_up(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        super()._fill_up(optimizer, args, kwargs)
        self.times.append(self.end)


class SmallBatches(IterableDataset[tuple[Tensor, Tensor]]):
    """Endless random batches, so small that two cores compute the steps of four workers and have time to spare."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield torch.randn(4, WIDTH), torch.randint(4, (4,))


class DeepClassifier(L.LightningModule):
    """``BLOCKS`` residual layers of ``WIDTH`` units."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(BLOCKS))
        self.head = nn.Linear(WIDTH, 4)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        for block in self.blocks:
            x = x + F.relu(block(x)) / BLOCKS
        return F.cross_entropy(self.head(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)  # computes little: two cores have to do for four workers


def parameters() -> int:
    return sum(p.numel() for p in DeepClassifier().parameters())


def make_strategy(config: Config) -> Any:
    if config.mode == DDP:
        return DDPStrategy(process_group_backend="gloo")
    if config.mode in (ALONE, TORCHFT):
        return "auto"
    settings: dict[str, Any] = {"codec": config.mode}
    if config.mode == GATHER:
        settings = {"codec": "fp32", "exchange": "gather"}
    elif config.mode == FRAGMENTED:
        settings = {"codec": "auto", "fragments": 4}
    return AsyncLocalSGDStrategy(local_steps=config.local_steps, **settings)


def train(rank: int, config: Config) -> WorkerFigures:
    """Train in one mode, as worker ``rank``."""
    if config.hosts:
        config.hosts[rank].enter()
        os.environ.update(MASTER_ADDR=config.hosts[0].address, GLOO_SOCKET_IFNAME=INTERFACE)
    quiet()
    L.seed_everything(0, verbose=False)
    device = Recorder(config.step_seconds)
    callbacks: list[L.Callback] = [device]
    if config.mode == TORCHFT:
        from _torchft import TorchftDiLoCo

        callbacks.append(TorchftDiLoCo(rank, WORKERS, config.local_steps, config.hosts[rank].address))
    strategy = make_strategy(config)
    trainer = make_trainer(strategy, config.steps, callbacks)
    trainer.fit(DeepClassifier(), DataLoader(SmallBatches(), batch_size=None))
    figures = WorkerFigures(device.begin, device.end, device.steps, tuple(device.times))
    summary = getattr(strategy, "summary", None)
    if summary is None:
        return figures
    return replace(
        figures,
        rounds=summary.version / WORKERS / (4 if config.mode == FRAGMENTED else 1),
        blocked_seconds=summary.blocked_seconds,
        bytes_sent=summary.bytes_sent,
        codec=summary.codec,
    )


def measure(config: Config, alone: Sequence[float]) -> dict[str, Any]:
    """Run one mode on hosts of their own; ``alone`` is what each worker makes per second without the others."""
    with hosts(WORKERS, config.rates) as made:
        figures = run_workers(train, replace(config, hosts=tuple(made)), WORKERS, timeout=1200)
    seconds = max(f.end for f in figures) - min(f.begin for f in figures)
    per_second = in_full_swing(figures)
    row = {
        "mode": config.mode,
        "mbit": config.mbit,
        "slow_worker": config.slow_worker,
        "seconds": seconds,
        "throughput": sum(per_second) / sum(alone),
        "throughput_per_worker": [own / reference for own, reference in zip(per_second, alone, strict=True)],
        "steps": [f.steps for f in figures],
    }
    if figures[0].rounds:
        rounds = figures[0].rounds
        row |= {
            "stretch": sum(f.steps for f in figures) / WORKERS / rounds / config.local_steps,
            "blocked": max(f.blocked_seconds for f in figures) / seconds,
            "sent": sum(f.bytes_sent for f in figures) / WORKERS / rounds / (4 * parameters()),
            "codec": figures[0].codec,
        }
    return row


def in_full_swing(figures: Sequence[WorkerFigures]) -> list[float]:
    """Local steps per second of each worker, from a fifth of the run to seven tenths of it."""
    begin, end = min(f.begin for f in figures), max(f.end for f in figures)
    first, last = begin + 0.2 * (end - begin), begin + 0.7 * (end - begin)
    return [sum(first < time <= last for time in f.times) / (last - first) for f in figures]


def measure_alone(config: Config) -> list[float]:
    """Local steps per second of each worker without the others, all at the same time."""
    return in_full_swing(run_workers(train, replace(config, mode=ALONE, hosts=()), WORKERS))


def describe(row: dict[str, Any]) -> str:
    text = f"{row['mbit']:6g} Mbit/s  {row['mode']:16} throughput {row['throughput']:.3f}"
    if "stretch" in row:
        text += f"  stretch {row['stretch']:.2f}  blocked {row['blocked']:.2%}  sent {row['sent']:.3f} of fp32"
        text += f"  ({row['codec']})" if row["mode"] in ("auto", FRAGMENTED) else ""
    if row["slow_worker"]:
        text += "  per worker " + ", ".join(f"{value:.3f}" for value in row["throughput_per_worker"])
    return text


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Throughput and stretch of each mode, by rate."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    rates = sorted({row["mbit"] for row in rows}, reverse=True)
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    width = 0.8 / len(modes)
    for i, mode in enumerate(modes):
        for axes, name in ((left, "throughput"), (right, "stretch")):
            points = [(rates.index(row["mbit"]), row[name]) for row in rows if row["mode"] == mode and name in row]
            if points:
                axes.bar(
                    [x + (i - len(modes) / 2) * width for x, _ in points], [y for _, y in points], width, label=mode
                )
    for axes, title in (
        (left, "local steps per second over those of the workers alone"),
        (right, "steps per round over H"),
    ):
        axes.set_xticks(range(len(rates)), [f"{rate:g} Mbit/s" for rate in rates])
        axes.axhline(1.0, color="black", linewidth=0.8, linestyle=":", zorder=0)
        axes.set_title(title, loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    right.set_yscale("log")
    left.legend(frameon=False, fontsize=8, ncols=3, loc="upper right", bbox_to_anchor=(1.0, -0.08))
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES), metavar="MBIT", help="of every link")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), metavar="MODE", help=str(MODES))
    parser.add_argument("--step-seconds", type=float, default=0.2, help="of every worker")
    parser.add_argument("--local-steps", type=int, default=10, help="H")
    parser.add_argument("--seconds", type=float, default=50.0, help="about how long a worker trains without a network")
    parser.add_argument("--slow-worker", action="store_true", help="give the last worker a link of a tenth")
    parser.add_argument("--quick", action="store_true", help="a smoke run; writes nothing")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for JSON and PNG")
    args = parser.parse_args()
    if args.quick:
        args.rates, args.modes, args.seconds = [100.0], [GATHER, "int4"], 4.0
    config = Config(ALONE, 0.0, args.step_seconds, args.local_steps, args.seconds)
    alone = measure_alone(config)
    rows = []
    for mbit in args.rates:
        for mode in args.modes:
            rows.append(measure(replace(config, mode=mode, mbit=mbit, slow_worker=args.slow_worker), alone))
            print(describe(rows[-1]), flush=True)
    if args.quick:
        return
    name = "slow_worker" if args.slow_worker else "slow_link"
    report = {
        "parameters": parameters(),
        "step_seconds": args.step_seconds,
        "local_steps": args.local_steps,
        "environment": environment(),
        "steps_per_second_alone": alone,
        "rows": rows,
    }
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n")
    draw(rows, args.output / f"{name}.png")


if __name__ == "__main__":
    main()
