"""Trains Lightning's demo model with asynchronous Local-SGD, however its processes are started.

See docs/ways-in: torchrun, SLURM, or Lightning itself starts the processes.
"""

import argparse

import lightning as L
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel

from lightning_async_localsgd import AsyncLocalSGDStrategy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=2, help="processes per node, each of which is a worker")
    parser.add_argument("--num-nodes", type=int, default=1)
    parser.add_argument("--max-steps", type=int, default=200, help="local steps per worker, on average")
    args = parser.parse_args()

    strategy = AsyncLocalSGDStrategy()
    trainer = L.Trainer(
        strategy=strategy,
        devices=args.devices,
        num_nodes=args.num_nodes,
        max_steps=args.max_steps,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(BoringModel(), BoringDataModule())
    assert strategy.summary is not None
    print(f"worker {trainer.global_rank} of {trainer.world_size}: digest {strategy.summary.digest}", flush=True)


if __name__ == "__main__":
    main()
