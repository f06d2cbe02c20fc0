"""Libraries that are written for `pytorch_lightning` train with the strategy, as they are."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from tests.imports import run
from tests.modules import regression_data
from tests.processes import results, run_processes


def make_library() -> types.ModuleType:
    """A library for forecasts in small: `pytorch_lightning` alone, and a `Trainer` made of the caller's dictionary."""
    source = """
import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.seed import seed_everything
from pytorch_lightning.callbacks import Callback, EarlyStopping
from pytorch_lightning.utilities.exceptions import MisconfigurationException


class Net(pl.LightningModule):
    def __init__(self, width):
        super().__init__()
        self.save_hyperparameters()
        self.net = torch.nn.Linear(8, width)

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.mse_loss(self.net(batch[0]).mean(1, keepdim=True), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class Losses(Callback):
    def __init__(self):
        self.losses = []

    def on_validation_end(self, trainer, module):
        self.losses.append(float(trainer.callback_metrics["val_loss"]))


class Forecaster:
    def __init__(self, width, pl_trainer_kwargs):
        seed_everything(0)
        self.kwargs, self.losses = pl_trainer_kwargs, Losses()
        self.model = Net(width)

    def fit(self, training, validation):
        callbacks = [self.losses, EarlyStopping("val_loss", patience=50)]
        self.trainer = pl.Trainer(callbacks=callbacks, **self.kwargs)
        self.trainer.fit(self.model, training, validation)
        return self
"""
    library = types.ModuleType("forecasts")
    exec(source, vars(library))
    return library


def forecast(rank: int, size: int, by_name: bool) -> Any:
    import lightning_async_localsgd.pytorch_lightning  # noqa: F401
    from lightning_async_localsgd import AsyncLocalSGDStrategy

    library = make_library()
    strategy = "async_localsgd" if by_name else AsyncLocalSGDStrategy(local_steps=5)
    arguments = {
        "accelerator": "cpu",
        "devices": size,
        "max_steps": 40,
        "strategy": strategy,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
        "logger": False,
    }
    training = DataLoader(regression_data(256), batch_size=8)
    forecaster = library.Forecaster(4, arguments).fit(training, DataLoader(regression_data(32), batch_size=8))
    summary = forecaster.trainer.strategy.summary
    values = torch.cat([p.detach().flatten() for p in forecaster.model.parameters()]).tolist()
    return summary.digest, summary.total_local_steps, values, forecaster.losses.losses


@pytest.mark.parametrize("by_name", [False, True])
def test_a_library_for_pytorch_lightning_trains_as_it_is(by_name: bool) -> None:
    first, second = results(run_processes(forecast, 2, 2, by_name))
    assert first[:3] == second[:3]
    assert first[1] >= 80
    assert first[3] and not second[3]  # worker 0 validates


def test_both_names_are_one_package_and_what_comes_too_late_is_refused() -> None:
    code, output = run(
        """
import sys
import lightning.pytorch as real, lightning_async_localsgd.pytorch_lightning
spec = real.callbacks.__spec__
import pytorch_lightning as pl
import pytorch_lightning.callbacks.early_stopping as stopping
from pytorch_lightning import callbacks
from lightning_fabric.utilities.seed import seed_everything
import lightning.fabric.utilities.seed as seed
assert pl is real and callbacks is real.callbacks
assert callbacks.__spec__ is spec and spec.name == "lightning.pytorch.callbacks"
assert stopping.EarlyStopping is real.callbacks.EarlyStopping and seed_everything is seed.seed_everything
import importlib.util
assert importlib.util.find_spec("pytorch_lightning.no_such_module") is None
assert importlib.util.find_spec("pytorch_lightning") is not None
try:
    import pytorch_lightning.no_such_module
except ModuleNotFoundError as error:
    assert "no_such_module" in str(error)
else:
    raise AssertionError
from lightning_async_localsgd.aliasing import alias_pytorch_lightning
before = list(sys.meta_path)
alias_pytorch_lightning()
assert sys.meta_path == before
"""
    )
    assert code == 0, output


def test_without_it_the_error_says_what_to_import_and_too_late_is_refused() -> None:
    code, output = run(
        """
import pytorch_lightning as pl
from lightning_async_localsgd import AsyncLocalSGDStrategy
try:
    pl.Trainer(strategy=AsyncLocalSGDStrategy(), logger=False)
except ValueError as error:
    assert "import lightning_async_localsgd.pytorch_lightning" in str(error), error
else:
    raise AssertionError
try:
    import lightning_async_localsgd.pytorch_lightning
except ImportError as error:
    assert "before all other imports" in str(error)
else:
    raise AssertionError
"""
    )
    assert code == 0, output


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_async_localsgd import aliasing

    monkeypatch.setattr(aliasing.importlib.metadata, "version", lambda name: "1.9.5")
    with pytest.raises(ImportError, match=r"pytorch-lightning 1\.9\.5 .*pip install pytorch-lightning=="):
        aliasing._check_version()
