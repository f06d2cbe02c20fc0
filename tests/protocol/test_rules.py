"""The settings that the protocol goes by."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_async_localsgd import Settings
from lightning_async_localsgd.protocol.rules import Rules


def test_settings_have_every_rule() -> None:
    settings = Settings()
    rules = [name for name in vars(Rules) if not name.startswith("_")]
    assert len(rules) >= 8 and all(hasattr(settings, name) for name in rules)


@pytest.mark.parametrize(
    ("options", "lockstep", "shares"),
    [
        ({"quorum": 3, "pace": "fixed"}, True, False),
        ({"quorum": 2, "pace": "fixed"}, False, True),
        ({"quorum": 3, "pace": "dylu"}, False, True),
        ({"budget": "per_worker"}, False, False),
    ],
)
def test_workers_in_lockstep_make_as_many_steps_each(options: dict[str, Any], lockstep: bool, shares: bool) -> None:
    rules: Rules = Settings(**options)
    assert (rules.lockstep(3), rules.shares_budget(3)) == (lockstep, shares)
