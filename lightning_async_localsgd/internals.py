"""Every private name of Lightning that the library depends on: no other file reaches for one (`tests/test_layers.py`).

A new release of Lightning may rename any of them: `tests/test_internals.py` tells which one is gone, and what needs it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.strategies.strategy import _BackwardSyncControl as BackwardSyncControl
from lightning.fabric.utilities.data import _auto_add_worker_init_fn as auto_add_worker_init_fn
from lightning.fabric.utilities.data import _set_sampler_epoch as set_sampler_epoch
from lightning.fabric.utilities.distributed import _DatasetSamplerWrapper as DatasetSamplerWrapper
from lightning.fabric.utilities.imports import _IS_INTERACTIVE as IS_INTERACTIVE
from lightning.fabric.utilities.types import _Stateful as Stateful
from lightning.pytorch.core.optimizer import _init_optimizers_and_lr_schedulers as init_optimizers_and_lr_schedulers
from lightning.pytorch.loops import _EvaluationLoop as EvaluationLoop
from lightning.pytorch.loops import _FitLoop as FitLoop
from lightning.pytorch.loops import _TrainingEpochLoop as TrainingEpochLoop
from lightning.pytorch.loops.fetchers import _DataFetcher as DataFetcher
from lightning.pytorch.loops.optimization.automatic import _AutomaticOptimization as AutomaticOptimization
from lightning.pytorch.loops.progress import _BatchProgress as BatchProgress
from lightning.pytorch.loops.progress import _Progress as Progress
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO as WrappingCheckpointIO
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher as MultiProcessingLauncher
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher as SubprocessScriptLauncher
from lightning.pytorch.trainer.call import _call_lightning_module_hook as call_lightning_module_hook
from lightning.pytorch.trainer.call import _call_strategy_hook as call_strategy_hook
from lightning.pytorch.trainer.connectors.data_connector import _get_distributed_sampler as get_distributed_sampler
from lightning.pytorch.trainer.connectors.data_connector import _request_dataloader as request_dataloader
from lightning.pytorch.trainer.connectors.data_connector import _worker_check as check_loader_workers
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.data import _extract_batch_size as extract_batch_sizes
from lightning.pytorch.utilities.data import _is_dataloader_shuffled as is_dataloader_shuffled
from lightning.pytorch.utilities.data import _update_dataloader as update_dataloader

__all__ = [
    "INHERITED",
    "IS_INTERACTIVE",
    "LAST_SAVED",
    "AutomaticOptimization",
    "BackwardSyncControl",
    "BatchProgress",
    "DataFetcher",
    "DatasetSamplerWrapper",
    "EvaluationLoop",
    "FitLoop",
    "MultiProcessingLauncher",
    "Progress",
    "Stateful",
    "SubprocessScriptLauncher",
    "TrainingEpochLoop",
    "WrappingCheckpointIO",
    "auto_add_worker_init_fn",
    "batches_that_stepped",
    "build_step_arguments",
    "call_lightning_module_hook",
    "call_strategy_hook",
    "can_stop_early",
    "check_loader_workers",
    "current_hook",
    "data_fetcher",
    "dump_checkpoint",
    "epoch_over",
    "extract_batch_sizes",
    "fetched_loaders",
    "get_distributed_sampler",
    "has_trainer",
    "init_optimizers_and_lr_schedulers",
    "is_dataloader_shuffled",
    "logged_metrics",
    "prepare_batch",
    "request_dataloader",
    "set_logged_metrics",
    "set_sampler_epoch",
    "should_accumulate",
    "should_update_logs",
    "training_loaders",
    "update_dataloader",
    "validation_source",
]

LAST_SAVED = ("_last_checkpoint_saved", "_last_global_step_saved")
"""Attributes by which a ``ModelCheckpoint`` decides at the end of training, and which its ``state_dict`` leaves out."""

INHERITED: Mapping[str, tuple[str, ...]] = {
    "lightning.fabric.strategies.ddp.DDPStrategy": (
        "_backward_sync_control",
        "_set_world_ranks",
        "_setup_distributed",
    ),
    "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint": ("_monitor_candidates",),
    "lightning.pytorch.loops.fit_loop._FitLoop": ("_data_fetcher", "_data_source"),
    "lightning.pytorch.loops.training_epoch_loop._TrainingEpochLoop": (
        "_is_training_done",
        "_num_ready_batches_reached",
        "_should_check_val_fx",
    ),
    "lightning.pytorch.strategies.ddp.DDPStrategy": (
        "_configure_launcher",
        "_get_process_group_backend",
        "_process_group_backend",
        "_start_method",
        "_timeout",
    ),
    "lightning.pytorch.strategies.launchers.multiprocessing._MultiProcessingLauncher": ("_start_method", "_strategy"),
    "lightning.pytorch.strategies.strategy.Strategy": ("_checkpoint_io", "_launcher"),
}
"""By class of Lightning: private names that a subclass in this library overrides, or uses on itself."""


# ---- the training loop -----------------------------------------------------------------------------------------------


def training_loaders(trainer: pl.Trainer) -> CombinedLoader | None:
    """The loaders of ``fit``; None before they are set up. While new ones are set up, those before."""
    return trainer.fit_loop._combined_loader


def data_fetcher(trainer: pl.Trainer) -> DataFetcher | None:
    """What fetches the batches of ``fit``; None before the loaders are set up."""
    return trainer.fit_loop._data_fetcher


def fetched_loaders(fetcher: DataFetcher) -> Any:
    """What a fetcher goes through: the object that its ``setup`` was given."""
    return fetcher._combined_loader


def epoch_over(trainer: pl.Trainer) -> bool:
    """Whether the last batch of the epoch has been fetched and trained."""
    return trainer.fit_loop.epoch_loop._num_ready_batches_reached()


def should_accumulate(trainer: pl.Trainer) -> bool:
    """Whether the optimizer leaves out the batch that is being trained."""
    return trainer.fit_loop.epoch_loop._should_accumulate()


def can_stop_early(trainer: pl.Trainer) -> bool:
    """Whether ``min_epochs`` and ``min_steps`` let ``trainer.should_stop`` end training."""
    return trainer.fit_loop._can_stop_early


def batches_that_stepped(trainer: pl.Trainer) -> int:
    """The step on the axis of the trainer's loggers."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def build_step_arguments(trainer: pl.Trainer, batch: Any, batch_idx: int) -> OrderedDict[str, Any]:
    """The arguments of ``training_step``, by name."""
    return trainer.fit_loop.epoch_loop._build_kwargs(OrderedDict(), batch, batch_idx)


