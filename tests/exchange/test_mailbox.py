"""The data passed between the two threads, and its order."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch

from lightning_async_localsgd.exchange import Mailbox, Push
from lightning_async_localsgd.protocol.header import MESSAGE_BYTES, Flag
from lightning_async_localsgd.protocol.messages import Abort, Message, Metrics, SaveNamed
from lightning_async_localsgd.protocol.progress import Progress, ReferenceTurn
from lightning_async_localsgd.protocol.turn import PushedRound

PROGRESS = Progress(0, (0,), (0.0,), (5,), None, False, False, False, (0,), ReferenceTurn(0, ()), 5)
PUSH = Push(torch.zeros(1), torch.ones(1), lambda: None, PushedRound(0, 5, 20, 1.0, 0, 0))


def publish(mailbox: Mailbox, *messages: tuple[int, Message]) -> None:
    mailbox.publish(PROGRESS, [], list(messages), None)


def test_a_push_can_be_taken_back_until_the_exchange_has_it() -> None:
    mailbox = Mailbox(PROGRESS)
    assert mailbox.take_back(9) is None
    mailbox.push(PUSH)
    assert mailbox.take_back(PUSH.round.steps - 1) is None
    assert mailbox.take_back(PUSH.round.steps) is PUSH
    longer = replace(PUSH, round=PUSH.round._replace(steps=6))
    mailbox.push(longer)
    assert mailbox.take()[1] is longer
    assert mailbox.take_back(9) is None


def test_the_exchange_waits_for_a_push_that_is_being_extended_but_not_for_one_that_failed() -> None:
    mailbox = Mailbox(PROGRESS)
    mailbox.push(PUSH)
    mailbox.take_back(9)
    taken: list[Any] = []
    exchange = threading.Thread(target=lambda: taken.append(mailbox.take()), daemon=True)
    exchange.start()
    exchange.join(0.1)
    assert not taken
    mailbox.abort("RuntimeError: \x1b[31mfrozen\ud800")
    exchange.join(10)
    live, push = taken[0]
    assert push is None and Flag.ABORT in live.flags
    assert live.message == Abort("RuntimeError:  [31mfrozen ")


def test_one_message_rides_on_each_header_and_the_last_header_comes_after_all() -> None:
    mailbox = Mailbox(PROGRESS)
    one, two = Metrics({"n": 1.0}), Metrics({"n": 2.0})
    mailbox.send(one)
    mailbox.send(two)
    mailbox.flag(Flag.FINAL)
    first, second, third = (mailbox.take()[0] for _ in range(3))
    assert (first.message, second.message, third.message) == (one, two, None)
    assert [Flag.FINAL in live.flags for live in (first, second, third)] == [False, True, True]
    with pytest.raises(ValueError, match="too long"):
        mailbox.send(Metrics({"y" * MESSAGE_BYTES: 1.0}))
    publish(mailbox, (1, one), (0, two))
    assert mailbox.take_messages() == [(1, one), (0, two)]
    assert mailbox.take_messages() == []


def test_a_cut_stops_the_exchange_until_it_is_released() -> None:
    mailbox = Mailbox(PROGRESS)
    mailbox.send(SaveNamed("x", 0))
    message = mailbox.take()[0].message
    assert message is not None
    publish(mailbox, (0, message))
    assert mailbox.cut == SaveNamed("x", 0) and mailbox.take_messages() == []
    mailbox.wait_for_cut()
    exchange = threading.Thread(target=mailbox.wait_for_release, daemon=True)
    exchange.start()
    exchange.join(0.1)
    assert exchange.is_alive()
    mailbox.release()
    exchange.join(10)
    assert not exchange.is_alive()


def test_nobody_waits_for_a_training_thread_that_has_left() -> None:
    mailbox = Mailbox(PROGRESS)
    mailbox.abort("gone")
    publish(mailbox, (0, SaveNamed("x", 0)))
    mailbox.wait_for_release()
    assert mailbox.cut is None


def test_a_turn_is_held_open_for_a_push_that_is_about_to_come() -> None:
    mailbox = Mailbox(PROGRESS)
    mailbox.standing.report(steps=4, speed=1.0, hold_open_seconds=60.0)
    exchange = threading.Thread(target=mailbox.wait_for_push, daemon=True)
    exchange.start()
    exchange.join(0.1)
    assert exchange.is_alive() and mailbox.push_wanted
    mailbox.push(PUSH)
    exchange.join(10)
    assert not exchange.is_alive() and not mailbox.push_wanted


def test_a_header_without_the_last_push_does_not_say_that_it_was_the_last() -> None:
    mailbox = Mailbox(PROGRESS)
    mailbox.push(PUSH, Flag.FINAL)
    assert Flag.FINAL not in mailbox.take_live().flags
    live, push = mailbox.take()
    assert push is PUSH and Flag.FINAL in live.flags


def test_while_a_turn_is_under_way_no_more_steps_are_made_than_its_header_has_reserved() -> None:
    mailbox = Mailbox(PROGRESS)
    standing = mailbox.standing
    standing.report(1, 1.0, 0.0, reserve=2)
    assert standing.may_begin_step()
    assert mailbox.take()[0][:2] == (1, 2)
    standing.report(2, 1.0, 0.0, reserve=5)
    assert standing.may_begin_step()
    standing.report(3, 1.0, 0.0, reserve=4)
    assert not standing.may_begin_step()
    assert mailbox.take_live()[:2] == (3, 0)  # an early answer to the next turn, which outlives the end of this one
    publish(mailbox)
    assert not standing.may_begin_step()
    publish(mailbox)
    assert standing.may_begin_step()


@pytest.mark.parametrize(("steps", "reserved"), [(7, 2), (9, 1), (10, 0), (11, 0)])
def test_no_more_is_reserved_than_the_share_of_the_latest_turn(steps: int, reserved: int) -> None:
    mailbox = Mailbox(replace(PROGRESS, caps=(10,)))
    mailbox.standing.report(steps, 1.0, 0.0, reserve=2)
    assert mailbox.take()[0][:2] == (steps, reserved)


def test_without_a_shared_budget_no_turn_is_waited_for() -> None:
    mailbox = Mailbox(PROGRESS)
    mailbox.standing.report(1, 1.0, 0.0)
    assert mailbox.take()[0][:2] == (1, 0)
    mailbox.standing.report(100, 1.0, 0.0)
    assert mailbox.standing.may_begin_step()
