"""The predictions of `plan`, against real runs of four workers.

    python benchmarks/plan.py              # step times and speeds, over the loopback interface
    python benchmarks/plan.py --limited    # also with slow links; needs root

Four real workers train with the strategy, their devices simulated as in throughput.py. Two step times of the fastest
worker, two distributions of speeds; with slow links (network namespaces joined by a switch, `tc tbf`) with and without
overlap. The figure is predicted over real throughput: local steps of all workers per second, from the first step of any
to the last step of any. The prediction knows the number of parameters, the rate of the links, and the step time of each
worker that trains alone. That is measured just before, with all four workers at the same time, because they share two
cores. `ratio_nominal` uses the nominal step times of the devices instead.
"""

import argparse
import json
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
from torch.utils.data import DataLoader

from _devices import TOY_SECONDS_PER_STEP, SimulatedDevice
from _links import INTERFACE, Host, hosts
from _workers import run_workers
from lightning_async_localsgd import AsyncLocalSGDStrategy
from lightning_async_localsgd.simulation import Network, Plan, plan
from throughput import WORKERS, Batches, Classifier, environment, make_trainer, quiet

RESULT = Path(__file__).parent / "results" / "plan.json"
SPEEDS = {
    "very unequal": [seconds / TOY_SECONDS_PER_STEP[0] for seconds in TOY_SECONDS_PER_STEP],
    "a little unequal": [1.0, 1.1, 1.3, 1.6],
}
"""Step times of the workers, over the fastest worker's."""
FASTEST = (0.02, 0.06)
"""Seconds per step of the fastest worker."""


@dataclass(frozen=True)
class Config:
    """One setting; times in seconds."""

    distribution: str
    fastest: float
    local_steps: int
    seconds: float
    overlap: bool = True
    mbit: float | None = None
    """Rate of each worker's link; None: the loopback interface, which is no limit here."""
    hosts: tuple[Host, ...] = ()
    measured: tuple[float, ...] = ()
    """Step time of each worker alone."""

    @property
    def step_seconds(self) -> list[float]:
        return [relative * self.fastest for relative in SPEEDS[self.distribution]]

    @property
    def network(self) -> Network:
        return Network() if self.mbit is None else Network(bandwidth=self.mbit * 1e6 / 8)

    @property
    def settings(self) -> dict[str, Any]:
        return {"local_steps": self.local_steps, "overlap": self.overlap}


@dataclass(frozen=True)
class WorkerTimes:
    """Times of one worker, on the clock shared by all processes."""

    begin: float
    end: float
    steps: int
    late_steps: int
    blocked_seconds: float
    bytes_sent: int
    version: int
    mean_staleness: float


def train_alone(rank: int, config: Config) -> float:
    """Train for a while without the others; returns the seconds per step."""
    quiet()
    device = SimulatedDevice(config.step_seconds[rank])
    trainer = make_trainer("auto", max(10, round(config.seconds / config.step_seconds[rank])), [device])
    trainer.fit(Classifier(), DataLoader(Batches(), batch_size=None))
    return (device.end - device.begin) / device.steps


def train(rank: int, config: Config) -> WorkerTimes:
    """Train as worker ``rank``."""
    if config.hosts:
        config.hosts[rank].enter()
        os.environ.update(MASTER_ADDR=config.hosts[0].address, GLOO_SOCKET_IFNAME=INTERFACE)
    quiet()
    L.seed_everything(0, verbose=False)
    device = SimulatedDevice(config.step_seconds[rank])
    strategy = AsyncLocalSGDStrategy(**config.settings)
    together = predict(config, config.step_seconds).steps_per_second * config.seconds
    max_steps = max(config.local_steps, round(together / WORKERS))
    trainer = make_trainer(strategy, max_steps, [device])
    trainer.fit(Classifier(), DataLoader(Batches(), batch_size=None))
    summary = strategy.summary
    return WorkerTimes(
        device.begin,
        device.end,
        device.steps,
        device.late_steps,
        summary.blocked_seconds,
        summary.bytes_sent,
        summary.version,
        summary.mean_staleness,
    )