def prepare_batch(trainer: pl.Trainer, batch: Any) -> Any:
    """A batch after the hooks before its transfer, on the device."""
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return call_strategy_hook(trainer, "batch_to_device", batch, dataloader_idx=0)


def validation_source(trainer: pl.Trainer) -> Any:
    """Where the validation within ``fit`` has its loaders from."""
    return trainer.fit_loop.epoch_loop.val_loop._data_source


# ---- logging and checkpoints -----------------------------------------------------------------------------------------


def should_update_logs(trainer: pl.Trainer) -> bool:
    """Whether ``log_every_n_steps`` has the loggers written to after this batch."""
    return trainer._logger_connector.should_update_logs


def logged_metrics(trainer: pl.Trainer) -> dict[str, Any]:
    """The dictionary behind ``trainer.callback_metrics``."""
    return trainer._logger_connector._callback_metrics


def set_logged_metrics(trainer: pl.Trainer, metrics: dict[str, Any]) -> None:
    """Put another dictionary behind ``trainer.callback_metrics``."""
    trainer._logger_connector._callback_metrics = metrics


def dump_checkpoint(trainer: pl.Trainer) -> dict[str, Any]:
    """What ``trainer.save_checkpoint`` would write. All of its hooks are called."""
    return trainer._checkpoint_connector.dump_checkpoint(weights_only=False)


# ---- the module ------------------------------------------------------------------------------------------------------


def has_trainer(module: pl.LightningModule) -> bool:
    """Whether a module is attached to a trainer: else ``module.trainer`` raises an error."""
    return module._trainer is not None


def current_hook(module: pl.LightningModule) -> str | None:
    """The name of the hook that runs."""
    return module._current_fx_name
