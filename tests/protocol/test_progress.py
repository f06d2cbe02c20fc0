"""What a run starts from, and what may be told of it."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields

import pytest

from lightning_async_localsgd.protocol.progress import NO_REFERENCE_TURN, Progress


@pytest.mark.parametrize("workers", [1, 3])
def test_at_the_start_nothing_is_made_and_nobody_is_limited(workers: int) -> None:
    progress = Progress.at_start(workers, 50)
    per_worker = [field.name for field in fields(Progress) if isinstance(getattr(progress, field.name), tuple)]
    assert set(per_worker) == {"steps", "speeds", "round_steps", "shard_samples", "dropped", "reference_turn"}
    for name in set(per_worker) - {"reference_turn"}:
        assert getattr(progress, name) == (50 if name == "round_steps" else 0,) * workers
    assert (progress.version, progress.local_steps, progress.caps, progress.reference_turn) == (
        0,
        50,
        None,
        NO_REFERENCE_TURN,
    )
    assert not (progress.exhausted or progress.stop or progress.over)


def test_a_turn_does_not_change_the_progress_of_the_one_before() -> None:
    with pytest.raises(FrozenInstanceError):
        Progress.at_start(2, 50).version = 1  # type: ignore[misc]
