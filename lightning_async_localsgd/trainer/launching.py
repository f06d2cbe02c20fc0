"""The strategy's launchers of processes, for jobs that torchrun, SLURM or another launcher has not started."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Protocol

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments import ClusterEnvironment, LightningEnvironment
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_async_localsgd.internals import IS_INTERACTIVE, MultiProcessingLauncher, SubprocessScriptLauncher
from lightning_async_localsgd.worker.summary import RunSummary

__all__ = ["ForkingLauncher", "ScriptLauncher", "check_start_method"]


def check_start_method(start_method: str, environment: ClusterEnvironment, interactive: bool = IS_INTERACTIVE) -> None:
    """Refuse a start method that cannot work here, and say which can.

    Args:
        start_method: ``"popen"``, ``"fork"``, ``"forkserver"`` or ``"spawn"``.
        environment: the environment detected by Lightning.
        interactive: whether this process is a notebook or a Python prompt.

    Raises:
        MisconfigurationException: if the start method cannot work.
    """
    started = not isinstance(environment, LightningEnvironment) and environment.creates_processes_externally
    if start_method != "popen" and started:
        raise MisconfigurationException(
            f"`start_method={start_method!r}` starts processes, but {type(environment).__name__} says that they have "
            'been started already. Leave `start_method` out, or pass "popen".'
        )
    if start_method != "fork" and interactive:
        raise MisconfigurationException(
            f"`start_method={start_method!r}` runs the script once more in each process, and a notebook or prompt has "
            'no script. Pass `strategy="async_localsgd_notebook"` or `AsyncLocalSGDStrategy(start_method="fork", ...)`'
            ", or run the code as a script."
        )


class ScriptLauncher(SubprocessScriptLauncher):
    """Lightning's launcher of processes that run the script once more."""

    @override
    def launch(self, function: Callable[..., Any], *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any) -> Any:
        """See Lightning's.

        Raises:
            MisconfigurationException: if there is no script, but code from standard input or ``python -c``.
        """
        starts_others = self.num_processes > 1 and not self.cluster_environment.creates_processes_externally
        if starts_others and sys.modules["__main__"].__spec__ is None and not os.path.exists(sys.argv[0]):
            raise MisconfigurationException(
                "The processes of the other devices run the script once more, and this code has come from standard "
                'input or `python -c`. Write it to a file; or pass `strategy="async_localsgd_fork"`, which forks them '
                "from this process."
            )
        return super().launch(function, *args, trainer=trainer, **kwargs)


class _Summarized(Protocol):
    """The part of the strategy used by its launcher."""

    summary: RunSummary | None

    @property
    def root_device(self) -> torch.device:
        """The device of this process."""


class ForkingLauncher(MultiProcessingLauncher):
    """Lightning's launcher of processes from this one, which also brings the summary of worker 0 back to it."""

    @override
    def launch(self, function: Callable[..., Any], *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any) -> Any:
        """See Lightning's.

        Raises:
            MisconfigurationException: if forked processes could not use their GPUs.
        """
        on_gpus = self._async_strategy.root_device.type == "cuda"
        if self._start_method == "fork" and on_gpus and torch.cuda.is_initialized():
            raise MisconfigurationException(
                "CUDA is in use in this process already, and processes forked from it could not use it. Restart the "
                "notebook's kernel, and put nothing on a GPU before `trainer.fit` does so; or run the code as a script."
            )
        return super().launch(function, *args, trainer=trainer, **kwargs)

    @override
    def get_extra_results(self, trainer: pl.Trainer) -> dict[str, Any]:
        summary = self._async_strategy.summary
        # Lightning traverses the results, and refuses frozen dataclasses.
        return super().get_extra_results(trainer) | {"summary": summary and asdict(summary)}

    @override
    def update_main_process_results(self, trainer: pl.Trainer, extra: dict[str, Any]) -> None:
        super().update_main_process_results(trainer, extra)
        self._async_strategy.summary = extra["summary"] and RunSummary(**extra["summary"])

    @property
    def _async_strategy(self) -> _Summarized:
        return self._strategy  # type: ignore[return-value]
