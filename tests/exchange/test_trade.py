"""Trades: the same sums on every worker, to the bit, for little traffic."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_async_localsgd.codecs import Codec, ErrorFeedback, TopK, make_codec
from lightning_async_localsgd.exchange import trade
from lightning_async_localsgd.exchange.trade import Gather, Reduce, Trade, WireVector
from lightning_async_localsgd.protocol.slices import UNIT, Span
from tests.exchange.local_transport import LocalTransport, run_threads

BUFFERS = 100


def exchange(
    kind: type[Reduce] | type[Gather],
    codec: str | Codec,
    groups: Sequence[Sequence[int]],
    deltas: dict[int, Tensor],
    size: int,
    numel: int,
) -> list[tuple[list[Tensor], Tensor | None, int, int]]:
    """What each worker holds after a turn: the sums, its residual, bytes sent and received."""

    def work(transport: LocalTransport) -> tuple[list[Tensor], Tensor | None, int, int]:
        torch.set_num_threads(1)
        target = torch.full((numel,), torch.nan)
        feedback = ErrorFeedback(numel, target.device)
        if kind is Reduce:
            made: Trade = Reduce(transport, transport.rank, target, numel - BUFFERS, feedback, [1 / size] * size)
        else:
            made = Gather(transport, transport.rank, target, numel - BUFFERS, feedback)
        own = deltas.get(transport.rank)
        sums = []
        for _ in made.sums(groups, None if own is None else own.clone(), make_codec(codec)):
            sums.append(target.clone())
            target.fill_(torch.nan)  # the outer update uses it up
        return sums, feedback.state_dict()["residual"], transport.bytes_sent, transport.bytes_received

    return run_threads(work, size)


@st.composite
def turns(draw: st.DrawFn) -> tuple[int, list[list[int]], int]:
    size = draw(st.integers(1, 5))
    workers = draw(st.lists(st.integers(0, size - 1), unique=True, min_size=1).map(sorted))
    bounds = sorted(draw(st.sets(st.integers(1, len(workers)), max_size=3)) | {0, len(workers)})
    groups = [workers[a:b] for a, b in pairwise(bounds)]
    return size, groups, draw(st.integers(BUFFERS + 1, 6 * UNIT))


@given(turns(), st.sampled_from([Reduce, Gather]), st.sampled_from(["fp32", "bf16", "int4"]), st.integers(0, 3))
@settings(deadline=None, max_examples=60)
def test_all_workers_hold_the_same_sums(
    turn: tuple[int, list[list[int]], int], kind: type[Reduce] | type[Gather], codec: str, seed: int
) -> None:
    size, groups, numel = turn
    generator = torch.Generator().manual_seed(seed)
    deltas = {worker: torch.randn(numel, generator=generator) for group in groups for worker in group}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trade, "CHUNK", UNIT)
        outcomes = exchange(kind, codec, groups, deltas, size, numel)
    for i, group in enumerate(groups):
        exact = torch.stack([deltas[worker] for worker in group]).sum(0)
        for sums, *_ in outcomes:
            assert torch.equal(sums[i], outcomes[0][0][i])
        if codec == "fp32":
            in_order = deltas[group[0]].clone()
            for worker in group[1:]:
                in_order += deltas[worker]
            assert torch.equal(outcomes[0][0][i], in_order)
        else:  # the errors of both hops are no larger than a step of the codec
            step = {"bf16": 2**-7, "int4": 2 / 7}[codec]
            assert (outcomes[0][0][i] - exact).abs().max() <= step * (len(group) + 1) * 6


@pytest.mark.parametrize("codec", ["bf16", "int8", "int4", "topk"])
def test_nothing_is_lost_in_a_codec(codec: str) -> None:
    """Sums and residuals together are what was given."""
    numel, size = 5 * UNIT + 123, 3
    deltas = {worker: torch.randn(numel) for worker in (0, 2)}
    outcomes = exchange(Reduce, codec, [[0, 2]], deltas, size, numel)
    total = outcomes[0][0][0] + sum(residual for _, residual, *_ in outcomes if residual is not None)
    torch.testing.assert_close(total, deltas[0] + deltas[2], atol=1e-5, rtol=0)


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("size", [2, 3, 5])
def test_a_sum_of_sparse_deltas_is_not_made_sparse_again(size: int, bits: int) -> None:
    numel, codec = 5 * UNIT + 123, TopK(0.1, bits)
    deltas = {worker: torch.randn(numel) for worker in range(size)}
    outcomes = exchange(Reduce, codec, [list(deltas)], deltas, size, numel)
    sent = torch.zeros(numel)
    for delta in deltas.values():
        part = torch.empty(numel - BUFFERS)
        codec.decode(codec.encode(delta[:-BUFFERS]), part)
        sent[:-BUFFERS] += part
    arrived = outcomes[0][0][0]
    assert all(torch.equal(sums[0], arrived) for sums, *_ in outcomes)
    assert (arrived - sent)[:-BUFFERS].abs().max() <= 0.51 * sent.abs().max() / 127


@pytest.mark.parametrize(("size", "senders"), [(2, 2), (2, 1), (4, 4), (4, 1), (4, 3), (8, 8), (8, 5)])
def test_traffic_does_not_grow_with_the_number_of_workers(size: int, senders: int) -> None:
    numel = 64 * UNIT
    deltas = {worker: torch.randn(numel) for worker in range(senders)}
    outcomes = exchange(Reduce, "fp32", [list(range(senders))], deltas, size, numel)
    most = 2 * 4 * numel * (size - 1) / size
    assert max(max(sent, received) for *_, sent, received in outcomes) <= most
    assert sum(sent for *_, sent, _ in outcomes) == sum(received for *_, received in outcomes)


def test_with_two_workers_a_reduce_moves_no_more_than_a_gather() -> None:
    numel = 16 * UNIT
    for group in ([0, 1], [1]):
        deltas = {worker: torch.randn(numel) for worker in group}
        gathered = sum(sent for *_, sent, _ in exchange(Gather, "fp32", [group], deltas, 2, numel))
        reduced = sum(sent for *_, sent, _ in exchange(Reduce, "fp32", [group], deltas, 2, numel))
        assert reduced <= gathered


@pytest.mark.parametrize(
    ("numel", "codec", "messages"),
    [
        (64 * UNIT, "fp32", 16),
        (64 * UNIT, "int4", 4),
        (5 * UNIT, "fp32", 3),
        (100, "int4", 1),
        (1024 * UNIT, "int8", 16),
    ],
)
def test_a_short_slice_travels_in_messages_that_are_worth_their_latency(numel: int, codec: str, messages: int) -> None:
    vector = WireVector(torch.zeros(numel), numel, ErrorFeedback(numel))
    span, chosen = Span(0, numel), make_codec(codec)
    pieces = vector.pieces(span, chosen, trade.message_elements(span, chosen))
    assert len(pieces) == messages
    assert [piece.span.start for piece in pieces[1:]] == [piece.span.stop for piece in pieces[:-1]]
    assert all(piece.span.stop - piece.span.start <= trade.CHUNK for piece in pieces)
