"""Costs: what a delta takes of the threads and the memory of a worker."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_async_localsgd.codecs import Codec
from lightning_async_localsgd.exchange.trade import CHUNK
from lightning_async_localsgd.outer import DelayedNesterov, default_outer_optimizer, takes_sums
from lightning_async_localsgd.settings import Settings
from lightning_async_localsgd.simulation.exchange import DeltaCosts
from lightning_async_localsgd.simulation.network import Network

__all__ = ["MEMORY_BANDWIDTH", "Costs", "memory_bytes"]

MEMORY_BANDWIDTH = 10e9
"""Bytes per second that one thread of a host reads and writes, unless given: that of an ordinary, busy server."""

# How often 4 bytes per parameter are read from memory or written to it.
_PUSH_STREAMS = 2  # training thread: a copy of the parameters
_ADOPT_STREAMS = 3  # training thread: parameters += correction
_OWN_STREAMS = 10  # exchange thread, per turn: the delta, whether it is finite, the checksum, what is adopted
_RECEIVE_STREAMS = 2  # from the socket to where it is used
_ADD_STREAMS = 3  # each delta, or slice of one, to the sum of those before
_UPDATE_STREAMS = 7  # delayed Nesterov's step; other optimizers are about the same
_CODEC_STREAMS = 10  # a codec that rounds: to write or to read a vector, about (benchmarks/codecs.py)


class Costs:
    """What a delta costs the threads of a worker, if each copy takes the time to stream its memory.

    Args:
        parameters: elements of a delta.
        settings: settings of the run.
        memory_bandwidth: bytes per second of one thread.
    """

    def __init__(self, parameters: int, settings: Settings, memory_bandwidth: float) -> None:
        stream = 4 * parameters / memory_bandwidth  # of the whole model
        sums = (
            settings.sums
            if settings.sums is not None
            else takes_sums(_make_optimizer(settings), settings.transforms, settings.quorum)
        )
        codec = 0 if next(iter(settings.codecs().values())).lossless else _CODEC_STREAMS
        if sums:
            # A worker writes its delta and a slice of the sum, reads as much as one delta in its slice, and the sum.
            own, update = 2 * codec + _ADD_STREAMS + _RECEIVE_STREAMS + codec, _UPDATE_STREAMS
        elif settings.quorum > 1:
            own, update = codec, settings.quorum * (codec + _RECEIVE_STREAMS + _ADD_STREAMS) + _UPDATE_STREAMS
        else:
            own, update = codec, codec + _RECEIVE_STREAMS + _UPDATE_STREAMS
        self.copies = (_PUSH_STREAMS + _ADOPT_STREAMS) * stream
        """Seconds per round for which the training thread copies."""
        self.delta = DeltaCosts(
            elements=tuple(len(range(i, parameters, settings.fragments)) for i in range(settings.fragments)),
            sums=sums,
            update_seconds=update * stream / settings.fragments,
            turn_seconds=(_OWN_STREAMS + own) * stream / settings.fragments,
        )
        self._quorum = settings.quorum

    def exchange_seconds(self, network: Network, workers: int, codec: Codec) -> float:
        """Seconds of a turn that brings the delta of each of so many workers, of a fragment."""
        everyone = range(workers)
        told = network.trip(everyone) + network.header_seconds(everyone)
        updates = 1 if self.delta.sums else math.ceil(workers / self._quorum)
        sent = self.sent_seconds(network, workers, codec)
        return told + sent + self.delta.turn_seconds + updates * self.delta.update_seconds

    def sent_seconds(self, network: Network, workers: int, codec: Codec) -> float:
        """The part of :meth:`exchange_seconds` in which deltas are on their way."""
        everyone = range(workers)
        seconds = network.reduce_seconds if self.delta.sums else network.gather_seconds
        return seconds(everyone, everyone, self.delta.elements[0], codec)


def memory_bytes(parameters: int, settings: Settings, workers: int, codec: Codec) -> int:
    """Host memory that a worker needs beside its module and inner optimizer.

    Two vectors of fp32 (``base``, global parameters), two more of a fragment (``snapshot``, pseudo-gradient), what the
    outer optimizer and the transformations keep, the residual of a codec that rounds, and the messages on their way.

    Args:
        parameters: trainable parameters and float buffers.
        settings: settings of the run.
        workers: number of workers.
        codec: the codec of the deltas.
    """
    copies = 2 + 2 / settings.fragments + _optimizer_copies(settings, workers) + (not codec.lossless)
    for transform in settings.transforms:
        copies += sum(isinstance(value, Tensor) for value in transform.init(torch.zeros(2)).values())
    on_their_way = workers * codec.wire_bytes(min(4 * CHUNK, -(-parameters // workers)))
    return round(4 * parameters * copies) + on_their_way


def _make_optimizer(settings: Settings) -> torch.optim.Optimizer:
    """The outer optimizer of two parameters."""
    return (settings.outer_optimizer or default_outer_optimizer)([torch.nn.Parameter(torch.zeros(2))])


def _optimizer_copies(settings: Settings, workers: int) -> int:
    """Vectors of the parameters' shape that the outer optimizer keeps, once it has made a step."""
    optimizer = _make_optimizer(settings)
    parameter = optimizer.param_groups[0]["params"][0]
    if isinstance(optimizer, DelayedNesterov):
        optimizer.set_default_buffer_size(max(1, round(workers / settings.quorum)))
    parameter.grad = torch.zeros(2)
    optimizer.step()
    kept = optimizer.state[parameter].values()
    return sum(isinstance(value, Tensor) and value.shape == parameter.shape for value in kept)
