"""Trains a small network with asynchronous Local-SGD in a plain PyTorch loop.

torchrun --nproc-per-node 2 examples/ways_in/plain_loop.py
"""

import math
import os

import torch
from torch import nn

from lightning_async_localsgd import AsyncLocalSGD

MAX_STEPS = 500


def main() -> None:
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    module = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1)).to(device)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)

    with AsyncLocalSGD(module, optimizer, max_steps=MAX_STEPS, samples=16) as job:
        generator = torch.Generator().manual_seed(job.rank)  # each worker has data of its own
        held_out = torch.randn(256, 8, generator=torch.Generator().manual_seed(1234)).to(device)
        while job.running:
            for group in optimizer.param_groups:  # a cosine that ends with the job, alike on every worker
                group["lr"] = 1e-2 * 0.5 * (1 + math.cos(math.pi * job.job_steps / MAX_STEPS))
            x = torch.randn(16, 8, generator=generator).to(device)
            loss = nn.functional.mse_loss(module(x), x.sin().sum(1, keepdim=True))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if job.rank == 0 and job.worker.local_steps % 100 == 0:
                with job.global_parameters(), torch.no_grad():
                    loss = nn.functional.mse_loss(module(held_out), held_out.sin().sum(1, keepdim=True))
                print(f"step {job.job_steps} of the job: loss of the global parameters {loss:.4f}", flush=True)

    assert job.summary is not None
    print(f"worker {job.rank} of {job.size}: {job.summary.local_steps}, digest {job.summary.digest}", flush=True)


if __name__ == "__main__":
    main()
