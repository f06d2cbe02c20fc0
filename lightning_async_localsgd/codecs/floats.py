"""Codecs that send each element as one floating-point number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

__all__ = ["BF16", "FP32", "typed"]

_PIECE = 1 << 18


@dataclass(frozen=True)
class FP32:
    """Sends elements as they are: 4 bytes per element, no copy on the sender's side."""

    name: ClassVar[str] = "fp32"
    block: ClassVar[int] = 1
    largest: ClassVar[float] = torch.finfo(torch.float32).max
    lossless: ClassVar[bool] = True
    error_decay: ClassVar[float] = 1.0

    def of_sum(self, count: int) -> Self:
        """This codec."""
        return self

    def wire_bytes(self, numel: int) -> int:
        """4 bytes per element."""
        return 4 * numel

    def encode(self, chunk: Tensor, out: Tensor | None = None) -> Tensor:
        """The bytes of ``chunk``: a view of it, unless ``out`` is given."""
        wire = chunk.view(torch.uint8)
        return wire if out is None else out.copy_(wire)

    def decode(self, wire: Tensor, out: Tensor, add: bool = False) -> None:
        """Copy or add the elements; nothing to copy if ``wire`` is a view of ``out``."""
        if add or wire.data_ptr() != out.data_ptr():
            _write(typed(wire, torch.float32), out, add)


@dataclass(frozen=True)
class BF16:
    """Rounds elements to the nearest bfloat16: 2 bytes per element, the range of fp32, 8 significant bits."""

    name: ClassVar[str] = "bf16"
    block: ClassVar[int] = 1
    largest: ClassVar[float] = torch.finfo(torch.bfloat16).max
    lossless: ClassVar[bool] = False
    error_decay: ClassVar[float] = 1.0

    def of_sum(self, count: int) -> Self:
        """This codec."""
        return self

    def wire_bytes(self, numel: int) -> int:
        """2 bytes per element."""
        return 2 * numel

    def encode(self, chunk: Tensor, out: Tensor | None = None) -> Tensor:
        """The bytes of the rounded elements."""
        wire = chunk.to(torch.bfloat16).view(torch.uint8)
        return wire if out is None else out.copy_(wire)

    def decode(self, wire: Tensor, out: Tensor, add: bool = False) -> None:
        """Copy or add the elements, widened exactly."""
        _write(typed(wire, torch.bfloat16), out, add)


def typed(wire: Tensor, dtype: torch.dtype) -> Tensor:
    """The bytes of ``wire`` (uint8, contiguous) as numbers of ``dtype``; a copy if they are not aligned."""
    aligned = wire.storage_offset() % dtype.itemsize == 0
    return (wire if aligned else wire.clone()).view(dtype)


def _write(values: Tensor, out: Tensor, add: bool) -> None:
    if add:  # in pieces: an addition of two types makes a copy
        for target, piece in zip(out.split(_PIECE), values.split(_PIECE), strict=True):
            target.add_(piece)
    else:
        out.copy_(values)
