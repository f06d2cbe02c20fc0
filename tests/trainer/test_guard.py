"""The guard warns once of each problem, and not at all in a good run."""

from __future__ import annotations

import math
import random
import time
import warnings
from functools import partial
from typing import Any

import pytest
import torch

from lightning_async_localsgd import AsyncLocalSGDStrategy, Settings
from lightning_async_localsgd.outer import DelayedNesterov
from lightning_async_localsgd.trainer.guard import Guard, MeanLoss
from tests.modules import Regression, make_trainer, stream
from tests.processes import results, run_processes

NAN = math.nan


def said(guard: Guard, losses: list[float], alignments: list[float] | None = None, length: int = 10) -> list[str]:
    alignments = alignments or [NAN] * len(losses)
    return [s for loss, a in zip(losses, alignments, strict=True) for s in guard.see_round(loss, a, length)]


@pytest.mark.parametrize("sign", [1, -1])  # a likelihood may be negative
def test_a_run_that_goes_well_hears_nothing(sign: int) -> None:
    noise = random.Random(0)
    falling = [sign * 5 + 3 * math.exp(-t / 20) + noise.gauss(0, 0.05) for t in range(200)]
    assert not said(Guard(Settings(), 10_000), falling, [noise.uniform(0.0, 0.9) for _ in falling])


@pytest.mark.parametrize(
    "losses",
    [
        [5, 4, 3, 2.5, 2.4, 4, 4.2, 4.1, 4.0],  # what was learned is lost
        [5, 5, 5, 5, 6, 7, 8, 9],  # it never learned
        [-1, -2, -3, -4, -4, 3, 3, 3, 3],
    ],
)
def test_a_loss_that_jumps_is_told_once_with_figures_and_a_remedy(losses: list[float]) -> None:
    sentences = said(Guard(Settings(), 10_000), losses + losses[-3:])
    assert len(sentences) == 1
    assert f"from {min(losses):.4g} to" in sentences[0]
    assert "momentum=0.5" in sentences[0] and "`local_steps=5` instead of 10" in sentences[0]


def test_one_hard_batch_is_no_jump() -> None:
    assert not said(Guard(Settings(), 10_000), [5, 4, 3, 2.5, 9, 2.4, 9, 9, 2.3, 2.2])


def test_deltas_against_the_momentum_are_told_once() -> None:
    alignments = [NAN, 0.8, 0.4, -0.1, 0.1, -0.1, -0.2, -0.31, -0.4]
    sentences = said(Guard(Settings(), 10_000), [NAN] * 9, alignments)
    assert len(sentences) == 1 and "cosine -0.31" in sentences[0] and "momentum=0.5" in sentences[0]


def test_rounds_that_an_exchange_makes_too_few_are_told_once() -> None:
    sentences = said(Guard(Settings(), 1000), [1.0, 0.9, 0.8, 0.7], length=200)
    assert len(sentences) == 1 and "rounds have 200 steps, and the run, of 1000, has 5" in sentences[0]
    assert not said(Guard(Settings(local_steps=200), 1000), [1.0, 0.9], length=200)  # that was said at the start


def test_the_mean_loss_is_of_what_came_since_the_last_look() -> None:
    mean = MeanLoss()
    for loss in (1.0, 2.0, 6.0):
        mean.see({"loss": torch.tensor(loss)})
    assert mean.take() == 3.0 and math.isnan(mean.take())
    mean.see(torch.tensor(4.0))
    mean.see(None)
    mean.see({"loss": torch.ones(2)})
    assert mean.take() == 4.0


class Derailed(Regression):
    """Learns, and then unlearns."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        time.sleep(0.004)  # rounds of five steps are to stay that short on a busy machine
        loss = super().training_step(batch, batch_idx)
        return loss + 10.0 * (self.trainer.global_step > 60)


def fit(rank: int, module: type[Regression], momentum: float) -> list[str]:
    strategy = AsyncLocalSGDStrategy(local_steps=5, outer_optimizer=partial(DelayedNesterov, momentum=momentum))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(2, strategy, max_steps=120).fit(module(), stream(rank))
    return [str(w.message) for w in caught if "training loss has risen" in str(w.message)]


@pytest.mark.parametrize(("module", "times"), [(Regression, 0), (Derailed, 1)])
def test_worker_zero_says_it_in_a_real_run(module: type[Regression], times: int) -> None:
    ends = results(run_processes(fit, 2, module, 0.3))
    assert [len(sentences) for sentences in ends] == [times, 0]
