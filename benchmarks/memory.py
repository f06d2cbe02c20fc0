"""Host memory that a worker needs beyond its module and inner optimizer, in copies of the trainable parameters.

Two real workers train a module of 25M parameters. Compared are the peaks of resident memory of training without and
with the exchange, over two runs of different length, so that growth with the length would show.

    python benchmarks/memory.py [--parameters 25] [--codec fp32] [--quorum 1] [--fragments 1 4]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import nn
from torch.distributed import PrefixStore, TCPStore

from lightning_async_localsgd import Settings, Worker

RESULT = Path(__file__).parent / "results" / "memory.json"


def reset_peak() -> None:
    """Forget how high resident memory has been (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """Highest resident memory of this process since :func:`reset_peak`, bytes."""
    return _status("VmHWM")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def worker(rank: int, port: int, steps: int, fragments: int, args: argparse.Namespace, result: Connection) -> None:
    """Measure one worker; sends what the exchange adds to the peak, in copies of the parameters."""
    torch.set_num_threads(1)
    width = int((args.parameters * 1e6 / 8) ** 0.5)
    module = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(8)))
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)

    def train_step() -> None:
        module(torch.randn(4, width)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # gradients belong to the module, at every moment

    train_step()
    reset_peak()
    for _ in range(5):
        train_step()
    alone = peak()
    store = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(minutes=1))
    run = Worker(
        module,
        [optimizer],
        PrefixStore(f"run{fragments}-{steps}", store),
        rank,
        2,
        Settings(local_steps=4, codec=args.codec, quorum=args.quorum, fragments=fragments),
    )
    reset_peak()
    run.start(max_steps=steps)
    running = True
    while running:
        train_step()
        running = run.step()
    run.finish()
    result.send((peak() - alone) / (4 * sum(p.numel() for p in module.parameters())))


def measure(steps: int, fragments: int, port: int, args: argparse.Namespace) -> float:
    """Run two workers for ``steps`` local steps each; the larger of their two figures."""
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe(duplex=False) for _ in range(2)]
    processes = [context.Process(target=worker, args=(r, port, steps, fragments, args, pipes[r][1])) for r in range(2)]
    for process, (_, sender) in zip(processes, pipes, strict=True):
        process.start()
        sender.close()
    try:
        return max(receiver.recv() for receiver, _ in pipes)
    finally:
        for process in processes:
            process.join(30)
            process.kill()


def main() -> None:
    """Run two workers and print what they needed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=25, help="millions of trainable parameters")
    parser.add_argument("--steps", type=int, default=20, help="local steps per worker in the short run")
    parser.add_argument("--codec", default="fp32")
    parser.add_argument("--quorum", type=int, default=1)
    parser.add_argument("--fragments", type=int, nargs="+", default=[1, 4])
    args = parser.parse_args()
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    rows = []
    for fragments in args.fragments:
        short, long = (measure(steps, fragments, store.port, args) for steps in (args.steps, 5 * args.steps))
        rows.append({"fragments": fragments, "copies_short": short, "copies_long": long})
        print(
            f"{args.parameters:g}M parameters, {fragments} fragments: {short:.2f} copies; in a run 5 times as long "
            f"{long:.2f} copies",
            flush=True,
        )
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps({"settings": vars(args), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
