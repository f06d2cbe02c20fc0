"""The worker of a loop: among the processes of a launch, or among workers that come and go."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.distributed import Store
from torch.optim import Optimizer

from lightning_async_localsgd.membership.elastic import Lighthouse
from lightning_async_localsgd.settings import Settings
from lightning_async_localsgd.version import __version__
from lightning_async_localsgd.worker.elastic import ElasticWorker
from lightning_async_localsgd.worker.worker import Worker

__all__ = ["NoJob", "find_rank", "make_elastic", "make_static", "read_environment"]


def find_rank(lighthouse: Lighthouse | None, rank: int | None, size: int | None) -> tuple[int, int]:
    """Rank and size as given, or of the environment; of workers that come and go, what a run will tell.

    Raises:
        RuntimeError: if they are neither given nor in the environment.
        ValueError: if they are given to a worker that comes and goes.
    """
    if lighthouse is None:
        own = int(read_environment("RANK")) if rank is None else rank
        return own, int(read_environment("WORLD_SIZE")) if size is None else size
    if rank is not None or size is not None:
        raise ValueError("Pass `lighthouse`, or `rank` and `size`: workers that come and go have no fixed ones.")
    return 0, 1


def read_environment(name: str) -> str:
    """A variable that torchrun sets."""
    if name not in os.environ:
        raise RuntimeError(
            f"`{name}` is not set. Start the script with `torchrun`, or set RANK, WORLD_SIZE, MASTER_ADDR and "
            "MASTER_PORT in every process (`rank` and `size` can be passed as arguments)."
        )
    return os.environ[name]


def make_static(
    module: nn.Module,
    optimizers: Sequence[Optimizer],
    store: Store,
    rank: int,
    size: int,
    settings: Settings,
    fingerprint: Mapping[str, Any],
    resumed: Mapping[str, Any] | None,
) -> Worker:
    """The worker of a loop, which has not started, once the others are there."""
    known = {"lightning_async_localsgd": __version__, **fingerprint}
    known["resumed"] = [resumed["name"], resumed["global"]["global"]["version"]] if resumed is not None else None
    return Worker(module, optimizers, store, rank, size, settings, known)


def make_elastic(
    module: nn.Module,
    optimizers: Sequence[Optimizer],
    lighthouse: Lighthouse,
    settings: Settings,
    name: str | None,
    fingerprint: Mapping[str, Any],
    resumed: Mapping[str, Any] | None,
) -> ElasticWorker:
    """The worker of a loop, which has not started.

    Raises:
        RuntimeError: if it is to go on from a checkpoint.
    """
    if resumed is not None:
        raise RuntimeError(
            "A job of workers that come and go does not go on from a checkpoint: a worker that comes takes over what "
            "the others hold. Load the optimizer's own state, if you have it, and leave out `load_state_dict`."
        )
    known = {"lightning_async_localsgd": __version__, **fingerprint}
    return ElasticWorker(module, optimizers, lighthouse, settings, name, fingerprint=known)


class NoJob:
    """What workers that come and go have instead of a job of fixed processes: nobody waits for them."""

    def fail(self, error: BaseException) -> None:
        """Do nothing: the others go on."""

    def leave(self) -> None:
        """Do nothing."""
