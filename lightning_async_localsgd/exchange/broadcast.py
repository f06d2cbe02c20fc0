"""One worker's tensors for all: hashes first, then only what differs, in chunks under way at the same time."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from lightning_async_localsgd.exchange.transport import Transport

__all__ = ["as_bytes", "broadcast", "from_bytes"]

_CHUNK = 1 << 20
"""Bytes of a message, which `timeout` applies to."""

_UNDER_WAY = 4
"""Chunks on their way at the same time: so many hide the time to the slowest worker and back."""


@torch.no_grad()
def broadcast(transport: Transport, tensors: Mapping[str, Tensor], rank: int, size: int, root: int = 0) -> None:
    """Give every worker the values of worker ``root``. Called by all at the same time.

    Where all have the same bits, nothing is sent but a hash. What differs is sent to all in chunks, and each chunk has
    a timeout of its own: it is the link that is slow which must not be silent, however long all takes together.

    Args:
        transport: connections to the other workers.
        tensors: by name, dense, on any device; those of ``root`` are read and the others written. What is not on all
            workers, or in another shape or dtype, is left alone, with a warning.
        rank: this worker.
        size: number of workers.
        root: the worker to take the values from.

    Raises:
        PeerLostError: if a worker cannot be reached within the timeout.
    """
    by_key = {_describe(name, tensor): tensor for name, tensor in sorted(tensors.items())}
    hashes = {key: _hash(tensor) for key, tensor in by_key.items()}
    if _all_equal(transport, hashes):
        return
    roots = _root_hashes(transport, hashes, rank == root, root)
    differing = _anyones(transport, [hashes.get(key) != value for key, value in roots.items()], size)
    missing = _anyones(transport, [key not in hashes for key in roots], size)
    keys = list(roots)
    _warn_of([key for key, is_missing in zip(keys, missing, strict=True) if is_missing], root)
    sent = [key for key, *flags in zip(keys, differing, missing, strict=True) if flags == [True, False]]
    _stream(transport, [by_key[key] for key in sent], rank == root, root)


def as_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a dense tensor, where it is: shape ``(n,)``; a copy if it is not contiguous."""
    tensor = tensor.detach().resolve_conj().resolve_neg().contiguous()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.view(-1).view(torch.uint8)


@torch.no_grad()
def from_bytes(tensor: Tensor, data: Tensor) -> None:
    """Overwrite a dense tensor by what :func:`as_bytes` gave of a like one."""
    target = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    target.copy_(data.view(target.dtype).view(target.shape))


def _describe(name: str, tensor: Tensor) -> str:
    return f"{name}: {str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _hash(tensor: Tensor) -> str:
    return hashlib.blake2b(as_bytes(tensor).cpu().numpy().data, digest_size=16).hexdigest()


def _all_equal(transport: Transport, hashes: Mapping[str, str]) -> bool:
    digest = hashlib.blake2b(json.dumps(hashes).encode()).digest()
    return len(set(transport.gather(digest))) == 1


def _root_hashes(transport: Transport, hashes: Mapping[str, str], is_root: bool, root: int) -> dict[str, str]:
    text = torch.frombuffer(bytearray(json.dumps(hashes).encode()), dtype=torch.uint8)
    length = torch.tensor([text.numel()])
    transport.broadcast(length, root)()
    wire = text if is_root else torch.empty(int(length), dtype=torch.uint8)
    _stream(transport, [wire], is_root, root)
    found: dict[str, str] = json.loads(bytes(wire.numpy()))
    return found


def _anyones(transport: Transport, answers: Sequence[bool], size: int) -> list[bool]:
    """To each question, alike on all workers: whether some worker says yes."""
    everyones = [torch.tensor(answers, dtype=torch.uint8) for _ in range(size)]
    for wait in [transport.broadcast(everyones[worker], worker) for worker in range(size)]:
        wait()
    return torch.stack(everyones).amax(0).bool().tolist()


def _stream(transport: Transport, tensors: Sequence[Tensor], is_root: bool, root: int) -> None:
    """Send the values of all these tensors, chunk after chunk, several under way."""
    under_way: deque[tuple[Callable[[], None], Callable[[], object]]] = deque()

    def settle() -> None:
        wait, finish = under_way.popleft()
        wait()
        finish()
        transport.acknowledge(root)()  # else the system would take in what the link has not carried yet

    for chunk, finish in _chunks(tensors, is_root):
        under_way.append((transport.broadcast(chunk, root), finish))
        if len(under_way) == _UNDER_WAY:
            settle()
    while under_way:
        settle()


def _chunks(tensors: Sequence[Tensor], is_root: bool) -> Iterator[tuple[Tensor, Callable[[], object]]]:
    """The bytes of each tensor in chunks on the CPU, and what is to be done when a chunk is there."""
    for tensor in tensors:
        wire = as_bytes(tensor).cpu()
        in_place = wire.data_ptr() == tensor.data_ptr()
        for start in range(0, wire.numel(), _CHUNK):
            is_last = start + _CHUNK >= wire.numel()
            copy = is_last and not is_root and not in_place
            yield wire[start : start + _CHUNK], partial(from_bytes, tensor, wire) if copy else _nothing


def _nothing() -> None:
    """What was received in place is in its place."""


def _warn_of(keys: Sequence[str], root: int) -> None:
    if keys:
        warnings.warn(
            f"{', '.join(keys)} of worker {root} are not on all workers, or of another shape or dtype there: each "
            "keeps its own.",
            stacklevel=4,
        )
