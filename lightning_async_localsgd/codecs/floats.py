"""Codecs that send each element as one floating-point number."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["BF16", "FP32"]


class FP32:
    """Sends deltas as they are: 4 bytes per element, no copy on either side."""

    name = "fp32"
    wire_dtype = torch.float32
    largest = torch.finfo(torch.float32).max

    def encode(self, chunk: Tensor) -> Tensor:
        """``chunk`` itself."""
        return chunk

    def decode(self, wire: Tensor) -> Tensor:
        """``wire`` itself."""
        return wire


class BF16:
    """Rounds deltas to bfloat16: 2 bytes per element, the range of fp32, 8 significant bits."""

    name = "bf16"
    wire_dtype = torch.bfloat16
    largest = torch.finfo(torch.bfloat16).max

    def encode(self, chunk: Tensor) -> Tensor:
        """``chunk`` rounded to the nearest bfloat16."""
        return chunk.to(torch.bfloat16)

    def decode(self, wire: Tensor) -> Tensor:
        """``wire`` widened to fp32, exactly."""
        return wire.to(torch.float32)
