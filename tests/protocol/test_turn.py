"""The workers that may hold a turn open, and the header of a pushed round."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lightning_async_localsgd import Settings
from lightning_async_localsgd.protocol.header import Flag, Header
from lightning_async_localsgd.protocol.progress import Progress
from lightning_async_localsgd.protocol.turn import PushedRound, add_round, may_push, turn_interval

PUSHED = PushedRound(round=3, steps=5, samples=20, seconds=1.5, shard=1, start_version=7, fragment=2, fragment_steps=9)


@pytest.mark.parametrize("flags", [Flag.NONE, Flag.STOP])
def test_who_trains_on_may_push_until_it_has(flags: Flag) -> None:
    assert may_push(flags, has_delta=False)
    assert not may_push(flags, has_delta=True)


@pytest.mark.parametrize("flag", [Flag.IDLE, Flag.FINAL, Flag.ABORT, Flag.PAUSED])
def test_who_makes_no_step_does_not_hold_a_turn_open(flag: Flag) -> None:
    assert not may_push(flag | Flag.STOP, has_delta=False)


@pytest.mark.parametrize(("finite", "flag"), [(True, Flag.DELTA), (False, Flag.DROPPED)])
def test_a_header_tells_of_the_round_and_whether_its_delta_is_dropped(finite: bool, flag: Flag) -> None:
    header = add_round(Header(worker=1, turn=2, flags=Flag.STOP), PUSHED, finite)
    assert header.flags == Flag.STOP | flag
    told = header.round, header.round_steps, header.round_samples, header.round_seconds, header.shard
    assert (*told, header.start_version, header.fragment) == PUSHED[:-1]


def test_without_a_round_the_header_stays_as_it_is() -> None:
    header = Header(worker=1, turn=2)
    assert add_round(header, None, finite=True) is header


@pytest.mark.parametrize(
    ("settings", "exchange_seconds", "seconds"),
    [
        ({"turns_per_round": 2}, 0.0, 12.5),
        ({"turns_per_round": 5}, 9.0, 5.0),
        ({}, 0.0, 0.0),  # an exchange that takes no time
        ({}, 1.0, 2.0),
        ({}, 20.0, 12.5),
        ({"turns_per_round": 2, "overlap": False}, 1.0, 0.0),
    ],
)
def test_turns_have_a_rate(settings: dict[str, Any], exchange_seconds: float, seconds: float) -> None:
    progress = replace(Progress.at_start(2, local_steps=50), speeds=(2.0, 0.5), exchange_seconds=exchange_seconds)
    assert turn_interval(progress, Settings(**settings)) == seconds
    unknown = replace(progress, speeds=(0.0, 0.0))
    assert turn_interval(unknown, Settings(**settings)) == 0
