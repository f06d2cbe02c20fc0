"""Fabric's processes as workers: Fabric starts and numbers them, and each trains its own replica."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from lightning.fabric.strategies import DDPStrategy
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from lightning_async_localsgd.internals import BackwardSyncControl
from lightning_async_localsgd.settings.arguments import check_names, names_of

__all__ = ["AsyncLocalSGDFabricStrategy"]


class AsyncLocalSGDFabricStrategy(DDPStrategy):
    """One process per device, as under DDP, without a process group: no process waits for another.

    :class:`~lightning_async_localsgd.AsyncLocalSGD` exchanges the results of ``fabric.setup``::

        fabric = Fabric(devices=2, strategy=AsyncLocalSGDFabricStrategy())
        fabric.launch()
        module, optimizer = fabric.setup(module, optimizer)
        with AsyncLocalSGD(module, optimizer, max_steps=1000) as job:
            ...

    ``fabric.setup_dataloaders`` gives each worker a part of the data. Collectives (``fabric.all_reduce``,
    ``all_gather``, ``broadcast``, ``barrier``) act on each process alone.

    Args:
        **kwargs: arguments of Fabric's ``DDPStrategy``, such as ``start_method`` or ``cluster_environment``.

    Raises:
        TypeError: if ``DDPStrategy`` has no such argument.
    """

    def __init__(self, **kwargs: Any) -> None:
        check_names(kwargs, names_of(DDPStrategy, DistributedDataParallel), "AsyncLocalSGDFabricStrategy")
        super().__init__(**kwargs)
        self._backward_sync_control = _NothingToSync()

    @override
    def _setup_distributed(self) -> None:
        """Set torchrun's variables; ``AsyncLocalSGD`` joins the other processes by them."""
        self._set_world_ranks()
        assert self.cluster_environment is not None
        os.environ.update(
            RANK=str(self.global_rank),
            WORLD_SIZE=str(self.world_size),
            MASTER_ADDR=self.cluster_environment.main_address,
            MASTER_PORT=str(self.cluster_environment.main_port),
        )

    @override
    def setup_module(self, module: Module) -> Module:  # type: ignore[override]
        return module

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        return decision


class _NothingToSync(BackwardSyncControl):
    """``fabric.no_backward_sync`` without an effect, because gradients are never synchronized."""

    @override
    def no_backward_sync(self, module: Module, enabled: bool) -> AbstractContextManager[None]:
        return nullcontext()
