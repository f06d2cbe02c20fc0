"""Codecs that write a block of elements as one scale and small whole numbers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from lightning_async_localsgd.codecs.floats import typed

__all__ = ["E3M0", "INT4", "INT8"]

BLOCK = 128
SCALE_BYTES = 2
SMALLEST_SCALE = 2.0**-126
"""The smallest normal fp32 number: products with whole numbers of 8 bits stay exact."""
LARGEST = 2.0**127
"""Below the largest fp32 number by more than the rounding of a scale."""
_PIECE = 1 << 18
"""Elements per step on the CPU: so few that intermediate results stay in the cache, so many that calls cost little."""


@dataclass(frozen=True)
class _BlockCodec(ABC):
    """Wire form of ``m`` blocks: ``m`` scales in bf16, then the codes of all blocks.

    A decoded value is the product of a scale and a whole number of at most 8 bits. A scale has 8 significant bits, so
    that the product is exact in fp32: addition rounds once, with or without fused multiply-add. The last block of a
    chunk is filled with zeros.
    """

    block: ClassVar[int] = BLOCK
    largest: ClassVar[float] = LARGEST
    lossless: ClassVar[bool] = False
    error_decay: ClassVar[float] = 1.0
    top: ClassVar[int]
    """The whole number that stands for the largest magnitude of a block."""
    _code_bytes: ClassVar[int]
    """Bytes of the codes of a block."""

    def of_sum(self, count: int) -> Self:
        """This codec: the error of a sum is in proportion to the sum."""
        return self

    def wire_bytes(self, numel: int) -> int:
        """A scale and the codes for each begun block of 128 elements."""
        return -(-numel // BLOCK) * (SCALE_BYTES + self._code_bytes)

    def encode(self, chunk: Tensor, out: Tensor | None = None) -> Tensor:
        """Scale each block by its largest magnitude and round each element to the nearest level."""
        if out is None:
            out = torch.empty(self.wire_bytes(chunk.numel()), dtype=torch.uint8, device=chunk.device)
        scales, codes = self._parts(out)
        for blocks, elements in pieces(chunk):
            piece = filled(chunk[elements])
            scratch = piece.abs()
            scale = scratch.amax(1, keepdim=True).div_(self.top).clamp_(min=SMALLEST_SCALE).to(torch.bfloat16)
            scales[blocks].copy_(scale.view(torch.uint8))
            self._quantize(piece, scale.float(), scratch, codes[blocks])
        return out

    def decode(self, wire: Tensor, out: Tensor, add: bool = False) -> None:
        """Write or add the products of scales and whole numbers."""
        scales, codes = self._parts(wire)
        all_scales = typed(scales.flatten(), torch.bfloat16).float().unsqueeze(1)
        for blocks, elements in pieces(out):
            target, scale = out[elements], all_scales[blocks]
            whole = target.numel() % BLOCK == 0
            if whole and not add:
                self._expand(codes[blocks], scale, target.view(-1, BLOCK))
                continue
            values = torch.empty(len(scale), BLOCK, device=out.device)
            self._expand(codes[blocks], scale, values)
            used = values.flatten()[: target.numel()]
            if add:
                target.add_(used)
            else:
                target.copy_(used)

    def _parts(self, wire: Tensor) -> tuple[Tensor, Tensor]:
        """Bytes of the scales (blocks, 2) and of the codes (blocks, code bytes)."""
        number = wire.numel() // (SCALE_BYTES + self._code_bytes)
        scales, codes = wire[: SCALE_BYTES * number], wire[SCALE_BYTES * number :]
        return scales.view(number, SCALE_BYTES), codes.view(number, self._code_bytes)

    @abstractmethod
    def _quantize(self, piece: Tensor, scale: Tensor, scratch: Tensor, codes: Tensor) -> None:
        """Write the codes of ``piece`` (fp32, blocks by 128), by scales (fp32, blocks by 1)."""

    @abstractmethod
    def _expand(self, codes: Tensor, scale: Tensor, values: Tensor) -> None:
        """Write the decoded values (fp32, blocks by 128)."""


@dataclass(frozen=True)
class INT8(_BlockCodec):
    """Rounds to 255 equidistant levels per block of 128 elements: 8.125 bits per element."""

    name: ClassVar[str] = "int8"
    top: ClassVar[int] = 127
    _code_bytes: ClassVar[int] = BLOCK

    def _quantize(self, piece: Tensor, scale: Tensor, scratch: Tensor, codes: Tensor) -> None:
        codes.view(torch.int8).copy_(torch.mul(piece, scale.reciprocal(), out=scratch).round_())

    def _expand(self, codes: Tensor, scale: Tensor, values: Tensor) -> None:
        torch.mul(codes.view(torch.int8), scale, out=values)


@dataclass(frozen=True)
class _Nibbles(_BlockCodec):
    """Two elements per byte, the first in the lower half."""

    levels: ClassVar[tuple[int, ...]]
    """The whole number of each of the 16 codes."""
    _code_bytes: ClassVar[int] = BLOCK // 2

    def _quantize(self, piece: Tensor, scale: Tensor, scratch: Tensor, codes: Tensor) -> None:
        pairs = self._nearest(piece, scale, scratch).view(torch.int16)  # codes in bits 0 to 3 and 8 to 11
        codes.copy_((pairs >> 4).bitwise_or_(pairs).view(codes.shape))

    def _expand(self, codes: Tensor, scale: Tensor, values: Tensor) -> None:
        pairs = torch.index_select(_pairs(self.levels, codes.device), 0, codes.flatten().int())
        torch.mul(pairs.view(torch.float32).view(values.shape), scale, out=values)

    @abstractmethod
    def _nearest(self, piece: Tensor, scale: Tensor, scratch: Tensor) -> Tensor:
        """The code of the nearest level of each element, in a tensor of 8 bits per element, shape (elements,)."""


@dataclass(frozen=True)
class INT4(_Nibbles):
    """Rounds to 15 equidistant levels per block of 128 elements: 4.125 bits per element."""

    name: ClassVar[str] = "int4"
    top: ClassVar[int] = 7
    levels: ClassVar[tuple[int, ...]] = tuple(range(-8, 8))

    def _nearest(self, piece: Tensor, scale: Tensor, scratch: Tensor) -> Tensor:
        return torch.mul(piece, scale.reciprocal(), out=scratch).round_().add_(8).to(torch.int8).flatten()


@dataclass(frozen=True)
class E3M0(_Nibbles):
    """Rounds to zero or one of seven powers of two, of either sign, times a scale per block of 128 elements.

    A floating-point number of 4 bits (sign and exponent): 4.125 bits per element.

    References:
        Douillard et al., "Streaming DiLoCo with overlapping communication", arXiv 2501.18512, section 2.3.
    """

    name: ClassVar[str] = "e3m0"
    top: ClassVar[int] = 64
    levels: ClassVar[tuple[int, ...]] = (0, 1, 2, 4, 8, 16, 32, 64, 0, -1, -2, -4, -8, -16, -32, -64)

    def _nearest(self, piece: Tensor, scale: Tensor, scratch: Tensor) -> Tensor:
        # Midpoints of levels are multiples of a half: the whole part of twice a scaled element tells the level.
        twice = torch.mul(piece, 2 / scale, out=scratch).int().flatten()
        return torch.index_select(_codes(piece.device), 0, twice.add_(2 * self.top))


def pieces(vector: Tensor, block: int = BLOCK) -> Iterator[tuple[slice, slice]]:
    """Slices of blocks, and of the elements in them, that cover a vector.

    A last block that is not full is alone in its piece. On a GPU all full blocks are one piece.
    """
    full = vector.numel() // block
    step = _PIECE // block if vector.device.type == "cpu" else max(1, full)
    for first in range(0, full, step):
        last = min(first + step, full)
        yield slice(first, last), slice(first * block, last * block)
    if full * block < vector.numel():
        yield slice(full, full + 1), slice(full * block, vector.numel())


def filled(piece: Tensor, block: int = BLOCK) -> Tensor:
    """Elements as blocks, the last filled with zeros."""
    missing = -piece.numel() % block
    return (torch.nn.functional.pad(piece, (0, missing)) if missing else piece).view(-1, block)


@cache
def _codes(device: torch.device) -> Tensor:
    """The code of E3M0's nearest level for the whole part of twice a number, from -128 to 128 (uint8, shape (257,))."""
    magnitudes = torch.tensor(E3M0.levels[:8])
    twice = torch.arange(-2 * E3M0.top, 2 * E3M0.top + 1)
    nearest = torch.bucketize(twice.abs(), magnitudes[1:] + magnitudes[:-1], right=True)
    return torch.where(twice < 0, nearest + 8, nearest).to(device, torch.uint8)


@cache
def _pairs(levels: tuple[int, ...], device: torch.device) -> Tensor:
    """The two whole numbers of each byte: pairs of fp32, each pair as one int64, shape (256,)."""
    numbers = torch.tensor(levels, dtype=torch.float32)
    byte = torch.arange(256)
    return torch.stack([numbers[byte & 15], numbers[byte >> 4]], dim=1).view(torch.int64).flatten().to(device)
