"""The trade of a turn: how the deltas of several workers become sums that all of them hold, alike to the bit.

Two trades share everything else. :class:`Reduce` adds the deltas up where they meet: each worker owns a slice of the
flat vector, receives that slice of every delta, adds them in rank order and gives the sum to all. A worker sends and
receives at most ``2 (k - 1) / k`` times the size of a delta, for any number k of workers. :class:`Gather` gives every
delta to every worker, ``k - 1`` times the size of each, for outer optimizers that need single deltas.

Both write each delta in the form of the codec, and both apply what a receiver decodes, also for a worker's own delta.
A sum is written in the form that the codec has for sums of so many deltas.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.profiler import record_function

from lightning_async_localsgd.codecs import BF16, Codec, ErrorFeedback
from lightning_async_localsgd.exchange.transport import Channel, Transport, Wait
from lightning_async_localsgd.protocol.slices import UNIT, Span, owned_slices

__all__ = ["CHUNK", "Gather", "Reduce", "Trade", "WireVector", "message_elements"]

CHUNK = 1 << 18
"""Maximum number of elements of a message: the timeout applies to each one."""

_UNDER_WAY = 3  # chunks of a slice on their way before the first of them is waited for
_MESSAGES = 16
"""Messages of a slice, where it is short: sums go out while deltas still come in, so that a link is rarely idle."""
_SMALLEST = 1 << 15
"""Bytes of a message, about, below which its latency counts more than that."""


class Trade(Protocol):
    """Brings the sums of deltas to every worker. Belongs to the exchange thread; alike on all workers."""

    trailing: frozenset[int]
    """Workers that nobody waits for but with their own deltas: they may receive sums while the next turn goes on."""

    def sums(self, groups: Sequence[Sequence[int]], own: Tensor | None, codec: Codec) -> Iterator[None]:
        """Write the sum of the deltas of one group after the other into the target.

        Args:
            groups: the ranks of the workers whose deltas make up each sum, in rising order. A worker is in one group.
                A group may be empty: its sum is not written.
            own: the delta of this worker, shape ``(n,)``, fp32, if a group has it. It is used up.
            codec: the codec of this turn.

        Yields:
            After each sum is in the target. The target is free to be changed until the iteration goes on.

        Raises:
            PeerLostError: naming a worker that is gone or silent.
        """


class Piece(NamedTuple):
    """A part of the vector that makes up one message."""

    span: Span
    codec: Codec

    @property
    def wire_bytes(self) -> int:
        return self.codec.wire_bytes(self.span.stop - self.span.start)

    def of_sum(self, count: int) -> Piece:
        """This part of the sum of so many deltas, which all workers know from the headers."""
        return self._replace(codec=self.codec.of_sum(count))


class WireVector:
    """The target of a trade, cut into pieces, and the worker's side of writing and reading them.

    Args:
        target: the vector that sums are written to, shape ``(n,)``, fp32.
        parameters: number of its first elements that hold parameters. Buffers follow, which are never written in fewer
            bits than those of bfloat16: a variance must not become negative.
        feedback: errors that the next delta of this worker makes up for.
    """

    def __init__(self, target: Tensor, parameters: int, feedback: ErrorFeedback) -> None:
        self.target = target
        self.feedback = feedback
        self._parameters = parameters

    def pieces(self, span: Span, codec: Codec, chunk: int = CHUNK) -> list[Piece]:
        """A slice of the vector in messages of at most so many elements, a multiple of :data:`UNIT`."""
        bounds = sorted({span.start, min(max(self._parameters, span.start), span.stop), span.stop})
        of_buffers = codec if codec.lossless else BF16()
        return [
            Piece(Span(start, min(start + chunk, stop)), codec if start < self._parameters else of_buffers)
            for begin, stop in pairwise(bounds)
            for start in range(begin, stop, chunk)
        ]

    def part(self, piece: Piece) -> Tensor:
        """The part of the target."""
        return self.target[piece.span.start : piece.span.stop]

    def encode(self, own: Tensor, piece: Piece) -> Tensor:
        """The wire form of a part of this worker's delta, on the device of the delta."""
        chunk = own[piece.span.start : piece.span.stop]
        return self.feedback.encode(piece.codec, chunk, piece.span.start)

    def inbox(self, piece: Piece) -> Tensor:
        """Memory on the CPU to receive a part in: that of the target itself, if the wire form is the final form."""
        if piece.codec.lossless and self.target.device.type == "cpu":
            return self.part(piece).view(torch.uint8)
        return torch.empty(piece.wire_bytes, dtype=torch.uint8)

    def decode(self, wire: Tensor, piece: Piece, add: bool = False) -> None:
        """Write or add what a wire form says to the target."""
        part = self.part(piece)
        if add or wire.data_ptr() != part.data_ptr():
            piece.codec.decode(wire.to(part.device), part, add)

    def encode_sum(self, piece: Piece) -> Tensor:
        """The wire form of a sum in the target, which from now on holds what the wire form says."""
        total = self.part(piece)
        wire = piece.codec.encode(total)
        if not piece.codec.lossless:
            error = total.clone()
            piece.codec.decode(wire, total)
            self.feedback.keep(error.sub_(total), piece.span.start)
        return wire


