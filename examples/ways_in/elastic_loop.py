"""Trains a small network with workers that come and go. Start any number of them, at any time, on any host.

async-localsgd lighthouse --bind 127.0.0.1:29510
python examples/ways_in/elastic_loop.py 127.0.0.1:29510
"""

import os
import signal
import sys

import torch
from torch import nn

from lightning_async_localsgd import AsyncLocalSGD, Lighthouse

MAX_STEPS = 500


def main() -> None:
    lighthouse = Lighthouse(sys.argv[1], job="example", token=os.environ.get("JOB_TOKEN", ""), max_workers=2)
    module = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)

    with AsyncLocalSGD(module, optimizer, max_steps=MAX_STEPS, samples=16, lighthouse=lighthouse) as job:
        signal.signal(signal.SIGTERM, lambda *_: job.leave())  # a cloud's notice: what is learned goes to the others
        generator = torch.Generator().manual_seed(job.rank)  # each worker has data of its own
        held_out = torch.randn(256, 8, generator=torch.Generator().manual_seed(1234))
        while job.running:
            x = torch.randn(16, 8, generator=generator)
            nn.functional.mse_loss(module(x), x.sin().sum(1, keepdim=True)).backward()
            optimizer.step()
            optimizer.zero_grad()
            if job.leads and job.worker.local_steps % 100 == 0:
                with job.global_parameters(), torch.no_grad():
                    loss = nn.functional.mse_loss(module(held_out), held_out.sin().sum(1, keepdim=True))
                print(f"step {job.job_steps} of the job: loss of the global parameters {loss:.4f}", flush=True)

    assert job.summary is not None
    print(f"worker {job.rank} of {job.size}: {job.summary.local_steps}, digest {job.summary.digest}", flush=True)


if __name__ == "__main__":
    main()
