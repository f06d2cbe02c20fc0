"""The effect of a turn's headers on the shared progress."""

from __future__ import annotations

import pytest

from lightning_async_localsgd import Settings
from lightning_async_localsgd.protocol.budget import Budget
from lightning_async_localsgd.protocol.header import Flag, Header
from lightning_async_localsgd.protocol.ledger import Ledger
from lightning_async_localsgd.protocol.progress import Progress


class NoState:
    """Stands in for a global state that nothing is applied to."""

    version = 0

    def apply(self, arrivals: object) -> None:
        raise AssertionError

    def begin_rounds(self, workers: object) -> None:
        pass

    def set_round_length(self, local_steps: int) -> None:
        pass


@pytest.mark.parametrize(
    ("flags", "exhausted"), [(Flag.STEPPING, True), (Flag.STEPPING | Flag.FINAL, False), (Flag.NONE, False)]
)
def test_a_budget_is_spent_by_steps_that_will_be_made_for_certain(flags: Flag, exhausted: bool) -> None:
    # A worker between two steps that hears of a spent budget makes no other one: none was to be counted for it.
    ledger = Ledger(NoState(), Settings(), Budget(max_steps=5, workers=2), Progress.at_start(2, 50))
    headers = [Header(0, 0, steps=5, flags=Flag.IDLE), Header(1, 0, steps=4, flags=flags)]
    assert ledger.close_turn(headers, []).exhausted is exhausted
