"""Planning: what a setting costs in time, traffic and memory, on the timeline of a run whose workers learn nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_async_localsgd.codecs import codecs_by_name, make_codec
from lightning_async_localsgd.exchange.transport import CHUNK
from lightning_async_localsgd.outer import Arrival, DelayedNesterov, default_outer_optimizer
from lightning_async_localsgd.protocol.header import Header
from lightning_async_localsgd.protocol.pace import FixedPace, make_pace
from lightning_async_localsgd.protocol.progress import OuterUpdate, Progress
from lightning_async_localsgd.protocol.rounds import Rounds
from lightning_async_localsgd.settings import Settings
from lightning_async_localsgd.simulation.devices import NoisyDevice, VirtualWorker, make_workers
from lightning_async_localsgd.simulation.network import Network
from lightning_async_localsgd.simulation.timeline import FinishedRound, Learned, Timeline

__all__ = ["LOCAL_STEPS", "MEMORY_BANDWIDTH", "TARGET", "Plan", "Recommendation", "memory_bytes", "plan", "recommend"]

TARGET = 0.99
"""The utilization that a recommended setting reaches."""
LOCAL_STEPS = (10, 20, 50, 100, 200, 500)
"""The H that :func:`recommend` tries."""
MEMORY_BANDWIDTH = 10e9
"""Bytes per second that one thread of a host reads and writes, unless given: that of an ordinary, busy server."""

_WARM_UP_ROUNDS = 4  # of every worker, in which unequal ones fall in step
_MEASURED_ROUNDS = 6
# Local steps that are simulated; of longer plans several are simulated as one.
_MOST_STEPS = 50_000
_MOST_STEPS_PER_WORKER = 200  # where this is more
_LONGEST_ROUND = 1.15  # over H: the pace lets rounds be a tenth longer, and one step at least

# How often 4 bytes per parameter are read from memory or written to it.
_PUSH_STREAMS = 2  # training thread: a copy of the parameters
_ADOPT_STREAMS = 3  # training thread: parameters += correction
_OWN_STREAMS = 10  # exchange thread, per turn: the delta, whether it is finite, the checksum, what is adopted
_RECEIVE_STREAMS = 2  # from the socket to where it is used
_ADD_STREAMS = 3  # with a quorum, each delta to the sum of those before
_UPDATE_STREAMS = 7  # delayed Nesterov's step; other optimizers are about the same


# ---- what comes of a setting -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What a setting costs once the run is in full swing. Times in seconds, traffic and memory in bytes."""

    parameters: int
    workers: int
    local_steps: int
    """H, as asked for."""
    codec: str
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
    """Mean time from the end of a round until its worker can go on from the new global parameters."""
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
    costs = _Costs(parameters, chosen, memory_bandwidth)
    exchange = costs.exchange_seconds(network, len(workers))
    at_once = _steps_at_once(workers, chosen, exchange)
    recorder = _Recorder(len(workers))
    state = _Versions()
    timeline = Timeline(
        [_make_worker(speed / at_once, noise / math.sqrt(at_once)) for speed in workers],
        10**12,  # far off: planned is the middle of a run
        replace(chosen, local_steps=max(1, round(local_steps / at_once))),
        state,
        _Nothing(),
        recorder,
        network,
        elements=parameters,
        element_bytes=costs.element_bytes,
        update_seconds=costs.update,
        turn_seconds=costs.turn,
        seed=seed,
    )
    recorder.timeline = timeline
    timeline.run(until=lambda: recorder.last is not None)
    return _evaluate(recorder, workers, chosen, network, costs, at_once)


@dataclass(frozen=True)
class Recommendation:
    """Which H and codec to take."""

    plans: tuple[Plan, ...]
    """All that were tried: codec by codec, the least lossy first, with rising H."""
    best: Plan | None
    """The smallest H that reaches 99% utilization, with the least lossy codec that does; None if nothing does."""
    sentence: str
    """The recommendation, or what stands in its way, for people."""


