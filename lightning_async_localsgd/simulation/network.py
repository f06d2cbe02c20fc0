"""The virtual network: the durations of messages and deltas from each worker to each other."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lightning_async_localsgd.codecs import Codec
from lightning_async_localsgd.exchange.trade import CHUNK
from lightning_async_localsgd.protocol.header import HEADER_BYTES

__all__ = ["Network"]


@dataclass(frozen=True)
class Network:
    """The links of workers, full duplex, and of sites shared by several workers.

    Args:
        latency: seconds of an empty message from one worker to another.
        bandwidth: bytes per second of each worker's own link, in each direction.
        sites: the site of each worker; None: all are at one site.
        site_latency: additional seconds of a message between two sites.
        site_bandwidth: bytes per second of the link that joins a site to the others, in each direction, shared by its
            workers.

    Raises:
        ValueError: if a number is outside its range.
    """

    latency: float = 0.0
    bandwidth: float = math.inf
    sites: tuple[int, ...] | None = None
    site_latency: float = 0.0
    site_bandwidth: float = math.inf

    def __post_init__(self) -> None:
        for name in ("latency", "site_latency"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` must be at least 0 seconds, got {getattr(self, name)}.")
        for name in ("bandwidth", "site_bandwidth"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be positive (bytes per second), got {getattr(self, name)}.")

    def check_workers(self, workers: int) -> None:
        """Refuse a list of sites of another length than the number of workers."""
        if self.sites is not None and len(self.sites) != workers:
            raise ValueError(f"`sites` names the site of {len(self.sites)} workers, and there are {workers}.")

    def trip(self, workers: Sequence[int]) -> float:
        """Seconds of an empty message from each of these workers to each other one."""
        if len(workers) < 2:
            return 0.0
        return self.latency + (self.site_latency if self._sites_of(workers) > 1 else 0.0)

    def header_seconds(self, workers: Sequence[int]) -> float:
        """Seconds of a header from each of these workers to each other one."""
        return self.trip(workers) + self._load_seconds(workers, workers, HEADER_BYTES)

    def gather_seconds(self, senders: Sequence[int], workers: Sequence[int], elements: int, codec: Codec) -> float:
        """Seconds of the transfer of these senders' deltas to all of these workers.

        As in the real exchange, the beginnings of all deltas travel at once, the rest one delta after the other.

        Args:
            senders: ranks of the senders.
            workers: ranks of all workers in the turn.
            elements: number of elements of each delta.
            codec: the codec of the deltas.
        """
        if not senders or len(workers) < 2:
            return 0.0
        beginning = min(elements, CHUNK)
        seconds = self.trip(workers) + self._load_seconds(senders, workers, codec.wire_bytes(beginning))
        if elements > beginning:
            rest = codec.wire_bytes(elements) - codec.wire_bytes(beginning)
            trip = self.trip(workers)
            # Senders of one site take the same time.
            of_site = {self._site(s): trip + self._load_seconds([s], workers, rest) for s in self._one_of_each(senders)}
            seconds += sum(of_site[self._site(s)] for s in senders)
        return seconds

    def reduce_seconds(self, senders: Sequence[int], workers: Sequence[int], elements: int, codec: Codec) -> float:
        """Seconds in which the sum of these senders' deltas comes to all of these workers, by slices.

        Both hops of a long vector overlap, and each worker sends and receives at once.

        Args:
            senders: the workers whose deltas are added up.
            workers: all workers that take part.
            elements: elements of each delta.
            codec: the codec of the deltas.
        """
        if not senders or len(workers) < 2:
            return 0.0
        kinds = self._kinds(senders, workers)
        load = max(max(self.reduce_bytes(senders, workers, worker, elements, codec)) for worker in kinds)
        seconds = load / self.bandwidth
        if self.sites is not None:
            sites = {self._site(worker) for worker in workers}
            load = max(max(self._site_bytes(senders, workers, site, elements, codec)) for site in sites)
            seconds = max(seconds, load / self.site_bandwidth)
        return 2 * self.trip(workers) + seconds

    @staticmethod
    def gather_bytes(
        senders: Sequence[int], workers: Sequence[int], worker: int, elements: int, codec: Codec
    ) -> tuple[float, float]:
        """Bytes of deltas that a worker sends and receives in a gather; see :meth:`reduce_bytes`."""
        sends, delta = worker in senders, codec.wire_bytes(elements)
        return (len(workers) - 1) * sends * delta, (len(senders) - sends) * delta

    @staticmethod
    def reduce_bytes(
        senders: Sequence[int], workers: Sequence[int], worker: int, elements: int, codec: Codec
    ) -> tuple[float, float]:
        """Bytes of deltas and sums that a worker sends and receives in a reduce.

        Args:
            senders: the workers whose deltas are added up.
            workers: all workers that take part. Each owns an equal slice.
            worker: one of them.
            elements: elements of each delta.
            codec: the codec of the deltas.
        """
        k, n, sends = len(workers), len(senders), worker in senders
        others = k - 1
        delta, of_sum = codec.wire_bytes(elements), codec.of_sum(n).wire_bytes(elements)
        if n == 1:  # who has sent all of it knows the sum
            sent, received = (2 * others / k, 0.0) if sends else ((others - 1) / k, 1.0)
            return sent * delta, received * delta
        return (others * sends * delta + others * of_sum) / k, ((n - sends) * delta + others * of_sum) / k

    def _site_bytes(
        self, senders: Sequence[int], workers: Sequence[int], site: int, elements: int, codec: Codec
    ) -> tuple[float, float]:
        """Bytes of deltas and sums that leave and enter a site in a reduce; see :meth:`reduce_bytes`."""
        there = sum(self._site(worker) == site for worker in workers) / len(workers)
        sending = sum(self._site(sender) == site for sender in senders)
        delta, of_sum = codec.wire_bytes(elements), codec.of_sum(len(senders)).wire_bytes(elements)
        away, sums = (len(senders) - sending) * delta, len(workers) * there * (1 - there) * of_sum
        return sending * (1 - there) * delta + sums, away * there + sums

    @staticmethod
    def _kinds(senders: Sequence[int], workers: Sequence[int]) -> set[int]:
        """A sender, and a worker that does not send, if there is one: all of a kind have the same load."""
        rest = set(workers).difference(senders)
        return {senders[0], *list(rest)[:1]}

    def _load_seconds(self, senders: Iterable[int], workers: Sequence[int], size: int) -> float:
        """Seconds of a simultaneous transfer of ``size`` bytes from each sender to each other worker."""
        peers = len(workers) - 1
        senders = set(senders)
        if peers < 1:
            return 0.0
        most_received = len(senders) - (1 if senders.issuperset(workers) else 0)
        seconds = size * max(peers, most_received) / self.bandwidth
        if self.sites is not None:
            there = Counter(self._site(worker) for worker in workers)
            sending = Counter(self._site(sender) for sender in senders)
            out = max(sending[site] * (len(workers) - there[site]) for site in there)
            into = max((len(senders) - sending[site]) * there[site] for site in there)
            seconds = max(seconds, size * max(out, into) / self.site_bandwidth)
        return seconds

    def _site(self, worker: int) -> int:
        return self.sites[worker] if self.sites is not None else 0

    def _one_of_each(self, workers: Iterable[int]) -> Iterable[int]:
        return {self._site(worker): worker for worker in workers}.values()

    def _sites_of(self, workers: Iterable[int]) -> int:
        return 1 if self.sites is None else len({self._site(worker) for worker in workers})
