"""Block-wise codecs round each element to the nearest level of its block."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_async_localsgd.codecs import E3M0, INT4, INT8, Codec
from tests.codecs.test_base import decoded, vector

LEVELS = {INT8(): list(range(128)), INT4(): list(range(8)), E3M0(): [0, 1, 2, 4, 8, 16, 32, 64]}
EVERY = pytest.mark.parametrize("codec", LEVELS, ids=repr)


@EVERY
@settings(deadline=None)
@given(data=st.data())
def test_each_element_becomes_its_nearest_level(codec: Codec, data: st.DataObject) -> None:
    finite = st.floats(-(2.0**127), 2.0**127, width=32)
    scaled = st.tuples(st.floats(-1, 1, width=32), st.integers(-149, 126)).map(lambda pair: pair[0] * 2.0 ** pair[1])
    x = torch.tensor(data.draw(st.lists(finite | scaled, min_size=1, max_size=300)), dtype=torch.float32)
    magnitudes = torch.tensor(LEVELS[codec], dtype=torch.float64)
    levels = torch.cat([-magnitudes.flip(0), magnitudes])
    for block, out in zip(x.double().split(128), decoded(codec, x).double().split(128), strict=True):
        scale = (block.abs().max() / magnitudes[-1]).clamp(min=2.0**-126).bfloat16().double()
        nearest = (block[:, None] - levels * scale).abs().min(dim=1).values
        assert (((block - out).abs() - nearest) <= 1e-6 * block.abs()).all()  # the quotient is rounded
        assert (out[:, None] == levels * scale).any(dim=1).all()


@pytest.mark.parametrize("codec", [INT8(), INT4()], ids=repr)
def test_the_error_is_at_most_half_a_step(codec: Codec) -> None:
    x = vector(100_003)
    step = torch.cat([b.abs().max().expand(len(b)) for b in x.split(128)]) / LEVELS[codec][-1]
    assert ((decoded(codec, x) - x).abs() <= 0.503 * step).all()


@pytest.mark.parametrize(("codec", "bits"), [(INT8(), 8.125), (INT4(), 4.125), (E3M0(), 4.125)], ids=repr)
def test_a_scale_is_shared_by_128_elements(codec: Codec, bits: float) -> None:
    assert codec.wire_bytes(1 << 20) * 8 == bits * (1 << 20)
    assert codec.wire_bytes(129) == 2 * codec.wire_bytes(128)
