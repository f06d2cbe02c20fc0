"""Collectives of the strategy in hooks: of the whole job where all processes pass, of one worker in between."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger
from torch.utils.data import DataLoader

from tests.modules import Regression, make_trainer, regression_data
from tests.processes import results, run_processes
from tests.trainer.test_strategy import strategy

IN_STEP = ("setup", "on_fit_start", "on_train_start", "on_train_end", "on_fit_end", "teardown", "after fit")
OUT_OF_STEP = ("on_train_batch_end",)


class PathLogger(DummyLogger):
    """Says where it writes as a path, as many loggers do."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    @property
    def save_dir(self) -> Any:
        return self.folder


class Meeting(L.Callback):
    """Calls every collective in every hook, and keeps what comes of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.met: dict[str, Any] = {}

    def meet(self, hook: str, trainer: L.Trainer) -> None:
        if hook in self.met:
            return
        strategy, rank = trainer.strategy, trainer.global_rank
        if trainer.is_global_zero:
            (self.folder / hook).touch()
        strategy.barrier()
        self.met[hook] = {
            "file": (self.folder / hook).exists(),
            "broadcast": strategy.broadcast((rank, {rank: self.folder}, {"a"}), src=1 if hook in IN_STEP else 0),
            "gathered": strategy.all_gather(torch.tensor([rank])).flatten().tolist(),
            "mean": float(strategy.reduce(torch.tensor(float(rank)), reduce_op="mean")),
            "all": strategy.reduce_boolean_decision(rank == 0),
            "any": strategy.reduce_boolean_decision(rank == 0, all=False),
        }


def _hook(name: str) -> Any:
    def hook(self: Meeting, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        self.meet(name, trainer)

    return hook


for _name in (*IN_STEP[:-1], *OUT_OF_STEP):
    setattr(Meeting, _name, _hook(_name))


class MeetingStop(EarlyStopping):
    """A callback that decides, whose hooks wait for all processes."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.strategy.barrier()

    on_train_start = on_train_end = on_fit_start


def meeting(rank: int, folder: Path) -> Any:
    meeting, save = Meeting(folder), ModelCheckpoint(dirpath=folder, save_last=True, every_n_train_steps=10**6)
    module = Regression((0.0, 0.01))
    trainer = make_trainer(
        2,
        strategy(),
        max_steps=20,
        callbacks=[MeetingStop("val_loss"), meeting, save],
        enable_checkpointing=True,
        logger=PathLogger(folder),
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, DataLoader(regression_data(64), batch_size=4), DataLoader(regression_data(8)))
    meeting.meet("after fit", trainer)
    trainer.save_checkpoint(folder / "all.ckpt")
    saved = torch.load(folder / "all.ckpt", weights_only=True)["state_dict"]
    same = all(torch.equal(saved[name], value) for name, value in module.state_dict().items())
    told = [str(w.message) for w in caught if "was called in" in str(w.message)]
    return meeting.met, same, told, save.last_model_path, trainer.log_dir


@pytest.fixture(scope="module")
def met(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return results(run_processes(meeting, 2, tmp_path_factory.mktemp("met")))


@pytest.mark.parametrize("hook", IN_STEP)
def test_where_all_processes_pass_a_collective_is_of_the_job(hook: str, met: Any) -> None:
    for calls, *_ in met:
        call = calls[hook]
        sender, words, letters = call.pop("broadcast")
        assert sender == 1 and isinstance(words[1], Path) and letters == {"a"}
        assert call == {"file": True, "gathered": [0, 1], "mean": 0.5, "all": False, "any": True}


def test_in_between_it_is_of_the_worker_and_said_once(met: Any) -> None:
    for rank, (calls, _, told, *_) in enumerate(met):
        call = calls["on_train_batch_end"]
        assert call["broadcast"][0] == rank and call["gathered"] == [rank] and call["mean"] == rank
        assert call["all"] == call["any"] == (rank == 0)
        assert len(told) == 1 and "`barrier` was called in `on_train_batch_end`" in told[0]


def test_all_save_after_fit_and_load_at_once(met: Any) -> None:
    assert all(same for _, same, *_ in met)


def test_a_checkpoint_of_the_end_is_known_to_all(met: Any) -> None:
    paths = {path for *_, path, _ in met}
    assert len(paths) == 1 and Path(paths.pop()).exists()


def test_a_logger_may_say_its_folder_as_a_path(met: Any) -> None:
    assert isinstance(met[0][-1], Path) and met[0][-1] == met[1][-1]


class Quiet(Regression):
    """Logs and saves as users do in training; none of it is to be warned of."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, sync_dist=True)
        return loss


def logging(rank: int, folder: str) -> list[str]:
    save = ModelCheckpoint(dirpath=folder, monitor="val_loss", save_last="link", every_n_train_steps=7)
    stop = EarlyStopping("val_loss")
    trainer = make_trainer(2, strategy(), max_steps=20, callbacks=[save, stop], enable_checkpointing=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(Quiet(), DataLoader(regression_data(64), batch_size=4), DataLoader(regression_data(8)))
    return [str(w.message) for w in caught if "was called in" in str(w.message)]


def test_lightnings_own_calls_are_not_warned_of(tmp_path: Path) -> None:
    assert results(run_processes(logging, 2, str(tmp_path))) == [[], []]
