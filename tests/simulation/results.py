"""Results made by hand, of runs whose every number is known: workers that never wait, or wait for the slowest."""

from __future__ import annotations

from math import exp

import torch

from lightning_async_localsgd.simulation.result import (
    Evaluation,
    LossPoint,
    SimulatedRound,
    SimulatedUpdate,
    SimulatedWait,
    SimulationResult,
)


def make_result(speeds: tuple[float, ...] = (2.0, 1.0), rounds: int = 3, wait: float = 0.5) -> SimulationResult:
    """Every worker makes ``rounds`` rounds of equally many local steps, the slowest 10 seconds each, and then waits.

    Args:
        speeds: local steps per second of each worker.
        rounds: of each worker.
        wait: seconds after each round.
    """
    span = 10 * min(speeds)  # local steps of the slowest
    made = sorted(
        (
            SimulatedRound(
                worker,
                index,
                begin=index * (length + wait),
                end=index * (length + wait) + length,
                local_steps=round(span),
                adopted=(index + 1) * (length + wait),
            )
            for worker, speed in enumerate(speeds)
            for length in [span / speed]
            for index in range(rounds)
        ),
        key=lambda round_: (round_.end, round_.worker),
    )
    updates, losses, evaluations, starts = [], [], [Evaluation(0.0, 0, 0, {"val_loss": 4.5, "accuracy": 0.1})], {}
    for version, round_ in enumerate(made, start=1):
        steps = sum(earlier.local_steps for earlier in made[:version])
        staleness = version - 1 - starts.get(round_.worker, 0)
        starts[round_.worker] = version
        updates.append(
            SimulatedUpdate(
                round_.adopted,
                version,
                round_.worker,
                round_.round,
                round_.local_steps,
                8 * round_.local_steps,
                staleness,
            )
        )
        losses.append(LossPoint(round_.end, steps, round_.worker, 1 + 3.5 * exp(-steps / 400) + 0.05 * (-1) ** version))
        if version % max(1, len(made) // 10) == 0:
            metrics = {"val_loss": 1.1 + 3.4 * exp(-steps / 400), "accuracy": 0.5}
            evaluations.append(Evaluation(round_.adopted, version, steps, metrics))
    everyone = range(len(speeds))
    return SimulationResult(
        workers=len(speeds),
        settings={"local_steps": round(span), "bandwidth": float("inf")},
        seconds=max(round_.adopted for round_ in made),
        local_steps=tuple(sum(r.local_steps for r in made if r.worker == worker) for worker in everyone),
        version=len(made),
        updates=updates,
        losses=losses,
        evaluations=evaluations,
        rounds=made,
        present_seconds=(max(round_.adopted for round_ in made),) * len(speeds),
        busy_seconds=tuple(sum(r.end - r.begin for r in made if r.worker == worker) for worker in everyone),
        waits=[SimulatedWait(r.worker, r.end, r.adopted) for r in made],
        waiting_seconds=(rounds * wait,) * len(speeds),
        bytes_sent=(1_500_000,) * len(speeds),
        bytes_received=(3_000_000,) * len(speeds),
        mean_staleness=sum(update.staleness for update in updates) / len(updates),
        max_staleness=max(update.staleness for update in updates),
        dropped=(0,) * len(speeds),
        digest="0123456789abcdef",
        state_dict={"weight": torch.zeros(2)},
    )
