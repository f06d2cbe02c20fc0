"""Pace policies follow Eq. 6."""

from __future__ import annotations

import pytest

from lightning_async_localsgd.protocol.pace import DynamicLocalUpdates, FixedPace, make_pace


def test_dylu_is_equation_6() -> None:
    speeds = [1 / 0.58, 1 / 0.75, 1 / 1.51, 1 / 3.33]
    assert DynamicLocalUpdates().steps(speeds, 50) == [50, 38, 19, 8]


def test_dylu_gives_at_least_one_step_and_full_rounds_while_a_speed_is_unknown() -> None:
    assert DynamicLocalUpdates().steps([100.0, 0.001, 0.0], 20) == [20, 1, 20]
    assert DynamicLocalUpdates().steps([0.0, 0.0], 20) == [20, 20]


def test_fixed_ignores_speeds() -> None:
    assert FixedPace().steps([1.0, 5.0], 7) == [7, 7]


def test_policies_are_found_by_name_or_taken_as_objects() -> None:
    assert isinstance(make_pace("dylu"), DynamicLocalUpdates)
    policy = FixedPace()
    assert make_pace(policy) is policy
    with pytest.raises(ValueError, match="tolerance"):
        DynamicLocalUpdates(tolerance=1.0)
    for wrong in ("fast", object()):
        with pytest.raises(ValueError, match="pace"):
            make_pace(wrong)  # type: ignore[arg-type]
