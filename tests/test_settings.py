"""Impossible settings are refused where they are given."""

from __future__ import annotations

import json
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch

from lightning_async_localsgd import AsyncLocalSGD, AsyncLocalSGDStrategy, Settings
from lightning_async_localsgd.fabric import AsyncLocalSGDFabricStrategy
from lightning_async_localsgd.outer import (
    AsyncBuffer,
    Context,
    DelayedNesterov,
    Poly,
    PolyThres,
    Transform,
)

NET = torch.nn.Linear(1, 1)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"local_steps": 0}, "local_steps"),
        ({"quorum": 0}, "quorum"),
        ({"grace_period": -1}, "grace_period"),
        ({"budget": "both"}, "budget"),
        ({"pace": "slow"}, "pace"),
        ({"codec": "fp8"}, "codec"),
        ({"timeout": timedelta(0), "grace_period": 0}, "timeout"),
        ({"timeout": timedelta(seconds=3), "grace_period": 8}, "timeout"),
        ({"worker_size": 0}, "worker_size"),
        ({"outer_optimizer": torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1)}, "outer_optimizer"),
        ({"outer_optimizer": partial(DelayedNesterov, momentum_activation=2.0)}, "momentum_activation"),
        ({"transforms": Poly()}, "transforms"),
        ({"local_buffers": "queue"}, "local_buffers"),
        ({"transforms": [Poly]}, r"Poly\(\)"),
        ({"turns_per_round": 0.5}, "turns_per_round"),
        ({"exchange": "ring"}, "exchange"),
        ({"fragments": 0}, "fragments"),
        ({"fragments": 1.5}, "fragments"),
        ({"fragments": 8, "local_steps": 5}, "`local_steps=5` are fewer than `fragments=8`"),
        ({"fragments": 2, "constraint": lambda parameters: None}, "Pass `fragments=1`"),
        ({"merge": "mean"}, "merge"),
        ({"merge": 1.5}, "merge"),
        ({"codec": "int5"}, "int4"),
    ],
)
def test_the_strategy_refuses_at_construction(arguments: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        AsyncLocalSGDStrategy(**arguments)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AsyncLocalSGDStrategy(local_step=10), "`local_step`. Did you mean `local_steps`?"),
        (lambda: AsyncLocalSGDStrategy(quorom=4), "`quorom`. Did you mean `quorum`?"),
        (lambda: AsyncLocalSGDStrategy(find_unused_parameter=True), "Did you mean `find_unused_parameters`?"),
        (lambda: AsyncLocalSGDStrategy(zzz=1), "`zzz`. Known are: accelerator, "),
        (lambda: AsyncLocalSGDFabricStrategy(start_metod="fork"), "Did you mean `start_method`?"),
        (lambda: AsyncLocalSGD(NET, torch.optim.SGD(NET.parameters()), max_step=3), "Did you mean `max_steps`?"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_misspelt_argument_is_refused_with_the_one_that_comes_closest(make: Any, message: str) -> None:
    with pytest.raises(TypeError) as error:
        make()
    assert message in str(error.value)


def test_arguments_of_what_lies_beneath_are_taken() -> None:
    strategy = AsyncLocalSGDStrategy(find_unused_parameters=True, start_method="fork", gradient_as_bucket_view=True)
    assert strategy._ddp_kwargs == {"find_unused_parameters": True, "gradient_as_bucket_view": True}


def test_quorum_is_checked_against_the_number_of_workers() -> None:
    Settings(quorum=4).check_workers(4)
    with pytest.raises(ValueError, match="larger than the number of workers, 3"):
        Settings(quorum=4).check_workers(3)


def test_fingerprints_are_the_same_text_in_every_process_and_tell_settings_apart() -> None:
    one = Settings(outer_optimizer=partial(torch.optim.SGD, lr=0.7)).fingerprint()
    assert one == Settings(outer_optimizer=partial(torch.optim.SGD, lr=0.7)).fingerprint()
    assert one["outer_optimizer"] == "torch.optim.sgd.SGD(lr=0.7)"
    assert one != Settings(outer_optimizer=partial(torch.optim.SGD, lr=0.6)).fingerprint()
    assert Settings().fingerprint() == Settings(exchange_frozen=False).fingerprint()
    assert Settings().fingerprint() != Settings(exchange_frozen=True).fingerprint()
    assert Settings().fingerprint() != Settings(local_buffers=["queue"]).fingerprint()
    assert " at 0x" not in str(Settings(pace=DelayedPace()).fingerprint())


def test_fingerprints_tell_transformations_apart_by_all_their_parameters() -> None:
    chains: list[list[Transform]] = [
        [],
        [Poly(0.5)],
        [Poly(0.6)],
        [PolyThres(0.5)],
        [PolyThres(0.5, threshold=9)],
        [AsyncBuffer()],
        [AsyncBuffer(4)],
        [Scale(2.0)],
        [Scale(3.0)],
        [Poly(0.5), AsyncBuffer()],
    ]
    described = [json.dumps(Settings(transforms=chain).fingerprint()) for chain in chains]
    assert len(set(described)) == len(chains)
    assert described[1] == json.dumps(Settings(transforms=(Poly(),)).fingerprint())
    assert not any(" at 0x" in text for text in described)


class Scale(Transform):
    def __init__(self, factor: float) -> None:
        self._factor = factor
        self._device = torch.device("cpu")
        self._something = object()

    def update(self, pseudo_gradient: torch.Tensor, state: dict[str, Any], context: Context) -> torch.Tensor:
        return pseudo_gradient.mul_(self._factor)


class DelayedPace:
    tolerance = 0.0

    def steps(self, speeds: list[float], local_steps: int) -> list[int]:
        return [local_steps] * len(speeds)
