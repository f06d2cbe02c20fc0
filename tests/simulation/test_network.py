"""The virtual network counts the bytes that a real exchange sends."""

from __future__ import annotations

import pytest
import torch

from lightning_async_localsgd.codecs import INT4, Codec, TopK
from lightning_async_localsgd.exchange.trade import Gather, Reduce
from lightning_async_localsgd.protocol.slices import UNIT
from lightning_async_localsgd.simulation import Network
from tests.exchange.test_trade import BUFFERS, exchange


@pytest.mark.parametrize("senders", [[1], [0, 1], [0, 1, 2, 3]], ids=len)
@pytest.mark.parametrize("codec", [INT4(), TopK(), TopK(0.1, bits=2), TopK(0.5)], ids=repr)
@pytest.mark.parametrize("kind", [Reduce, Gather])
def test_bytes_are_those_of_a_real_exchange(
    kind: type[Reduce] | type[Gather], codec: Codec, senders: list[int]
) -> None:
    size, numel = 4, 64 * UNIT
    outcomes = exchange(kind, codec, [senders], {worker: torch.randn(numel) for worker in senders}, size, numel)
    count = Network.reduce_bytes if kind is Reduce else Network.gather_bytes
    for worker, (*_, sent, received) in enumerate(outcomes):
        told = count(senders, range(size), worker, numel, codec)
        for real, predicted in zip((sent, received), told, strict=True):
            assert abs(real - predicted) <= 2 * BUFFERS * 2 * size  # buffers are in bf16
