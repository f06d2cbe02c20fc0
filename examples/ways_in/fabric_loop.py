"""Trains a small network with asynchronous Local-SGD in a loop of Lightning Fabric.

python examples/ways_in/fabric_loop.py
"""

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_async_localsgd import AsyncLocalSGD
from lightning_async_localsgd.fabric import AsyncLocalSGDFabricStrategy


def forever(loader: Any) -> Iterator[Any]:
    epoch = 0
    while True:
        loader.sampler.set_epoch(epoch)  # the sampler that Fabric has put there; it shuffles by the epoch
        yield from loader
        epoch += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=2, help="processes per node, each of which is a worker")
    parser.add_argument("--num-nodes", type=int, default=1)
    args = parser.parse_args()

    fabric = Fabric(devices=args.devices, num_nodes=args.num_nodes, strategy=AsyncLocalSGDFabricStrategy())
    fabric.launch()

    x = torch.randn(4096, 8, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(x, x.sin().sum(1, keepdim=True))
    # Fabric gives each process a share of the data.
    batches = forever(fabric.setup_dataloaders(DataLoader(data, batch_size=16, shuffle=True)))
    module = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    module, optimizer = fabric.setup(module, torch.optim.AdamW(module.parameters(), lr=1e-2))

    with AsyncLocalSGD(module, optimizer, max_steps=500, samples=16) as job:
        while job.running:
            inputs, targets = next(batches)
            fabric.backward(nn.functional.mse_loss(module(inputs), targets))
            optimizer.step()
            optimizer.zero_grad()

    assert job.summary is not None
    fabric.print(f"local steps {job.summary.local_steps}, outer updates {job.summary.version}")
    print(f"worker {fabric.global_rank} of {fabric.world_size}: digest {job.summary.digest}", flush=True)


if __name__ == "__main__":
    main()