def recommend(
    parameters: int, workers: Sequence[float], *, network: Network | None = None, **options: Any
) -> Recommendation:
    """Find the smallest H that reaches 99% utilization, and the least lossy codec with which it does.

    Args:
        parameters: see :func:`plan`, as all other arguments.
        workers: speed of each worker in local steps per second.
        network: between them.
        **options: further arguments of :func:`plan` but ``local_steps`` and ``codec``.

    Raises:
        ValueError: if an argument is outside its range.
    """
    network = network or Network()
    predict = partial(plan, parameters, workers, **options)
    codecs = sorted(codecs_by_name().values(), key=lambda codec: -codec.wire_dtype.itemsize)
    plans = tuple(
        predict(network=network, local_steps=steps, codec=codec.name) for codec in codecs for steps in LOCAL_STEPS
    )
    best = min((p for p in plans if p.reaches_target), key=lambda p: p.local_steps, default=None)
    if best is not None:
        return Recommendation(
            plans,
            best,
            f"Take H = {best.local_steps} with {best.codec}: {best.utilization:.1%} of the devices' time is used.",
        )
    return Recommendation(plans, None, f"No H up to {LOCAL_STEPS[-1]} reaches {TARGET:.0%}: {_limit(predict, network)}")


def memory_bytes(parameters: int, settings: Settings, workers: int) -> int:
    """Host memory that a worker needs beside its module and inner optimizer.

    Four vectors of fp32 (``base``, ``snapshot``, global parameters, pseudo-gradient), what the outer optimizer and the
    transformations keep, and the messages on their way.

    Args:
        parameters: trainable parameters and float buffers.
        settings: settings of the run.
        workers: number of workers.
    """
    plain = settings.quorum == 1 and make_codec(settings.codec).wire_dtype == torch.float32
    copies = 4 + _optimizer_copies(settings, workers)
    for transform in settings.transforms:
        copies += sum(isinstance(value, Tensor) for value in transform.init(torch.zeros(2)).values())
    if any(transform.needs_start for transform in settings.transforms):
        copies += workers  # at most: workers that are in step share one
    return 4 * parameters * copies + 4 * CHUNK * (1 if plain else 2)


# ---- the run on the timeline -----------------------------------------------------------------------------------------


class _Nothing:
    """Replicas that learn nothing; see :class:`~lightning_async_localsgd.simulation.timeline.Replicas`."""

    def join(self, worker: int) -> None: ...

    def step(self, worker: int, rounds: Rounds, progress: Progress) -> None: ...

    def push(self, worker: int) -> Learned:
        return Learned(samples=0, loss=0.0)

    def finite(self, worker: int) -> bool:
        return True

    def trade(self, groups: Sequence[Sequence[Header]]) -> Iterator[Sequence[Header]]:
        yield from groups

    def publish(self, workers: Sequence[int]) -> None: ...

    def adopt(self, worker: int, restart: bool) -> None: ...


class _Versions:
    """A global state of which there is nothing but the version."""

    def __init__(self) -> None:
        self.version = 0

    def apply(self, arrivals: Sequence[Arrival]) -> None:
        self.version += 1

    def begin_rounds(self, workers: Iterable[int]) -> None: ...

    def set_round_length(self, local_steps: int) -> None: ...


class _Moment(NamedTuple):
    """How far all workers are, each at the same time."""

    time: float
    rounds: list[int]
    waited: list[float]
    sent: list[int]
    received: list[int]


class _Recorder:
    """Notes two moments, each just after a delta was applied, and the rounds between them."""

    timeline: Timeline

    def __init__(self, size: int) -> None:
        self._rounds = [0] * size
        self.first: _Moment | None = None
        self.last: _Moment | None = None
        self.stalenesses: list[int] = []
        self.finished_rounds: list[FinishedRound] = []

    def updated(self, time: float, updates: Sequence[OuterUpdate]) -> None:
        if self.first is not None:
            self.stalenesses += [update.staleness for update in updates]

    def finished(self, rounds: Sequence[FinishedRound]) -> None:
        for round_ in rounds:
            self._rounds[round_.worker] += 1
        if self.first is not None:
            self.finished_rounds += rounds
        fewest = min(self._rounds)
        if self.first is None and fewest >= _WARM_UP_ROUNDS:
            self.first = self._moment()
        if self.last is None and fewest >= _WARM_UP_ROUNDS + _MEASURED_ROUNDS:
            self.last = self._moment()

    def _moment(self) -> _Moment:
        now, lanes = self.timeline.now, self.timeline.lanes
        return _Moment(
            now,
            list(self._rounds),
            [lane.waited_until(now) for lane in lanes],
            [lane.bytes_sent for lane in lanes],
            [lane.bytes_received for lane in lanes],
        )