def predict(config: Config, step_seconds: Sequence[float]) -> Plan:
    """The plan of this setting."""
    parameters = sum(p.numel() for p in Classifier().parameters())
    speeds = [1 / seconds for seconds in step_seconds]
    return plan(parameters, speeds, network=config.network, **config.settings)


def compare(config: Config) -> dict[str, Any]:
    """Run one setting; returns prediction and measurement."""
    predicted, nominal = predict(config, config.measured), predict(config, config.step_seconds)
    with ExitStack() as stack:
        if config.mbit is not None:
            config = replace(config, hosts=tuple(stack.enter_context(hosts(WORKERS, config.mbit))))
        times = run_workers(train, config, WORKERS)
    seconds = max(t.end for t in times) - min(t.begin for t in times)
    possible = sum(1 / step for step in config.measured)
    real = sum(t.steps for t in times) / seconds
    return {
        "distribution": config.distribution,
        "step_seconds": config.step_seconds,
        "step_seconds_alone": config.measured,
        "local_steps": config.local_steps,
        "overlap": config.overlap,
        "mbit": config.mbit,
        "seconds": seconds,
        "ratio": predicted.steps_per_second / real,
        "ratio_nominal": nominal.steps_per_second / real,
        "steps_per_second": {"predicted": predicted.steps_per_second, "real": real},
        "utilization": {"predicted": predicted.utilization, "real": real / possible},
        "mean_staleness": {"predicted": predicted.mean_staleness, "real": times[0].mean_staleness},
        "bytes_sent_per_round": {
            "predicted": predicted.bytes_per_round,
            "real": sum(t.bytes_sent for t in times) / times[0].version,
        },
        "local_steps_per_round": {
            "predicted": predicted.steps_per_second * predicted.round_seconds / WORKERS,
            "real": sum(t.steps for t in times) / times[0].version,
        },
        "blocked_seconds": [t.blocked_seconds for t in times],
        "late_steps": sum(t.late_steps for t in times),
    }


def describe(row: dict[str, Any]) -> str:
    link = "loopback" if row["mbit"] is None else f"{row['mbit']:g} Mbit/s"
    overlap = "overlap" if row["overlap"] else "no overlap"
    figures = (
        f"{name} {row[key]['predicted']:.4g} / {row[key]['real']:.4g}"
        for name, key in (
            ("steps/s", "steps_per_second"),
            ("utilization", "utilization"),
            ("staleness", "mean_staleness"),
            ("steps/round", "local_steps_per_round"),
        )
    )
    times = f"{row['distribution']}, {row['step_seconds'][0] * 1e3:g} ms, {link}, {overlap}"
    ratios = f"ratio {row['ratio']:.3f} (nominal {row['ratio_nominal']:.3f})"
    return f"{times}: {ratios}; predicted / real: {', '.join(figures)}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=45.0, help="about how long each setting trains")
    parser.add_argument("--alone-seconds", type=float, default=15.0, help="about how long each worker trains alone")
    parser.add_argument("--local-steps", type=int, default=20, help="H, local steps per round of the fastest worker")
    parser.add_argument("--limited", action="store_true", help="also over slow links")
    parser.add_argument("--only-limited", action="store_true", help="only over slow links")
    parser.add_argument("--mbit", type=float, default=200.0, help="rate of the slow links, Mbit/s")
    parser.add_argument("--output", type=Path, default=RESULT, help="JSON file")
    args = parser.parse_args()
    configs = []
    if not args.only_limited:
        configs = [Config(name, fast, args.local_steps, args.seconds) for name in SPEEDS for fast in FASTEST]
    if args.limited or args.only_limited:
        configs += [
            Config(next(iter(SPEEDS)), fast, args.local_steps, args.seconds, overlap, args.mbit)
            for fast in FASTEST
            for overlap in (True, False)
        ]
    rows = []
    for config in configs:
        alone = run_workers(train_alone, replace(config, seconds=args.alone_seconds), WORKERS)
        rows.append(compare(replace(config, measured=tuple(alone))))
        print(describe(rows[-1]), flush=True)
    parameters = sum(p.numel() for p in Classifier().parameters())
    report = {"parameters": parameters, "environment": environment(), "settings": rows}
    args.output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"\nwritten: {args.output}")


if __name__ == "__main__":
    main()
