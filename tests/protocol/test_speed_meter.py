"""The speed of training alone, by a clock that the test turns."""

from __future__ import annotations

import pytest

from lightning_async_localsgd.protocol.speed_meter import SpeedMeter


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def make_steps(watch: SpeedMeter, clock: Clock, seconds: list[float], between: float = 0.0) -> None:
    for step in seconds:
        watch.resume()
        clock.now += step
        watch.step()
        clock.now += between


def test_the_first_step_tells_nothing(clock: Clock) -> None:
    watch = SpeedMeter(50, clock)
    make_steps(watch, clock, [100.0])
    assert watch.speed(50) == 0.0
    make_steps(watch, clock, [0.5])
    assert watch.speed(50) == 2.0


def test_time_between_steps_and_in_a_pause_does_not_count(clock: Clock) -> None:
    watch = SpeedMeter(50, clock)
    make_steps(watch, clock, [0.5] * 10, between=7.0)
    watch.resume()
    clock.now += 0.25
    watch.pause()
    clock.now += 1000.0
    watch.pause()  # one pause within another
    assert watch.resume() == 1000.0
    clock.now += 0.25
    watch.step()
    assert watch.speed(50) == pytest.approx(2.0)


@pytest.mark.parametrize(("round_steps", "expected"), [(20, 1 / 0.25), (10, 1 / 0.25), (1, 1 / 0.25), (40, 40 / 25)])
def test_a_speed_is_that_of_the_last_round_and_of_no_fewer_than_eight_steps(
    round_steps: int, expected: float, clock: Clock
) -> None:
    watch = SpeedMeter(40, clock)
    make_steps(watch, clock, [1.0] * 41 + [0.25] * 20)
    assert watch.speed(round_steps) == pytest.approx(expected)
    make_steps(watch, clock, [2.0] * 4)
    assert watch.speed(1) == pytest.approx(8 / (4 * 0.25 + 4 * 2.0))


def test_rounds_of_a_single_step_are_measured_over_eight(clock: Clock) -> None:
    watch = SpeedMeter(1, clock)
    make_steps(watch, clock, [1.0] * 5 + [2.0] * 4)
    assert watch.speed(1) == pytest.approx(8 / (4 * 1.0 + 4 * 2.0))


def test_a_clock_that_stands_still_gives_no_speed(clock: Clock) -> None:
    watch = SpeedMeter(50, clock)
    make_steps(watch, clock, [0.0] * 5)
    assert watch.speed(50) == 0.0