class _Costs:
    """What a delta costs the threads of a worker."""

    def __init__(self, parameters: int, settings: Settings, memory_bandwidth: float) -> None:
        stream = 4 * parameters / memory_bandwidth
        together = settings.quorum * (_RECEIVE_STREAMS + _ADD_STREAMS) if settings.quorum > 1 else _RECEIVE_STREAMS
        self.parameters = parameters
        self.element_bytes = make_codec(settings.codec).wire_dtype.itemsize
        self.copies = (_PUSH_STREAMS + _ADOPT_STREAMS) * stream
        """Seconds per round for which the training thread copies."""
        self.turn = _OWN_STREAMS * stream
        """Seconds per turn for which each exchange thread is busy with its own delta."""
        self.update = (together + _UPDATE_STREAMS) * stream
        """Seconds per outer update."""
        self._quorum = settings.quorum

    def exchange_seconds(self, network: Network, workers: int) -> float:
        """Of a turn that brings every worker's delta."""
        everyone = range(workers)
        sent = network.delta_seconds(everyone, everyone, self.parameters, self.element_bytes)
        told = network.trip(everyone) + network.header_seconds(everyone)
        return told + sent + self.turn + math.ceil(workers / self._quorum) * self.update


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
        seconds = max(seconds, exchange)
    steps = (_WARM_UP_ROUNDS + _MEASURED_ROUNDS) * sum(speeds) * seconds
    most = max(_MOST_STEPS, _MOST_STEPS_PER_WORKER * len(speeds))
    if steps <= most:
        return 1.0
    at_once = steps / most
    simulated = max(1, math.floor(_number(settings) / at_once))
    return max(at_once, _number(settings) / simulated)


def _evaluate(
    recorder: _Recorder, speeds: Sequence[float], settings: Settings, network: Network, costs: _Costs, at_once: float
) -> Plan:
    first, last = recorder.first, recorder.last
    assert first is not None and last is not None
    seconds = last.time - first.time
    rounds = [after - before for before, after in zip(first.rounds, last.rounds, strict=True)]
    waited = [after - before for before, after in zip(first.waited, last.waited, strict=True)]
    # Copies come on top: the timeline's workers make none.
    trained = [(seconds - w) / (seconds + n * costs.copies) for w, n in zip(waited, rounds, strict=True)]
    per_second = sum(v * part for v, part in zip(speeds, trained, strict=True))
    sent, received = (
        [(after - before) / n for before, after, n in zip(*counts, rounds, strict=True)]
        for counts in ((first.sent, last.sent), (first.received, last.received))
    )
    fastest = max(range(len(speeds)), key=lambda worker: speeds[worker])
    of_fastest = [r.local_steps for r in recorder.finished_rounds if r.worker == fastest]
    in_flight = [r.adopted - r.end for r in recorder.finished_rounds]
    exchange = sum(in_flight) / len(in_flight)
    return Plan(
        parameters=costs.parameters,
        workers=len(speeds),
        local_steps=_number(settings),
        codec=make_codec(settings.codec).name,
        overlap=settings.overlap,
        utilization=per_second / sum(speeds),
        steps_per_second=per_second,
        round_seconds=seconds * len(speeds) / sum(rounds) + costs.copies,
        round_steps=at_once * sum(of_fastest) / len(of_fastest),
        exposed_seconds=tuple(w / n + costs.copies for w, n in zip(waited, rounds, strict=True)),
        exchange_seconds=exchange,
        steps_in_flight=exchange * speeds[fastest] if settings.overlap else 0.0,
        sent_per_round=tuple(sent),
        received_per_round=tuple(received),
        link_load=max(n * max(s, r) for n, s, r in zip(rounds, sent, received, strict=True)) / seconds,
        link_need=_link_need(speeds, settings, network, costs),
        memory=memory_bytes(costs.parameters, settings, len(speeds)),
        mean_staleness=sum(recorder.stalenesses) / len(recorder.stalenesses),
        max_staleness=max(recorder.stalenesses),
        rounds=sum(rounds),
    )


