"""The choice of a codec settles on the widest that fits, whatever it begins with."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lightning_async_localsgd.protocol.codec_choice import Candidate, CodecChoice

MB = 1 << 20
CHOICE = CodecChoice([Candidate("fp32", 400 * MB), Candidate("bf16", 200 * MB), Candidate("int4", 52 * MB)])


def settle(choice: CodecChoice, begin: str, seconds: dict[str, float], round_seconds: float) -> list[str]:
    """The codecs of ten turns whose exchanges take these seconds."""
    codecs = [begin]
    for _ in range(10):
        codecs.append(choice.next(codecs[-1], [0.0, seconds[codecs[-1]]], round_seconds))
    return codecs


@given(
    st.sampled_from(["fp32", "bf16", "int4"]),
    st.floats(1e-3, 1e3),
    st.floats(0, 10),
    st.floats(0.1, 100),
)
def test_it_settles_on_a_codec_that_fits_and_stays(begin: str, second: float, latency: float, round_: float) -> None:
    seconds = {"fp32": 400 * second + latency, "bf16": 200 * second + latency, "int4": 52 * second + latency}
    codecs = settle(CHOICE, begin, seconds, round_)
    assert codecs[-1] == codecs[-2] == codecs[-3]
    assert seconds[codecs[-1]] <= round_ / 10 or codecs[-1] == "int4"


def test_fast_links_carry_fp32_from_any_beginning() -> None:
    seconds = {"fp32": 0.06, "bf16": 0.03, "int4": 0.01}
    assert settle(CHOICE, "int4", seconds, 1.0)[-1] == "fp32"


def test_nothing_is_decided_before_anything_is_known() -> None:
    assert CHOICE.next("bf16", [0.0, 0.0], 1.0) == "bf16"
    assert CHOICE.next("bf16", [9.0, 0.0], 0.0) == "bf16"


def test_large_deltas_begin_narrow_and_small_ones_stay_as_they_are() -> None:
    assert CHOICE.first() == "int4"
    small = CodecChoice([Candidate("fp32", 1 << 18), Candidate("int4", 1 << 15)])
    assert small.first() == small.next("fp32", [99.0], 0.1) == "fp32"


def test_of_one_codec_there_is_no_choice() -> None:
    only = CodecChoice([Candidate("bf16", 999 * MB)])
    assert only.first() == only.next("bf16", [100.0], 1.0) == "bf16"
