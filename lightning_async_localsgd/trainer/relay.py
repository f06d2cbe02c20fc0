"""Tensors from one process to others through the job's store: slower than a group, and a lost taker fails no other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_async_localsgd.exchange.broadcast import as_bytes, from_bytes
from lightning_async_localsgd.membership import StaticJob

__all__ = ["Relay"]

_CHUNK = 4 << 20  # bytes
_AHEAD = 2  # chunks that may wait in the store to be read


class Relay:
    """Process 0 sends, the others receive, chunk by chunk. The store holds a few chunks at a time.

    Args:
        job: the processes.
        name: prefix of the keys in this stage's part of the store.
    """

    def __init__(self, job: StaticJob, name: str) -> None:
        self._job = job
        self._name = name

    def give(self, tensors: Sequence[Tensor], takers: Sequence[int]) -> dict[int, Exception]:
        """Send tensors; called on process 0.

        Args:
            tensors: the tensors.
            takers: ranks of the receiving processes.

        Returns:
            The error of each process that was lost meanwhile, by process.

        Raises:
            PeerLostError: if the store does not answer.
        """
        lost: dict[int, Exception] = {}
        number = 0
        for tensor in tensors:
            wire = as_bytes(tensor).cpu()
            for start in range(0, wire.numel(), _CHUNK):
                self._job.calls.set(self._key(number), bytes(wire[start : start + _CHUNK].numpy()))
                number += 1
                self._clear(number - _AHEAD, takers, lost)
        for rest in range(max(1, number - _AHEAD + 1), number + 1):
            self._clear(rest, takers, lost)
        return lost

    def _clear(self, number: int, takers: Sequence[int], lost: dict[int, Exception]) -> None:
        """Delete the chunk of this number, counted from 1, when all have read it."""
        if number < 1:
            return
        number -= 1
        taken = {rank: f"{self._key(number)}/{rank}" for rank in takers if rank not in lost}
        lost.update(self._job.wait_for_living(taken))
        for key in (self._key(number), *taken.values()):
            self._job.calls.delete_key(key)

    @torch.no_grad()
    def take(self, tensors: Sequence[tuple[Tensor | None, int]]) -> None:
        """Receive tensors; called on the other processes.

        Args:
            tensors: the tensors to overwrite, in process 0's order, each with its size in bytes. None: the tensor sent
                by process 0 is discarded.

        Raises:
            AsyncLocalSGDError: if process 0 is lost.
        """
        number = 0
        for tensor, size in tensors:
            wire = torch.empty(size, dtype=torch.uint8)
            for start in range(0, size, _CHUNK):
                key = self._key(number)
                self._job.wait_for({0: key})
                chunk = bytearray(self._job.calls.get_bytes(key))
                wire[start : start + _CHUNK] = torch.frombuffer(chunk, dtype=torch.uint8)
                self._job.calls.set(f"{key}/{self._job.rank}", "1")
                number += 1
            if tensor is not None:
                from_bytes(tensor, wire)

    def _key(self, number: int) -> str:
        return f"{self._name}/chunk/{number}"
