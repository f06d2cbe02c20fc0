"""Codecs give back what they were given, within their precision."""

from __future__ import annotations

import pytest
import torch

from lightning_async_localsgd.codecs import BF16, FP32, make_codec


def test_fp32_is_exact_and_copies_nothing() -> None:
    x = torch.randn(100)
    assert FP32().decode(FP32().encode(x)).data_ptr() == x.data_ptr()


def test_bf16_rounds_to_eight_bits_in_half_the_bytes() -> None:
    x = torch.randn(1000) * 10.0 ** torch.randint(-20, 20, (1000,))
    wire = BF16().encode(x)
    assert wire.nbytes == x.nbytes // 2
    torch.testing.assert_close(BF16().decode(wire), x, rtol=2**-8, atol=0)


def test_largest_survives_and_more_does_not() -> None:
    codec = BF16()
    assert torch.isfinite(codec.decode(codec.encode(torch.tensor([codec.largest])))).all()
    assert not torch.isfinite(codec.decode(codec.encode(torch.tensor([FP32.largest])))).all()


def test_codecs_are_found_by_name() -> None:
    assert make_codec("bf16").name == "bf16"
    with pytest.raises(ValueError, match="codec"):
        make_codec("zip")
