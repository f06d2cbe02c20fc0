"""The parameters that each worker's round began from, and how many copies of them are kept."""

from __future__ import annotations

import torch

from lightning_async_localsgd.outer.round_starts import RoundStarts


def test_workers_that_start_together_share_a_copy_and_at_most_one_per_worker_is_kept() -> None:
    parameters = torch.zeros(3)
    starts = RoundStarts(parameters, 4)

    def move(*workers: int) -> None:
        starts.before_move()
        parameters.add_(1)
        starts.begin(workers)

    assert len(starts.state_dict()["copies"]) == 0
    move()
    assert len(starts.state_dict()["copies"]) == 1
    for worker in range(4):
        move(worker)
    assert [starts.of(worker)[0].item() for worker in range(4)] == [2, 3, 4, 5]
    assert len(starts.state_dict()["copies"]) == 3 and starts.of(3) is parameters
    move()
    move()
    assert [starts.of(worker)[0].item() for worker in range(4)] == [2, 3, 4, 5]
    assert len(starts.state_dict()["copies"]) == 4
    move(0, 1, 2, 3)
    assert len(starts.state_dict()["copies"]) == 0


def test_what_is_kept_survives_a_round_trip() -> None:
    parameters = torch.zeros(3)
    starts = RoundStarts(parameters, 3)
    for worker in (0, 1):
        starts.before_move()
        parameters.add_(1)
        starts.begin([worker])
    restored = RoundStarts(parameters, 3)
    restored.load_state_dict(starts.state_dict())
    assert [restored.of(worker)[0].item() for worker in range(3)] == [1, 2, 0]
    for _ in range(2):  # writes over the copies that nobody needs any more
        starts.begin(range(3))
        starts.before_move()
        parameters.add_(1)
    assert [restored.of(worker)[0].item() for worker in (0, 2)] == [1, 0]


def test_with_another_number_of_workers_all_begin_from_the_parameters_of_now() -> None:
    parameters = torch.zeros(3)
    starts = RoundStarts(parameters, 2)
    starts.before_move()
    parameters.add_(1)
    restored = RoundStarts(parameters, 3)
    restored.load_state_dict(starts.state_dict())
    assert all(restored.of(worker) is parameters for worker in range(3))
