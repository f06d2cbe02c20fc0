"""Slices cover the vector; a slow link owns little, so that nobody waits for it longer than it must take."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_async_localsgd.protocol.slices import UNIT, owned_slices, slice_shares


@given(st.integers(1, 10**7), st.lists(st.floats(1e3, 1e9), min_size=1, max_size=40))
def test_slices_cover_the_vector_in_rank_order(numel: int, links: list[float]) -> None:
    shares = slice_shares(links)
    assert sum(shares) == pytest.approx(1)
    assert min(shares) >= 0
    spans = owned_slices(numel, shares)
    assert len(spans) == len(links)
    assert (spans[0].start, spans[-1].stop) == (0, numel)
    assert all(before.stop == after.start for before, after in pairwise(spans))
    assert all(span.start % UNIT == 0 or span.start == numel for span in spans)


@given(st.lists(st.sampled_from([1.0, 1 / 4, 1 / 16, 1 / 64]), min_size=3, max_size=12))
def test_no_other_cut_is_faster(rates: list[float]) -> None:
    """Workers that own something are done at the same time, which is when the fastest could be or later; the rest own
    nothing, for already without a slice they take longer."""
    links = [rate / max(rates) * 1e6 for rate in rates]
    shares, k = slice_shares(links), len(rates)
    times = [(1 + share * (k - 2)) / link for share, link in zip(shares, links, strict=True)]
    done = [time for time, share in zip(times, shares, strict=True) if share > 0]
    assert max(done) == pytest.approx(min(done))
    for time, share in zip(times, shares, strict=True):
        assert share > 0 or time >= max(done) * (1 - 1e-9)


def test_equal_links_own_equal_slices_whatever_the_noise() -> None:
    assert slice_shares([9e6, 11e6, 10e6, 12e6]) == pytest.approx([0.25] * 4)
    assert slice_shares([1e10, 2e8, 1.3e8, 6e9]) == pytest.approx([0.25] * 4)  # no exchange waits for these


def test_a_link_of_a_tenth_owns_nothing() -> None:
    shares = slice_shares([1e7, 1e7, 1e7, 1e6])
    assert shares == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0])
    spans = owned_slices(100 * UNIT, shares)
    assert spans[3].start == spans[3].stop
