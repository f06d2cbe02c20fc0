"""Floating-point codecs give back what they were given, within their precision."""

from __future__ import annotations

import torch

from lightning_async_localsgd.codecs import BF16, FP32
from tests.codecs.test_base import decoded


def test_fp32_is_exact_and_copies_nothing() -> None:
    x = torch.randn(100)
    wire = FP32().encode(x)
    assert wire.data_ptr() == x.data_ptr()
    FP32().decode(wire, x)
    assert torch.equal(decoded(FP32(), x), x)


def test_bf16_rounds_to_eight_bits_in_half_the_bytes() -> None:
    x = torch.randn(1000) * 10.0 ** torch.randint(-20, 20, (1000,))
    assert BF16().wire_bytes(1000) == x.nbytes // 2
    assert torch.equal(decoded(BF16(), x), x.bfloat16().float())


def test_beyond_the_largest_nothing_survives() -> None:
    assert not decoded(BF16(), torch.tensor([FP32.largest])).isfinite().all()
