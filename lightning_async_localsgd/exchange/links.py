"""Links: how fast each worker's is, measured once, before training, by a short exchange of all at the same time."""

from __future__ import annotations

import json
import time

import torch

from lightning_async_localsgd.exchange.transport import Channel, Transport

__all__ = ["measure_links"]

_NEIGHBOURS = 3
"""A worker sends to so many others, one after the other: one of them with a slow link says nothing about its own."""
_MOST = 1 << 20
"""Bytes of one message: 1 second at 8 Mbit/s."""
_LEAST = 1 << 17
"""Bytes of a delta below which its time is latency, and nothing is measured."""


def measure_links(transport: Transport, rank: int, size: int, delta_bytes: int) -> list[float]:
    """The rate of each worker's link in bytes per second, by rank, alike on all workers.

    The rate of a link is the best that was seen over it, in its slower direction. To be called by all workers at the
    same time. With two workers, or for a small delta, all links are said to be equal, and nothing is sent.

    Args:
        transport: connections to the other workers.
        rank: rank of this worker.
        size: number of workers.
        delta_bytes: size of a delta. No message is longer than an eighth of it.

    Raises:
        PeerLostError: naming a worker that is gone or silent.
    """
    if size <= 2 or delta_bytes < _LEAST:
        return [1.0] * size
    outgoing = torch.zeros(min(_MOST, delta_bytes // 8), dtype=torch.uint8)
    incoming = torch.empty_like(outgoing)
    received = {}
    for distance in range(1, min(_NEIGHBOURS, size - 1) + 1):
        sender = (rank - distance) % size
        transport.gather(b"\0")  # so that all begin together
        begin = time.monotonic()
        wait_for_sender = transport.receive(incoming, sender, Channel.DELTA)
        wait_for_send = transport.send(outgoing, (rank + distance) % size, Channel.DELTA)
        wait_for_sender()
        received[sender] = incoming.numel() / (time.monotonic() - begin)
        wait_for_send()
    told = json.dumps(list(received.items())).encode()
    sizes = [int.from_bytes(data, "little") for data in transport.gather(len(told).to_bytes(4, "little"))]
    into, out = [0.0] * size, [0.0] * size
    for receiver, data in enumerate(transport.gather_some(told, sizes)):
        for sender, rate in json.loads(data):
            into[receiver] = max(into[receiver], rate)
            out[sender] = max(out[sender], rate)
    return [min(rates) for rates in zip(into, out, strict=True)]
