"""Planning: what a setting costs in time, traffic and memory, on the timeline of a run whose workers learn nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning_async_localsgd.codecs import Codec
from lightning_async_localsgd.protocol.pace import FixedPace, make_pace
from lightning_async_localsgd.settings import Settings
from lightning_async_localsgd.simulation.costs import MEMORY_BANDWIDTH, Costs, memory_bytes
from lightning_async_localsgd.simulation.devices import NoisyDevice, VirtualWorker, make_workers
from lightning_async_localsgd.simulation.measured_run import ROUNDS, MeasuredRun
from lightning_async_localsgd.simulation.network import Network

__all__ = ["TARGET", "Plan", "plan"]

TARGET = 0.99
"""The utilization that a recommended setting reaches."""

# Local steps that are simulated; of longer plans several are simulated as one.
_MOST_STEPS = 50_000
_MOST_STEPS_PER_WORKER = 200  # where this is more
_LONGEST_ROUND = 1.15  # over H: the pace lets rounds be a tenth longer, and one step at least


@dataclass(frozen=True)
class Plan:
    """What a setting costs once the run is in full swing. Times in seconds, traffic and memory in bytes."""

    parameters: int
    workers: int
    local_steps: int
    """H, as asked for."""
    codec: str
    fragments: int
    """Parts of the model that are exchanged one after the other in a round."""
    overlap: bool
    utilization: float
    """Local steps made over those that the devices could make, between 0 and 1."""
    steps_per_second: float
    """Local steps of all workers together."""
    round_seconds: float
    """Mean time from round to round of a worker."""
    round_steps: float
    """Mean local steps per round of the fastest worker: more than H where rounds wait for the exchange before them."""
    exposed_seconds: tuple[float, ...]
    """Per round, of each worker: how long its training thread makes no step but waits or copies."""
    exchange_seconds: float
    """Mean time from a push until its worker can go on from the new global parameters."""
    steps_in_flight: float
    """Local steps that the fastest worker makes meanwhile; 0 without overlap."""
    sent_per_round: tuple[float, ...]
    """Of each worker."""
    received_per_round: tuple[float, ...]
    """Of each worker."""
    link_load: float
    """Bytes per second through the busiest worker's link in its busier direction, on average."""
    link_need: float
    """Bytes per second of each worker's link at which the exchange of all workers' deltas takes no longer than a round
    of H steps; without overlap no longer than 1% of it. Infinite if it takes longer even so."""
    memory: int
    """Host memory of each worker beside its module and inner optimizer."""
    mean_staleness: float
    max_staleness: int
    rounds: int
    """Rounds of all workers that this was measured over."""

    @property
    def bytes_per_round(self) -> float:
        """Sent by a worker per round, on average; together all receive as much as all send."""
        return sum(self.sent_per_round) / self.workers

    @property
    def bytes_per_1000_steps(self) -> float:
        """Sent by a worker while all together make 1000 local steps each, on average."""
        return self.bytes_per_round / self.round_seconds * 1000 * self.workers / self.steps_per_second

    @property
    def keeps_rounds(self) -> bool:
        """Whether rounds are as long as asked for.

        With overlap nobody waits for a network that is too slow: rounds get longer instead, as if H were larger.
        """
        return self.round_steps <= _LONGEST_ROUND * self.local_steps

    @property
    def reaches_target(self) -> bool:
        """Whether 99% of the devices' time is used, by rounds of H steps."""
        return self.utilization >= TARGET and self.keeps_rounds

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values; infinity as None."""
        names = ("bytes_per_round", "bytes_per_1000_steps", "keeps_rounds", "reaches_target")
        values = {**vars(self), **{name: getattr(self, name) for name in names}}
        return {name: None if value == math.inf else value for name, value in values.items()}


def plan(
    parameters: int,
    workers: Sequence[float],
    *,
    local_steps: int = 50,
    network: Network | None = None,
    noise: float = 0.0,
    memory_bandwidth: float = MEMORY_BANDWIDTH,
    seed: int = 0,
    **settings: Any,
) -> Plan:
    """Predict what a setting costs, without training: six rounds of every worker, after four to fall in step.

    At most some 50,000 local steps are simulated, or 200 of each worker if that is more. Where a plan needs more (many
    workers, or a network that takes very long), several are simulated as one.

    Example::

        plan(125_000_000, [2.0, 2.0, 1.0, 0.5], network=Network(bandwidth=12.5e6), local_steps=50, codec="bf16")

    Args:
        parameters: trainable parameters (and float buffers) of the model.
        workers: speed of each worker in local steps per second.
        local_steps: H, a number.
        network: between them; None: messages take no time.
        noise: deviation of step times, as a part of them.
        memory_bandwidth: bytes per second of one thread, for copies and outer updates.
        seed: of the noise.
        **settings: further fields of :class:`~lightning_async_localsgd.Settings`.

    Raises:
        ValueError: if an argument is outside its range.
    """
    network = network or Network()
    if not isinstance(local_steps, int):
        raise ValueError(f"`local_steps` must be a number to plan with, got {local_steps!r}.")
    chosen = Settings(local_steps=local_steps, **settings)
    _check(parameters, workers, network, noise, memory_bandwidth, chosen)
    costs = Costs(parameters, chosen, memory_bandwidth)
    at_once = _steps_at_once(workers, chosen, costs.exchange_seconds(network, len(workers), _widest(chosen)))
    run = MeasuredRun(
        [_make_worker(speed / at_once, noise / math.sqrt(at_once)) for speed in workers],
        replace(chosen, local_steps=max(chosen.fragments, round(local_steps / at_once))),
        network,
        costs,
        seed,
    )
    return _evaluate(run, workers, chosen, network, costs, at_once)


def _make_worker(speed: float, noise: float) -> VirtualWorker:
    return VirtualWorker(NoisyDevice(speed, noise) if noise else speed)


def _number(settings: Settings) -> int:
    """H, which is a number in a plan."""
    assert isinstance(settings.local_steps, int)
    return settings.local_steps


def _steps_at_once(speeds: Sequence[float], settings: Settings, exchange: float) -> float:
    """Local steps to simulate as one, so that there are not too many."""
    slowest = min(speeds) if isinstance(make_pace(settings.pace), FixedPace) else max(speeds)
    seconds = _number(settings) / slowest
    if settings.overlap:  # training goes on meanwhile
        seconds = max(seconds, settings.fragments * exchange)
    steps = ROUNDS * sum(speeds) * seconds
    most = max(_MOST_STEPS, _MOST_STEPS_PER_WORKER * len(speeds))
    if steps <= most:
        return 1.0
    at_once = steps / most
    if settings.fragments > 1:  # each is pushed in a step of its own
        at_once = min(at_once, _number(settings) / settings.fragments)
    simulated = max(1, math.floor(_number(settings) / at_once))
    return max(at_once, _number(settings) / simulated)


def _evaluate(
    run: MeasuredRun, speeds: Sequence[float], settings: Settings, network: Network, costs: Costs, at_once: float
) -> Plan:
    first, last = run.run()
    seconds = last.time - first.time
    parts = settings.fragments
    rounds = [(after - before) / parts for before, after in zip(first.pushes, last.pushes, strict=True)]
    waited = [after - before for before, after in zip(first.waited, last.waited, strict=True)]
    # Copies come on top: the timeline's workers make none.
    trained = [(seconds - w) / (seconds + n * costs.copies) for w, n in zip(waited, rounds, strict=True)]
    per_second = sum(v * part for v, part in zip(speeds, trained, strict=True))
    sent, received = (
        [(after - before) / n for before, after, n in zip(*counts, rounds, strict=True)]
        for counts in ((first.sent, last.sent), (first.received, last.received))
    )
    fastest = max(range(len(speeds)), key=lambda worker: speeds[worker])
    of_fastest = [r.local_steps for r in run.finished_rounds if r.worker == fastest]
    in_flight = [r.adopted - r.end for r in run.finished_rounds]
    exchange = sum(in_flight) / len(in_flight)
    return Plan(
        parameters=sum(costs.delta.elements),
        workers=len(speeds),
        local_steps=_number(settings),
        codec=run.codec,
        fragments=parts,
        overlap=settings.overlap,
        utilization=per_second / sum(speeds),
        steps_per_second=per_second,
        round_seconds=seconds * len(speeds) / sum(rounds) + costs.copies,
        round_steps=parts * at_once * sum(of_fastest) / len(of_fastest),
        exposed_seconds=tuple(w / n + costs.copies for w, n in zip(waited, rounds, strict=True)),
        exchange_seconds=exchange,
        steps_in_flight=exchange * speeds[fastest] if settings.overlap else 0.0,
        sent_per_round=tuple(sent),
        received_per_round=tuple(received),
        link_load=max(n * max(s, r) for n, s, r in zip(rounds, sent, received, strict=True)) / seconds,
        link_need=_link_need(speeds, settings, network, costs),
        memory=memory_bytes(sum(costs.delta.elements), settings, len(speeds), settings.codecs()[run.codec]),
        mean_staleness=sum(run.stalenesses) / len(run.stalenesses),
        max_staleness=max(run.stalenesses),
        rounds=round(sum(rounds)),
    )


def _link_need(speeds: Sequence[float], settings: Settings, network: Network, costs: Costs) -> float:
    if settings.lockstep(len(speeds)):
        seconds = _number(settings) / min(speeds)
    elif isinstance(make_pace(settings.pace), FixedPace):
        seconds = _number(settings) * len(speeds) / sum(speeds)  # in which there are as many rounds as workers
    else:
        seconds = _number(settings) / max(speeds)
    allowed = seconds if settings.overlap else (1 - TARGET) * seconds
    codec = list(settings.codecs().values())[-1]
    parts = settings.fragments
    rest = allowed - parts * costs.exchange_seconds(replace(network, bandwidth=math.inf), len(speeds), codec)
    links = Network(bandwidth=1.0)
    load = costs.sent_seconds(links, len(speeds), codec) + links.header_seconds(range(len(speeds)))
    return parts * load / rest if rest > 0 else math.inf


def _widest(settings: Settings) -> Codec:
    return next(iter(settings.codecs().values()))


def _check(
    parameters: int,
    workers: Sequence[float],
    network: Network,
    noise: float,
    memory_bandwidth: float,
    settings: Settings,
) -> None:
    if parameters < 1:
        raise ValueError(f"`parameters` must be at least 1, got {parameters}.")
    if not memory_bandwidth > 0:
        raise ValueError(f"`memory_bandwidth` must be positive (bytes per second), got {memory_bandwidth}.")
    make_workers([_make_worker(speed, noise) for speed in workers])
    network.check_workers(len(workers))
    settings.check_workers(len(workers))