class Reduce:
    """All-reduce by slices. See the module's docstring and :class:`Trade`.

    Of a single delta, the owner of a slice passes on the very bytes that it has received.

    Args:
        transport: connections to the other workers.
        rank: rank of this worker.
        target: the vector that sums are written to.
        parameters: number of its elements that hold parameters, before those that hold buffers.
        feedback: takes up the errors of both hops.
        shares: the share of the vector that each worker owns.
    """

    def __init__(
        self,
        transport: Transport,
        rank: int,
        target: Tensor,
        parameters: int,
        feedback: ErrorFeedback,
        shares: Sequence[float],
    ) -> None:
        self._transport = transport
        self._rank = rank
        self._vector = WireVector(target, parameters, feedback)
        self._slices = owned_slices(target.numel(), shares)
        self.trailing = frozenset(worker for worker, share in enumerate(shares) if share == 0)

    def sums(self, groups: Sequence[Sequence[int]], own: Tensor | None, codec: Codec) -> Iterator[None]:
        """See :meth:`Trade.sums`."""
        self._vector.feedback.begin_turn()
        pieces = [self._vector.pieces(span, codec, message_elements(span, codec)) for span in self._slices]
        for group in groups:
            with record_function("async_localsgd::exchange"):
                if group:  # else all its deltas are refused
                    _Sum(self._transport, self._rank, self.trailing, self._vector, pieces, group, own).bring()
            yield


class _Sum:
    """One sum on its way. Its messages are posted some chunks ahead of those that are waited for."""

    def __init__(
        self,
        transport: Transport,
        rank: int,
        trailing: frozenset[int],
        vector: WireVector,
        slices: Sequence[Sequence[Piece]],
        group: Sequence[int],
        own: Tensor | None,
    ) -> None:
        self._transport = transport
        self._rank = rank
        others = self._others = [worker for worker in range(len(slices)) if worker != rank]
        self._trailing = trailing
        self._vector = vector
        self._slices = slices
        self._group = group
        self._own = own if rank in group else None
        self._is_single = len(group) == 1
        self._needs_sums = [w for w in others if not (self._is_single and w in group)]  # who sent all knows the sum
        self._deltas: deque[list[tuple[Tensor, Wait | None]]] = deque()  # parts of the own slice, by sender
        self._sums: deque[list[tuple[Piece, Tensor, Wait]]] = deque()  # parts of the others' slices
        self._sent: deque[Wait] = deque()

    def bring(self) -> None:
        """Bring the sum into the target of every worker."""
        steps = max(map(len, self._slices))
        for step in range(steps + 2 * _UNDER_WAY):
            self._settle(keep=4 * _UNDER_WAY * len(self._others))
            if step < steps:
                self._post(step)
            if 0 <= step - _UNDER_WAY < steps:
                self._merge(step - _UNDER_WAY)
            if step >= 2 * _UNDER_WAY:
                self._collect()
        self._settle(keep=0)

    def _settle(self, keep: int) -> None:
        """Wait for all sends but this many of the latest: what has been sent need not be held any more."""
        while len(self._sent) > keep:
            self._sent.popleft()()

    def _piece(self, owner: int, step: int) -> Piece | None:
        pieces = self._slices[owner]
        return pieces[step] if step < len(pieces) else None

    def _post(self, step: int) -> None:
        """Begin to send the parts of the own delta to their owners, and to receive what comes here."""
        own_piece = self._piece(self._rank, step)
        self._sums.append([])
        for owner in self._others:
            piece = self._piece(owner, step)
            if piece is None:
                continue
            if self._own is not None:
                wire = self._vector.encode(self._own, piece)
                if self._is_single:
                    self._vector.decode(wire, piece)
                self._sent.append(self._transport.send(wire.cpu(), owner, Channel.DELTA))
            if not (self._is_single and self._own is not None):
                of_sum = piece.of_sum(len(self._group))
                inbox = self._vector.inbox(of_sum)
                self._sums[-1].append((of_sum, inbox, self._transport.receive(inbox, owner, Channel.SUM)))
        self._deltas.append([])
        if own_piece is None:
            return
        for sender in self._group:
            if sender == self._rank:
                assert self._own is not None
                self._deltas[-1].append((self._vector.encode(self._own, own_piece), None))
            else:
                in_place = sender == self._group[0]
                wire = self._vector.inbox(own_piece) if in_place else _empty(own_piece)
                self._deltas[-1].append((wire, self._transport.receive(wire, sender, Channel.DELTA)))

    def _merge(self, step: int) -> None:
        """Add up the deltas' parts of the own slice in rank order, and begin to send the sum to all."""
        piece = self._piece(self._rank, step)
        deltas = self._deltas.popleft()
        if piece is None:
            return
        for i, (wire, wait) in enumerate(deltas):
            if wait is not None:
                wait()
            self._vector.decode(wire, piece, add=i > 0)
        of_sum = piece.of_sum(len(deltas))
        wire = deltas[0][0] if self._is_single else self._vector.encode_sum(of_sum)
        wire = wire.cpu()
        if of_sum.codec.lossless and not self._trailing.isdisjoint(self._needs_sums):
            wire = wire.clone()  # the target or the own delta, which change before a trailing worker has read all
        self._sent += [self._transport.send(wire, worker, Channel.SUM) for worker in self._needs_sums]

    def _collect(self) -> None:
        """Take the others' sums."""
        for piece, inbox, wait in self._sums.popleft():
            wait()
            self._vector.decode(inbox, piece)


