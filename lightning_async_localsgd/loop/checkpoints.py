"""Checkpoints of a loop: what each worker saves, and how it goes on from that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_async_localsgd.data.random_state import RandomState, set_random_state
from lightning_async_localsgd.protocol.messages import SaveNamed
from lightning_async_localsgd.worker.base import BaseWorker

__all__ = ["checkpoint_of", "resume"]


def checkpoint_of(
    worker: BaseWorker, optimizers: Sequence[Optimizer], what: SaveNamed, steps_before: int, module: nn.Module
) -> dict[str, Any]:
    """What a worker saves during a cut. Tensors that are trained are not copied.

    Args:
        worker: the worker.
        optimizers: its inner optimizers.
        what: the cut.
        steps_before: steps of the job with an earlier number of workers.
        module: the module; the random generator of its device is saved beside the CPU's.
    """
    return {
        "name": what.name,
        "job_steps": what.job_steps,
        "steps_before": steps_before,
        "size": worker.size,
        "global": worker.saved_state.global_state_dict(),
        "worker": worker.saved_state.local_state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "settings": worker.settings.fingerprint(),
        "random": RandomState(next(module.parameters()).device).state_dict(),
    }


def resume(worker: BaseWorker, optimizers: Sequence[Optimizer], state: Mapping[str, Any], module: nn.Module) -> int:
    """Have a worker that has not started go on from a checkpoint.

    Args:
        worker: the worker.
        optimizers: its inner optimizers.
        state: what :func:`checkpoint_of` has told.
        module: the module; the random generator of its device is restored beside the CPU's.

    Returns:
        Steps of the job with an earlier number of workers.
    """
    same_workers = state["size"] == worker.size
    worker.saved_state.load_global_state_dict(state["global"], same_workers, state.get("settings"))
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    if same_workers:
        worker.saved_state.load_local_state_dict(state["worker"])
        if "random" in state:
            set_random_state(state["random"], next(module.parameters()).device)
    before: int = state["steps_before"] if same_workers else state["job_steps"]
    return before
