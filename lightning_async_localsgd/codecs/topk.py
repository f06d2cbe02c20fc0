"""A codec that sends the largest elements of each chunk alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_async_localsgd.codecs.blocks import INT8, LARGEST, SCALE_BYTES, SMALLEST_SCALE, filled, pieces
from lightning_async_localsgd.codecs.floats import typed

__all__ = ["TopK"]

_BITS = 12
_BLOCK = 1 << _BITS


@dataclass(frozen=True)
class TopK:
    """Sends the elements of largest magnitude of each block of 4096, the others as zeros.

    Wire form of a block: a scale in bf16, with 2 bits per value two magnitudes of one byte each, then bit by bit the
    positions in rising order (Elias-Fano code: about 7 bits each at 3%) and the values. 3% in 8 bits are 0.46 bits
    per element of the block, in 2 bits 0.28. A decoded value is an exact product of the scale and a whole number.

    A value of 8 bits is rounded to one of 255 levels. A value of 2 bits is a sign and one of the two magnitudes: the
    means of the small and of the large half of the range. The sum of several deltas holds all elements of each.

    Args:
        density: part of the elements that is sent, more than 0 and at most 1.
        bits: bits per value, 2 or 8.
        error_decay: part of what was not sent so far that is added to the next delta, from 0 to 1. Less than 1: what
            is sent is the largest of a momentum of deltas, from which what was sent is taken away.

    Raises:
        ValueError: if an argument is outside its range.

    References:
        Sarfi et al., "Communication Efficient LLM Pre-training with SparseLoCo", arXiv 2508.15706.
    """

    density: float = 0.03
    bits: int = 8
    error_decay: float = 1.0

    name: ClassVar[str] = "topk"
    block: ClassVar[int] = _BLOCK
    largest: ClassVar[float] = LARGEST
    lossless: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(f"`density` must be more than 0 and at most 1, got {self.density}.")
        if self.bits not in (2, 8):
            raise ValueError(f"`bits` must be 2 or 8, got {self.bits}.")
        if not 0 <= self.error_decay <= 1:
            raise ValueError(f"`error_decay` must be from 0 to 1, got {self.error_decay}.")

    @property
    def kept(self) -> int:
        """Elements of a block that are sent."""
        return max(1, round(self.density * _BLOCK))

    def of_sum(self, count: int) -> TopK | INT8:
        """A codec that has room for all elements of the deltas, in 8 bits: a sum is not made sparse again.

        ``count`` times as many elements per block; :class:`INT8` where all elements take fewer bytes than that.
        """
        if count == 1:
            return self
        sparse = TopK(min(1.0, count * self.kept / _BLOCK))
        dense = INT8()
        return sparse if sparse.wire_bytes(_BLOCK) <= dense.wire_bytes(_BLOCK) else dense

    def wire_bytes(self, numel: int) -> int:
        """The same for each begun block of 4096 elements."""
        return -(-numel // _BLOCK) * self._row_bytes

    def encode(self, chunk: Tensor, out: Tensor | None = None) -> Tensor:
        """Select, scale and round the largest elements of each block."""
        if out is None:
            out = torch.empty(self.wire_bytes(chunk.numel()), dtype=torch.uint8, device=chunk.device)
        rows = out.view(-1, self._row_bytes)
        for blocks, elements in pieces(chunk, _BLOCK):
            piece = filled(chunk[elements], _BLOCK)
            positions = piece.abs().topk(self.kept, dim=1, sorted=False).indices.sort(dim=1).values
            values = piece.gather(1, positions)
            scale = values.abs().amax(1, keepdim=True).div_(127).clamp_(min=SMALLEST_SCALE).to(torch.bfloat16)
            whole = values.mul_(scale.float().reciprocal_()).round_().int()
            levels, codes = (whole[:, :0], whole) if self.bits == 8 else _two_magnitudes(whole, values.signbit())
            body = _pack(torch.cat([self._position_bits(positions), _bits(codes, self.bits)], dim=1))
            rows[blocks].copy_(torch.cat([scale.view(torch.uint8), levels.to(torch.uint8), body], dim=1))
        return out

    def decode(self, wire: Tensor, out: Tensor, add: bool = False) -> None:
        """Write the sent elements between zeros, or add them."""
        rows = wire.view(-1, self._row_bytes)
        for blocks, elements in pieces(out, _BLOCK):
            target, row = out[elements], rows[blocks]
            positions, values = self._unpack(row)
            if target.numel() % _BLOCK == 0:
                dense = target.view(-1, _BLOCK)
            else:
                dense = torch.zeros(1, _BLOCK, device=out.device)
            if add:
                dense.scatter_add_(1, positions, values)
            else:
                dense.zero_().scatter_(1, positions, values)
            if dense.data_ptr() == target.data_ptr():
                continue
            used = dense.flatten()[: target.numel()]
            if add:
                target.add_(used)
            else:
                target.copy_(used)

    def _unpack(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Positions (int64) and values (fp32) of each block, shape (blocks, kept)."""
        scale = typed(rows[:, :SCALE_BYTES].flatten(), torch.bfloat16).float().unsqueeze(1)
        bits = _bits(rows[:, self._head_bytes :], 8)
        ends = [self._upper_bits, self._upper_bits + self.kept * self._low]
        upper, lower = bits[:, : ends[0]], bits[:, ends[0] : ends[1]]
        high = upper.nonzero()[:, 1].view(len(rows), self.kept) - torch.arange(self.kept, device=rows.device)
        positions = (high << self._low) + _whole(lower.reshape(len(rows), self.kept, self._low))
        codes = _whole(bits[:, ends[1] : ends[1] + self.kept * self.bits].reshape(len(rows), self.kept, self.bits))
        if self.bits == 8:
            whole = codes.to(torch.uint8).view(torch.int8)
        else:
            magnitudes = rows[:, SCALE_BYTES : self._head_bytes].to(torch.int64).gather(1, codes & 1)
            whole = torch.where(codes >= 2, -magnitudes, magnitudes)
        return positions, whole * scale

    def _position_bits(self, positions: Tensor) -> Tensor:
        """Elias-Fano code: the lower bits as they are; the upper number h of the i-th position as bit h + i."""
        upper = torch.zeros(len(positions), self._upper_bits, dtype=torch.uint8, device=positions.device)
        upper.scatter_(1, (positions >> self._low) + torch.arange(self.kept, device=positions.device), 1)
        return torch.cat([upper, _bits(positions, self._low)], dim=1)

    @property
    def _low(self) -> int:
        """Lower bits of a position, so many that the code is shortest."""
        return min(range(_BITS + 1), key=lambda low: self.kept * low + (_BLOCK >> low))

    @property
    def _upper_bits(self) -> int:
        return self.kept + (_BLOCK >> self._low)

    @property
    def _head_bytes(self) -> int:
        return SCALE_BYTES + (2 if self.bits == 2 else 0)

    @property
    def _row_bytes(self) -> int:
        return self._head_bytes + -(-(self._upper_bits + self.kept * (self._low + self.bits)) // 8)


def _two_magnitudes(whole: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
    """Two magnitudes for each row, and for each number the choice (bit 0) and the sign (bit 1).

    A small number may be rounded to 0, and its sign still counts.

    Sums of whole numbers: the same in any order.
    """
    magnitude = whole.abs()
    middle = magnitude.amin(1, keepdim=True) + magnitude.amax(1, keepdim=True)
    large = 2 * magnitude > middle
    means = []
    for group in (~large, large):
        number = group.sum(1, keepdim=True).clamp_(min=1)
        means.append((2 * (magnitude * group).sum(1, keepdim=True) + number) // (2 * number))
    return torch.cat(means, dim=1), large + 2 * negative.int()


def _bits(numbers: Tensor, width: int) -> Tensor:
    """The lower ``width`` bits of each whole number of each row, the lowest first (uint8)."""
    shifts = torch.arange(width, dtype=numbers.dtype, device=numbers.device)
    return ((numbers.unsqueeze(2) >> shifts) & 1).to(torch.uint8).flatten(1)


def _whole(bits: Tensor) -> Tensor:
    """The whole numbers (int64) of bits in the last dimension, the lowest first."""
    weights = 1 << torch.arange(bits.shape[-1], device=bits.device)
    return (bits * weights).sum(-1)


def _pack(bits: Tensor) -> Tensor:
    """Eight bits per byte in each row; the last byte is filled with zeros."""
    whole = torch.nn.functional.pad(bits, (0, -bits.shape[1] % 8))
    return _whole(whole.view(len(bits), -1, 8)).to(torch.uint8)
