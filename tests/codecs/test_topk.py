"""The largest elements of each block arrive, at their places, within the precision of their bits."""

from __future__ import annotations

import pytest
import torch

from lightning_async_localsgd.codecs import INT8, TopK
from tests.codecs.test_base import decoded, vector


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("density", [1e-4, 0.01, 0.03, 0.5, 1.0])
def test_the_largest_elements_arrive(density: float, bits: int) -> None:
    codec = TopK(density, bits)
    x = vector(3 * 4096 + 1001)
    for block, out in zip(x.split(4096), decoded(codec, x).split(4096), strict=True):
        largest = block.abs().sort(descending=True).values[: codec.kept]
        sent = block.abs() >= largest[-1]
        assert (out[~sent] == 0).all()
        step = block.abs().max() / 127
        if bits == 8:
            assert ((out - block)[sent].abs() <= 0.503 * step).all()
        else:
            assert ((out - block)[sent].abs() <= (largest[0] - largest[-1]) / 2 + 1.1 * step).all()
            assert len(out[sent].abs().unique()) <= 2
            assert (out[sent] * block[sent] >= 0).all()


def test_two_bits_are_the_means_of_small_and_large() -> None:
    x = torch.zeros(4096)
    x[[5, 900, 4000, 4095]] = torch.tensor([127.0, -121.0, 10.0, -20.0])
    out = decoded(TopK(4 / 4096, bits=2), x)
    assert out[[5, 900, 4000, 4095]].tolist() == [124.0, -124.0, 15.0, -15.0]


def test_positions_take_about_seven_bits() -> None:
    codec = TopK()
    assert codec.kept == 123
    bits = (codec.wire_bytes(4096) - 2) * 8 / codec.kept - codec.bits
    assert 7 < bits < 7.2
    assert codec.wire_bytes(1 << 20) / (4 << 20) < 0.0144
    assert TopK(bits=2).wire_bytes(1 << 20) / (4 << 20) < 0.0089


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("density", [1e-4, 0.01, 0.03, 0.3, 1.0])
@pytest.mark.parametrize("count", [1, 2, 3, 8, 40])
def test_a_sum_has_room_for_all_elements_and_is_at_most_dense(count: int, density: float, bits: int) -> None:
    codec = TopK(density, bits)
    of_sum = codec.of_sum(count)
    if count == 1:
        assert of_sum == codec
    else:
        assert of_sum == INT8() or (of_sum.kept == min(4096, count * codec.kept) and of_sum.bits == 8)
        assert of_sum.wire_bytes(4096) <= INT8().wire_bytes(4096)
    assert codec.block % of_sum.block == 0


@pytest.mark.parametrize("arguments", [{"density": 0.0}, {"density": 1.1}, {"bits": 4}, {"error_decay": 1.1}])
def test_impossible_parameters_are_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        TopK(**arguments)  # type: ignore[arg-type]


def test_parameters_tell_codecs_apart() -> None:
    assert TopK(0.01, 2) == TopK(density=0.01, bits=2) != TopK()
    assert repr(TopK()) == "TopK(density=0.03, bits=8, error_decay=1.0)"