class Gather:
    """All-gather: every delta to every worker, in rank order. See the module's docstring and :class:`Trade`.

    The beginnings of all deltas travel at once: a small model needs one trip through the network, not one for each
    worker.

    Args:
        transport: connections to the other workers.
        rank: rank of this worker.
        target: the vector that sums are written to.
        parameters: number of its elements that hold parameters, before those that hold buffers.
        feedback: takes up the errors of this worker's deltas.
    """

    def __init__(
        self, transport: Transport, rank: int, target: Tensor, parameters: int, feedback: ErrorFeedback
    ) -> None:
        self.trailing: frozenset[int] = frozenset()
        self._transport = transport
        self._rank = rank
        self._vector = WireVector(target, parameters, feedback)

    def sums(self, groups: Sequence[Sequence[int]], own: Tensor | None, codec: Codec) -> Iterator[None]:
        """See :meth:`Trade.sums`."""
        self._vector.feedback.begin_turn()
        first, *rest = self._vector.pieces(Span(0, self._vector.target.numel()), codec)
        ahead = deque(self._post(worker, first, own, in_place=False) for group in groups for worker in group)
        for group in groups:
            with record_function("async_localsgd::exchange"):
                for i, worker in enumerate(group):
                    self._finish(ahead.popleft(), first, add=i > 0)
                    for piece in rest:
                        self._finish(self._post(worker, piece, own, in_place=i == 0), piece, add=i > 0)
            yield

    def _post(self, worker: int, piece: Piece, own: Tensor | None, in_place: bool) -> tuple[Tensor, Wait]:
        if worker == self._rank:
            assert own is not None
            wire = self._vector.encode(own, piece).cpu()
        else:
            wire = self._vector.inbox(piece) if in_place else _empty(piece)
        return wire, self._transport.broadcast(wire, worker)

    def _finish(self, transfer: tuple[Tensor, Wait], piece: Piece, add: bool) -> None:
        wire, wait = transfer
        wait()
        self._vector.decode(wire, piece, add)


def message_elements(span: Span, codec: Codec) -> int:
    """Elements of a message of this slice, alike on all workers."""
    shortest = UNIT * -(-_SMALLEST // codec.wire_bytes(UNIT))
    wanted = UNIT * -(-(span.stop - span.start) // (_MESSAGES * UNIT))
    return min(CHUNK, max(shortest, wanted))


def _empty(piece: Piece) -> Tensor:
    return torch.empty(piece.wire_bytes, dtype=torch.uint8)
