"""Trains a small GPT with asynchronous Local-SGD.

    torchrun --nproc-per-node 2 examples/train_lm.py

trains two workers on text that ships with Python, and so does, without torchrun,

    python examples/train_lm.py --workers 2

Only the `strategy` of the `Trainer` makes it asynchronous.
"""

import argparse
import math
import os
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_async_localsgd import AsyncLocalSGDStrategy, RunSummary
from lightning_async_localsgd.demo.argument_types import whole_or_auto
from lightning_async_localsgd.demo.arguments import add_arguments, build_data, build_model
from lightning_async_localsgd.demo.language_model import LanguageModel
from lightning_async_localsgd.demo.text import TextDataModule
from picture import RunRecorder, draw_run


class SlowWorker(L.Callback):
    """Makes the last worker sleep in every training step, as if its device were slower."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_rank == trainer.world_size - 1:
            time.sleep(self.seconds)


class SharedCUDAAccelerator(CUDAAccelerator):
    """CUDA for any number of processes: those beyond the number of GPUs share them.

    Lightning wants as many devices as there are processes, but rejects a GPU that is named twice (`devices=[0, 0]`).
    A custom accelerator can say that processes share a GPU.
    """

    @staticmethod
    def parse_devices(devices: Any) -> list[int]:
        return [process % torch.cuda.device_count() for process in range(devices)]


def choose_accelerator(name: str) -> str | CUDAAccelerator:
    if name == "gpu" or (name == "auto" and torch.cuda.is_available()):
        return SharedCUDAAccelerator()
    return "cpu"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a small GPT with asynchronous Local-SGD.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    run = parser.add_argument_group("run")
    run.add_argument("--output-dir", type=Path, default=Path("runs/train_lm"), help="logs, picture and tokenized text")
    run.add_argument("--accelerator", choices=("auto", "cpu", "gpu"), default="auto", help="auto: GPU if there is one")
    # torchrun has already decided how many processes there are.
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    run.add_argument("--workers", type=int, default=processes, help="workers on this machine; set by torchrun if used")
    run.add_argument("--slow-worker", type=float, default=0.0, metavar="SECONDS", help="slow the last worker's steps")
    run.add_argument("--seed", type=int, default=0)

    run.add_argument("--max-steps", type=int, default=400, help="local steps per worker, on average")
    run.add_argument("--local-steps", type=whole_or_auto, default="auto", help="per round of the fastest worker")
    run.add_argument("--prompt", default="The ", help="start of the generated sample")
    add_arguments(parser)
    return parser.parse_args()


def build_trainer(args: argparse.Namespace, strategy: AsyncLocalSGDStrategy, recorder: RunRecorder) -> L.Trainer:
    callbacks: list[L.Callback] = [recorder, LearningRateMonitor()]
    if args.slow_worker:
        callbacks.append(SlowWorker(args.slow_worker))
    return L.Trainer(
        strategy=strategy,
        accelerator=choose_accelerator(args.accelerator),
        devices=args.workers,
        num_nodes=int(os.environ.get("GROUP_WORLD_SIZE", 1)),  # set by torchrun
        max_steps=args.max_steps,
        gradient_clip_val=1.0,
        callbacks=callbacks,
        logger=[CSVLogger(args.output_dir, name="csv"), TensorBoardLogger(args.output_dir, name="tensorboard")],
        log_every_n_steps=10,
        enable_checkpointing=False,
        enable_model_summary=False,
    )


def held_out_perplexity(trainer: L.Trainer, model: LanguageModel, data: TextDataModule) -> float:
    [metrics] = trainer.test(model, data, verbose=False)
    return metrics["perplexity"]


def report(summary: RunSummary, before: float, after: float) -> None:
    steps = ", ".join(f"worker {worker}: {steps}" for worker, steps in enumerate(summary.local_steps))
    print(
        f"held-out perplexity  {before:.1f} before, {after:.1f} after: {before / after:.1f} times lower",
        f"local steps          {steps} (together {summary.total_local_steps})",
        f"outer updates        {summary.version}, staleness {summary.mean_staleness:.2f} on average, "
        f"{summary.max_staleness} at most, {sum(summary.dropped)} dropped",
        f"worker 0             sent {summary.bytes_sent / 1e6:.1f} MB, received {summary.bytes_received / 1e6:.1f} MB, "
        f"training blocked for {summary.blocked_seconds:.3f} s",
        sep="\n",
    )


def print_sample(model: LanguageModel, data: TextDataModule, prompt: str) -> None:
    tokens = model.gpt.generate(torch.tensor(data.tokenizer.encode(prompt).ids), new_tokens=150)
    print("sample", "------", data.tokenizer.decode(tokens.tolist()), "------", sep="\n")


def main() -> None:
    args = parse_arguments()
    # Blocks of tokens are cheap to load, and held-out blocks that a sampler repeats to give all workers the same number
    # are too few to matter.
    warnings.filterwarnings("ignore", ".*does not have many workers.*|.*Using `DistributedSampler`.*")
    L.seed_everything(args.seed)

    data = build_data(args, args.output_dir / "text")
    model = build_model(args)
    recorder = RunRecorder()
    # For the sums of metrics in `test`; NCCL, the default with GPUs, cannot join two processes of one GPU.
    strategy = AsyncLocalSGDStrategy(local_steps=args.local_steps, process_group_backend="gloo")
    trainer = build_trainer(args, strategy, recorder)

    before = held_out_perplexity(trainer, model, data)
    trainer.fit(model, data)
    after = held_out_perplexity(trainer, model, data)
    summary = strategy.summary
    assert summary is not None

    # On a line of its own, wherever the progress bar of worker 0 has left the cursor.
    print(f"\nworker {trainer.global_rank} digest {summary.digest}", flush=True)
    if trainer.is_global_zero:
        report(summary, before, after)
        print_sample(model, data, args.prompt)
        picture = args.output_dir / "run.png"
        draw_run(recorder, math.log(before), math.log(after), picture)
        print(f"picture              {picture}")


if __name__ == "__main__":
    main()
