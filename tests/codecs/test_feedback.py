"""With error feedback nothing is lost: it comes later."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_async_localsgd.codecs import FP32, INT4, Codec, ErrorFeedback, TopK, codecs_by_name

NUMEL = 9001
EVERY = pytest.mark.parametrize("codec", [*codecs_by_name().values(), TopK(bits=2)], ids=repr)


def send(feedback: ErrorFeedback, codec: Codec, delta: torch.Tensor, length: int = 1 << 14) -> torch.Tensor:
    """What the others apply of a delta that is sent in chunks."""
    out = torch.empty_like(delta)
    for start in range(0, delta.numel(), length):
        chunk = delta[start : start + length].clone()
        codec.decode(feedback.encode(codec, chunk, start), out[start : start + length])
    return out


@EVERY
@settings(deadline=None)
@given(seed=st.integers(0, 1000), rounds=st.integers(1, 12))
def test_what_arrives_tracks_what_was_given(codec: Codec, seed: int, rounds: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    feedback = ErrorFeedback(NUMEL)
    given_sum, sent_sum, other = (torch.zeros(NUMEL, dtype=torch.float64) for _ in range(3))
    for _ in range(rounds):
        delta = torch.randn(NUMEL, generator=generator) ** 3
        given_sum += delta
        sent_sum += send(feedback, codec, delta)
        error = torch.randn(NUMEL, generator=generator) * (0 if codec.lossless else 0.01)
        other += error
        if not codec.lossless:
            feedback.keep(error[4096:].float(), 4096)
    other[:4096] = 0
    residual = feedback.state_dict()["residual"]
    left = torch.zeros(NUMEL) if residual is None else residual
    torch.testing.assert_close(sent_sum + left.double(), given_sum + other, rtol=0, atol=1e-3)


@pytest.mark.parametrize("codec", [c for c in codecs_by_name().values() if c.name not in ("fp32", "topk")], ids=repr)
def test_what_is_left_is_one_quantization_error(codec: Codec) -> None:
    feedback = ErrorFeedback(NUMEL)
    for _ in range(20):
        delta = torch.randn(NUMEL)
        send(feedback, codec, delta)
        given_then = delta  # the residual is the error of this delta and of the residual before, alone
    residual = feedback.state_dict()["residual"]
    assert residual.abs().max() <= 0.5 * given_then.abs().max()


def test_chunks_give_what_the_whole_gives() -> None:
    whole, parts = ErrorFeedback(NUMEL), ErrorFeedback(NUMEL)
    for _ in range(3):
        delta = torch.randn(NUMEL)
        assert torch.equal(send(whole, INT4(), delta), send(parts, INT4(), delta, length=1024))
    assert torch.equal(whole.state_dict()["residual"], parts.state_dict()["residual"])


def test_a_lossless_codec_needs_nothing_and_empties_what_is_left() -> None:
    feedback = ErrorFeedback(NUMEL)
    delta = torch.randn(NUMEL)
    assert torch.equal(send(feedback, FP32(), delta), delta)
    assert feedback.state_dict() == {"residual": None}
    sent = send(feedback, INT4(), delta) + send(feedback, FP32(), delta)
    torch.testing.assert_close(sent, 2 * delta)
    assert not feedback.state_dict()["residual"].any()


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.95])
@pytest.mark.parametrize("length", [4096, 1 << 14])
def test_what_is_left_decays(decay: float, length: int) -> None:
    codec, feedback, left = TopK(error_decay=decay), ErrorFeedback(NUMEL), torch.zeros(NUMEL)
    for _ in range(4):
        delta = torch.randn(NUMEL)
        sent = send(feedback, codec, delta, length)
        expected = send(ErrorFeedback(NUMEL), TopK(), decay * left + delta)
        assert torch.equal(sent, expected)
        left = decay * left + delta - sent
        assert torch.equal(feedback.state_dict()["residual"], left)


@pytest.mark.parametrize("codec", [TopK(), TopK(0.01, 2, 0.9)], ids=repr)
def test_a_restored_state_goes_on_to_the_bit(codec: TopK) -> None:
    first, second = ErrorFeedback(NUMEL), ErrorFeedback(NUMEL)
    second.load_state_dict(first.state_dict())
    delta = torch.randn(NUMEL)
    send(first, codec, delta)
    second.load_state_dict(first.state_dict())
    assert torch.equal(send(first, codec, delta), send(second, codec, delta))
    assert torch.equal(first.state_dict()["residual"], second.state_dict()["residual"])
    with pytest.raises(ValueError, match="9001"):
        ErrorFeedback(3).load_state_dict(first.state_dict())


@pytest.mark.parametrize("codec", [INT4(), TopK(error_decay=0.95)], ids=repr)
def test_an_abandoned_turn_leaves_no_error_and_its_delta_can_be_sent_again(codec: Codec) -> None:
    generator = torch.Generator().manual_seed(0)
    first, delta, error = (torch.randn(NUMEL, generator=generator) for _ in range(3))
    feedback, other = ErrorFeedback(NUMEL), ErrorFeedback(NUMEL)
    for each in (feedback, other):
        each.can_undo = True
        each.encode(codec, first.clone(), 0)
        each.keep(error[:500], 4000)
        each.begin_turn()
    sent = delta.clone()
    feedback.encode(codec, sent, 0)  # it has the errors of before from now on
    feedback.keep(error[:100], 8000)
    feedback.undo_turn()
    again, once = torch.empty(NUMEL), torch.empty(NUMEL)
    codec.decode(feedback.encode(codec, sent, 0), again)
    codec.decode(other.encode(codec, delta.clone(), 0), once)
    assert torch.equal(again, once)


def test_a_turn_that_is_over_cannot_be_undone_and_a_sum_that_was_not_applied_leaves_no_error() -> None:
    feedback = ErrorFeedback(NUMEL)
    feedback.can_undo = True
    feedback.encode(INT4(), torch.randn(NUMEL), 0)
    feedback.begin_turn()
    before = feedback.state_dict()["residual"].clone()
    feedback.undo_turn()
    assert torch.equal(feedback.state_dict()["residual"], before)
    feedback.keep(torch.ones(100), 50)
    feedback.undo_turn()
    assert torch.equal(feedback.state_dict()["residual"], before)
