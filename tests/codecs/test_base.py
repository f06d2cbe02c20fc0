"""Properties of every codec, and codecs by name."""

from __future__ import annotations

import pickle
from dataclasses import FrozenInstanceError

import pytest
import torch
from torch import Tensor

from lightning_async_localsgd.codecs import FP32, Codec, TopK, codecs_by_name, make_codec

EVERY = pytest.mark.parametrize("codec", [*codecs_by_name().values(), TopK(bits=2)], ids=repr)


def decoded(codec: Codec, chunk: Tensor) -> Tensor:
    """What comes out at the other end."""
    out = torch.full_like(chunk, 7.0)
    codec.decode(codec.encode(chunk), out)
    return out


def vector(numel: int, seed: int = 0) -> Tensor:
    """Elements whose magnitudes differ much between regions and within them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(numel, generator=generator) ** 3
    return x * torch.logspace(-6, 3, numel) if numel else x


@EVERY
@pytest.mark.parametrize("numel", [0, 1, 2, 127, 128, 129, 1000, 4097, 200_001])
def test_the_wire_is_as_long_as_told(codec: Codec, numel: int) -> None:
    x = vector(numel)
    before = x.clone()
    wire = codec.encode(x)
    assert wire.dtype == torch.uint8 and wire.shape == (codec.wire_bytes(numel),)
    assert torch.equal(x, before)
    assert decoded(codec, x).shape == x.shape and decoded(codec, x).isfinite().all()


@EVERY
@pytest.mark.parametrize("offset", [0, 1, 2])
def test_a_given_output_is_written_wherever_it_begins(codec: Codec, offset: int) -> None:
    x = vector(5001)
    size = codec.wire_bytes(5001)
    room = torch.full((size + offset + 1,), 77, dtype=torch.uint8)
    out = room[offset : offset + size]
    assert codec.encode(x, out).data_ptr() == out.data_ptr()
    assert torch.equal(out, codec.encode(x))
    assert (room[:offset] == 77).all() and room[-1] == 77
    values = torch.empty_like(x)
    codec.decode(out, values)
    assert torch.equal(values, decoded(codec, x))


@EVERY
def test_decoding_can_add_with_one_rounding(codec: Codec) -> None:
    x, start = vector(140_001), vector(140_001, seed=1)
    out = start.clone()
    codec.decode(codec.encode(x), out, add=True)
    assert torch.equal(out, start + decoded(codec, x))


@EVERY
def test_aligned_chunks_give_the_values_of_the_whole(codec: Codec) -> None:
    x = vector(5 * 4096 * max(1, codec.block // 4096) + 77)
    whole = decoded(codec, x)
    for length in (codec.block, 3 * codec.block, codec.block * -(-4096 // codec.block)):
        if length > 100 or codec.block > 1:
            assert torch.equal(torch.cat([decoded(codec, chunk) for chunk in x.split(length)]), whole)


@EVERY
def test_zeros_stay_zeros(codec: Codec) -> None:
    x = vector(8192)
    x[1000:7000] = 0
    out = decoded(codec, x)
    assert (out[1000:7000] == 0).all()
    assert torch.equal(decoded(codec, torch.zeros(300)).view(torch.int32), torch.zeros(300, dtype=torch.int32))


@EVERY
def test_the_largest_magnitude_and_the_smallest_survive(codec: Codec) -> None:
    x = torch.zeros(500)
    x[3], x[400] = codec.largest, -codec.largest
    out = decoded(codec, x)
    torch.testing.assert_close(out, x, rtol=2**-8, atol=0)
    tiny = torch.full((500,), 2.0**-140)
    assert (decoded(codec, tiny) - tiny).abs().max() <= 2.0**-127


@EVERY
def test_encoding_is_the_same_with_any_number_of_threads(codec: Codec) -> None:
    x = vector(300_000)
    before = torch.get_num_threads()
    wires = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            wires.append(codec.encode(x).clone())
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*wires)


@EVERY
def test_what_is_decoded_does_not_depend_on_flushed_denormals(codec: Codec) -> None:
    x = vector(4096) * 2.0**-120
    wire = codec.encode(x).clone()
    plain, flushed = torch.empty_like(x), torch.empty_like(x)
    codec.decode(wire, plain)
    torch.set_flush_denormal(True)
    try:
        codec.decode(wire, flushed)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(plain, flushed)


@EVERY
def test_the_bytes_of_one_delta_are_those_of_its_sum(codec: Codec) -> None:
    assert codec.of_sum(1) == codec
    assert codec.block % codec.of_sum(3).block == 0


@EVERY
def test_codecs_are_values(codec: Codec) -> None:
    assert codec == pickle.loads(pickle.dumps(codec)) and codec.name in codecs_by_name()
    assert make_codec(codec) is codec
    assert len({pickle.loads(pickle.dumps(codec)), codec, FP32()}) == (1 if codec == FP32() else 2)
    with pytest.raises((FrozenInstanceError, AttributeError)):
        codec.block = 3  # type: ignore[misc]


def test_a_codec_that_is_none_is_refused() -> None:
    for wrong in ("zip", 3, object()):
        with pytest.raises(ValueError, match="codec"):
            make_codec(wrong)  # type: ignore[arg-type]