def _link_need(speeds: Sequence[float], settings: Settings, network: Network, costs: _Costs) -> float:
    if settings.lockstep(len(speeds)):
        seconds = _number(settings) / min(speeds)
    elif isinstance(make_pace(settings.pace), FixedPace):
        seconds = _number(settings) * len(speeds) / sum(speeds)  # in which there are as many rounds as workers
    else:
        seconds = _number(settings) / max(speeds)
    allowed = seconds if settings.overlap else (1 - TARGET) * seconds
    rest = allowed - costs.exchange_seconds(replace(network, bandwidth=math.inf), len(speeds))
    everyone = range(len(speeds))
    links = Network(bandwidth=1.0)
    load = links.delta_seconds(everyone, everyone, costs.parameters, costs.element_bytes)
    return (load + links.header_seconds(everyone)) / rest if rest > 0 else math.inf


# ---- what stands in the way ------------------------------------------------------------------------------------------


def _limit(predict: partial[Plan], network: Network) -> str:
    """Why nothing reaches the target, if the longest rounds and the smallest messages do not.

    Of several causes the one that is shortest of what it needs comes first.
    """
    smallest = min(codecs_by_name().values(), key=lambda codec: codec.wire_dtype.itemsize)
    predict = partial(predict, local_steps=LOCAL_STEPS[-1], codec=smallest.name)
    setting = f"H = {LOCAL_STEPS[-1]} with {smallest.name}"
    if not predict(network=Network(), memory_bandwidth=math.inf).reaches_target:
        return "workers wait for each other, whatever the network; a method without a quorum does not."
    has_memory = predict.keywords.get("memory_bandwidth", MEMORY_BANDWIDTH)
    memory = _needed_memory(predict, has_memory)
    at_memory = partial(predict, memory_bandwidth=memory)
    link = _needed_link(at_memory, network)
    lacks = []
    if link is None:
        lacks.append((math.inf, _no_link(at_memory(network=network), setting)))
    elif link > 0:
        text = f"the network is too slow; {setting} needs {_mbit(link)} Mbit/s of each worker's link"
        lacks.append((link / network.bandwidth, text))
    if memory > has_memory:
        text = (
            f"copies and outer updates take too long at this memory bandwidth; {setting} needs {memory / 1e9:,.3g} GB/s"
        )
        lacks.append((memory / has_memory, text))
    lacks.sort(reverse=True)
    return ". Besides, ".join(text for _, text in lacks) + "."


def _needed_memory(predict: partial[Plan], here: float) -> float:
    """Memory bandwidth at which a network without limits reaches the target: that of here, or more."""
    planned = predict(network=Network(), memory_bandwidth=here)
    if planned.reaches_target:
        return here
    # What is exposed then are copies, whose time is that of the bytes.
    needed = here * (1 / planned.utilization - 1) / (1 / TARGET - 1)
    while not predict(network=Network(), memory_bandwidth=needed).reaches_target:
        needed *= 1.25
    return needed


def _needed_link(predict: partial[Plan], network: Network) -> float | None:
    """Bandwidth of each worker's link that reaches the target: 0 if it is reached here, None if none does."""
    here = predict(network=network)
    if here.reaches_target:
        return 0.0
    bandwidth = here.link_need
    for _ in range(8):
        if bandwidth == math.inf:
            break
        if predict(network=replace(network, bandwidth=bandwidth)).reaches_target:
            return bandwidth
        bandwidth *= 1.25
    return None


def _no_link(here: Plan, setting: str) -> str:
    alone = "latency, links of sites or outer updates"
    return f"even {setting} would not with any link of its own: {alone} take too long" + (
        "" if here.overlap else ". Training during the exchange (overlap) hides them"
    )


def _mbit(bytes_per_second: float) -> str:
    return f"{bytes_per_second * 8 / 1e6:,.0f}" if bytes_per_second >= 1.25e7 else f"{bytes_per_second * 8 / 1e6:,.3g}"


# ---- what is asked ---------------------------------------------------------------------------------------------------


def _optimizer_copies(settings: Settings, workers: int) -> int:
    """Vectors of the parameters' shape that the outer optimizer keeps, once it has made a step."""
    parameter = torch.nn.Parameter(torch.zeros(2))
    make = settings.outer_optimizer or default_outer_optimizer
    optimizer = make([parameter])
    if isinstance(optimizer, DelayedNesterov):
        optimizer.set_default_buffer_size(max(1, round(workers / settings.quorum)))
    parameter.grad = torch.zeros(2)
    optimizer.step()
    kept = optimizer.state[parameter].values()
    return sum(isinstance(value, Tensor) and value.shape == parameter.shape for value in kept)


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
