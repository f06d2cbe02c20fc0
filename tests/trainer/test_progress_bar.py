"""Worker 0's progress bar counts the batches of the job."""

from __future__ import annotations

from typing import Any

import pytest
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from torch.utils.data import DataLoader

from lightning_async_localsgd import AsyncLocalSGDStrategy
from tests.modules import Regression, make_trainer, regression_data, stream
from tests.processes import results, run_processes


class Watched(TQDMProgressBar):
    """Keeps what it shows after each batch, with the worker's own batches of the epoch."""

    def on_train_start(self, *args: Any) -> None:
        super().on_train_start(*args)
        self.shown: list[tuple[int, float, float]] = []

    def on_train_batch_end(self, *args: Any) -> None:
        super().on_train_batch_end(*args)
        self.shown.append((args[-1] + 1, self.train_progress_bar.n, self.train_progress_bar.total))


class WatchedRich(RichProgressBar):
    """The same."""

    shown: list[tuple[int, float, float]]

    def on_train_start(self, *args: Any) -> None:
        super().on_train_start(*args)
        self.shown = []

    def on_train_batch_end(self, *args: Any) -> None:
        super().on_train_batch_end(*args)
        if self.progress is not None:  # on worker 0
            self.shown.append((args[-1] + 1, self.train_progress_bar.completed, self.train_progress_bar.total))


BARS = {"tqdm": lambda: Watched(refresh_rate=1), "rich": WatchedRich}


def show(rank: int, size: int, bar: str, options: dict[str, Any]) -> Any:
    callback = BARS[bar]()
    trainer = make_trainer(
        size, AsyncLocalSGDStrategy(local_steps=5), enable_progress_bar=True, callbacks=[callback], **options
    )
    loader = DataLoader(regression_data(100), batch_size=2) if "max_epochs" in options else stream(rank)
    trainer.fit(Regression((0.002, 0.02)), loader)
    return callback.shown, trainer.global_step


@pytest.mark.parametrize("bar", BARS)
@pytest.mark.parametrize("options", [{"max_epochs": 2}, {"max_steps": 50}])
def test_the_bar_of_a_fast_worker_0_never_runs_past_its_total(bar: str, options: dict[str, Any]) -> None:
    if bar == "rich":
        pytest.importorskip("rich")
    shown, steps = results(run_processes(show, 2, 2, bar, options))[0]
    total = 25 if "max_epochs" in options else 50  # as under DDP: of two workers, each makes half of 50 batches
    assert len(shown) == steps
    # Its own batches are counted at once, and each is half of one per worker.
    assert all(min(own // 2, total) <= made <= of == total for own, made, of in shown)
    assert shown[-1][1:] == (total, total)
