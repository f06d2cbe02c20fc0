"""Useless settings lead to warnings, in real runs too; other settings do not."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch

from lightning_async_localsgd import METHODS, AsyncLocalSGD, AsyncLocalSGDStrategy, Settings, make_method
from lightning_async_localsgd.outer import AsyncBuffer, DelayedNesterov
from lightning_async_localsgd.settings.advice import SettingsWarning, useless_settings
from tests.modules import FEATURES, Regression, make_net, make_trainer, stream
from tests.processes import results, run_processes


@pytest.mark.parametrize(
    ("settings", "max_steps", "said"),
    [
        ({"local_steps": 50}, 49, "`local_steps=2`"),
        ({"local_steps": 2}, 1, "`local_steps=1`"),
        ({"outer_optimizer": partial(torch.optim.SGD, lr=0.0)}, None, "learning rate 0"),
        ({"local_steps": 10}, 199, "makes 19 rounds per worker in a run of 199 steps"),
        ({"local_steps": 50}, 400, "rounds of 10 steps here"),
        ({"local_steps": 2, "transforms": [AsyncBuffer(101)]}, 50, "at most 100"),
        ({"local_steps": 2, "outer_optimizer": partial(DelayedNesterov, buffer_size=101)}, 50, "at most 100"),
    ],
)
def test_what_cannot_do_anything_useful_is_told_with_what_to_do(
    settings: dict[str, Any], max_steps: int | None, said: str
) -> None:
    (sentence,) = useless_settings(Settings(**settings), 2, max_steps)
    assert said in sentence


@pytest.mark.parametrize(
    ("local_steps", "max_steps"), [(10, 200), (50, 1000), ("auto", 20), ("auto", None), (50, 0), ("auto", 0)]
)
def test_twenty_rounds_are_enough(local_steps: int | str, max_steps: int | None) -> None:
    assert useless_settings(Settings(local_steps=local_steps), 4, max_steps) == []


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("max_steps", [None, 50, 1000])
def test_what_the_methods_are_made_of_is_useful(method: str, max_steps: int | None) -> None:
    assert useless_settings(Settings(**make_method(method, 2)), 2, max_steps) == []


def with_lightning(rank: int, size: int) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", SettingsWarning)
        trainer: L.Trainer = make_trainer(size, AsyncLocalSGDStrategy(local_steps=50), max_steps=6)
        trainer.fit(Regression(), stream(rank))
    return [str(warning.message) for warning in caught if warning.category is SettingsWarning]


def with_a_plain_loop(rank: int, size: int) -> list[str]:
    module = make_net(seed=0)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", SettingsWarning)
        with AsyncLocalSGD(module, optimizer, max_steps=6, local_steps=50) as loop:
            while loop.running:
                module(torch.ones(1, FEATURES)).sum().backward()
                optimizer.step()
    return [str(warning.message) for warning in caught if warning.category is SettingsWarning]


@pytest.mark.parametrize("run", [with_lightning, with_a_plain_loop])
def test_a_run_tells_it_once(run: Any) -> None:
    told, of_the_other = results(run_processes(run, 2, 2))
    assert len(told) == 1 and "`local_steps=50` are more than the 6 steps" in told[0]
    assert of_the_other == []
