"""torchft's DiLoCo under Lightning: one replica group per worker, each of a single process."""

import os
from datetime import timedelta

import lightning as L
import torch
from torch.distributed import TCPStore
from torchft import Manager, ProcessGroupGloo
from torchft.coordination import LighthouseServer
from torchft.local_sgd import DiLoCo

_TIMEOUT = timedelta(minutes=5)


class TorchftDiLoCo(L.Callback):
    """Trains with ``torchft.local_sgd.DiLoCo``, which hooks itself to the inner optimizer. For single-device trainers.

    Worker 0 hosts the lighthouse, through which the workers find each other, at ``MASTER_PORT``.

    Args:
        rank: This worker.
        replicas: Number of workers; an outer step takes place only with all of them.
        local_steps: H, local steps per round.
        address: at which the other workers reach this one.
    """

    def __init__(self, rank: int, replicas: int, local_steps: int, address: str = "localhost") -> None:
        self.rank = rank
        self.address = address
        self.replicas = replicas
        self.local_steps = local_steps

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        port = os.environ["MASTER_PORT"]
        if self.rank == 0:
            self._lighthouse = LighthouseServer(bind=f"[::]:{port}", min_replicas=self.replicas)
        self._store = TCPStore(self.address, 0, is_master=True, wait_for_workers=False)
        self._manager = Manager(
            pg=ProcessGroupGloo(timeout=_TIMEOUT),
            load_state_dict=pl_module.load_state_dict,
            state_dict=pl_module.state_dict,
            min_replica_size=self.replicas,
            use_async_quorum=False,
            timeout=_TIMEOUT,
            quorum_timeout=_TIMEOUT,
            rank=0,
            world_size=1,
            store_addr=self.address,
            store_port=self._store.port,
            lighthouse_addr=f"http://{os.environ['MASTER_ADDR']}:{port}",
            replica_id=f"worker_{self.rank}",
            init_sync=False,  # all workers start from the same parameters
        )
        # The groups meet and connect now, so that this does not count as training.
        self._manager.start_quorum()
        outer_optimizer = torch.optim.SGD(pl_module.parameters(), lr=0.7, momentum=0.9, nesterov=True)
        self._diloco = DiLoCo(self._manager, [pl_module], trainer.optimizers[0], outer_optimizer, self.local_steps)
        self._diloco.__enter__()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._diloco.__exit__(None, None, None)
        self._manager.shutdown(wait=False)
