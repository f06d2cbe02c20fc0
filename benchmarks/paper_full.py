"""The paper's own scale, on real devices: C4, models of 20M to 150M parameters, 64,000 steps per worker.

First the start that all methods share, then each method with a worker per device:

    python benchmarks/paper.py --full --model 20M --method pretrain
    torchrun --nproc-per-node 4 benchmarks/paper.py --full --model 20M --method dn
    torchrun --nproc-per-node 4 benchmarks/paper.py --full --model 20M --method sync
    python benchmarks/paper.py --full --model 20M --method single

Every run adds a line to ``paper_full.jsonl``. ``--heterogeneity`` and ``--fastest-step`` make equal devices unequal by
sleep in their steps. Settings that the paper leaves open are options; the defaults of batch size, learning rate and
warm-up are DiLoCo's (arXiv 2311.08105).
"""

import argparse
import json
import math
import os
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn

from _devices import SimulatedDevice
from _paper_runs import LEVELS, WORKERS, seconds_per_step
from lightning_async_localsgd import METHODS, AsyncLocalSGDStrategy, make_method
from lightning_async_localsgd.demo.corpora import Corpus, FileCorpus, HubCorpus
from lightning_async_localsgd.demo.gpt import GPT, CausalSelfAttention
from lightning_async_localsgd.demo.language_model import LanguageModel
from lightning_async_localsgd.demo.text import TextDataModule

PRETRAIN = "pretrain"
SINGLE = "single"
KEY_SIZE = 64
STORED_DOCUMENTS = 100_000
"""The first of C4, which make the tokenizer and the held-out set; training streams the rest."""


@dataclass(frozen=True)
class Size:
    """A model of the paper; ``tiny`` is for a smoke run."""

    layers: int
    width: int
    heads: int
    vocab_size: int = 32_000
    context: int = 256


SIZES = {
    "tiny": Size(1, 32, 2, vocab_size=512, context=32),
    "20M": Size(6, 256, 4),
    "60M": Size(3, 896, 16),
    "150M": Size(12, 896, 16),
}


class WideAttention(CausalSelfAttention):
    """Attention whose keys have a size of their own, as the paper's: 16 heads of 64 at a width of 896."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads)
        self.qkv = nn.Linear(width, 3 * heads * KEY_SIZE, bias=False)
        self.projection = nn.Linear(heads * KEY_SIZE, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, KEY_SIZE).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.projection(attended.transpose(1, 2).reshape(batch, length, self.heads * KEY_SIZE))


def make_gpt(size: Size) -> GPT:
    gpt = GPT(size.vocab_size, size.context, size.width, size.layers, size.heads)
    for block in gpt.blocks:
        block.attention = WideAttention(size.width, size.heads)
        nn.init.normal_(block.attention.qkv.weight, std=0.02)
        nn.init.normal_(block.attention.projection.weight, std=0.02 / math.sqrt(2 * size.layers))
    return gpt


def make_data(args: argparse.Namespace, batch_size: int) -> TextDataModule:
    size = SIZES[args.model]
    corpus: Corpus = HubCorpus("allenai/c4", "en", "text", STORED_DOCUMENTS)
    if args.text is not None:
        corpus = FileCorpus(args.text)
    return TextDataModule(corpus, args.cache / "text", size.vocab_size, size.context, batch_size)


def make_strategy(args: argparse.Namespace, workers: int) -> Any:
    if args.method in (PRETRAIN, SINGLE):
        return "auto"
    options = {"momentum_activation": args.momentum_activation} if args.momentum_activation else {}
    method = make_method(args.method, workers, outer_lr=args.outer_lr, pace=args.pace, **options)
    grace_period = args.grace_period
    if grace_period is None:  # two steps of the slowest worker, if it is known
        grace_period = 2 * max(step_seconds(args, workers), default=0.5)
    waiting = {"local_steps": args.local_steps, "grace_period": grace_period, "overlap": False}
    return AsyncLocalSGDStrategy(**method | waiting, process_group_backend="gloo")


def step_seconds(args: argparse.Namespace, workers: int) -> list[float]:
    """Seconds per step of each worker; empty: real speeds."""
    if args.heterogeneity is None:
        return []
    seconds = seconds_per_step(args.heterogeneity, workers)
    return [args.fastest_step * s / min(seconds) for s in seconds]


def run(args: argparse.Namespace) -> None:
    alone = args.method in (PRETRAIN, SINGLE)
    workers = int(os.environ.get("WORLD_SIZE", 1))
    if alone and workers > 1:
        raise SystemExit(f"--method {args.method} is a run on one device: start it without torchrun.")
    start = args.cache / f"pretrained-{args.model}-seed{args.seed}.pt"
    if args.method != PRETRAIN and not start.exists():
        raise SystemExit(
            f"There is no {start}: run --method {PRETRAIN} with the same --model, --seed and --cache first."
        )
    L.seed_everything(args.seed, verbose=False)
    model = LanguageModel(make_gpt(SIZES[args.model]), args.learning_rate, args.warmup_steps)
    if args.method != PRETRAIN:
        model.gpt.load_state_dict(torch.load(start))
    data = make_data(args, args.batch_size * (WORKERS if args.method == SINGLE else 1))
    slow = step_seconds(args, workers) if not alone else []
    strategy = make_strategy(args, workers)
    trainer = L.Trainer(
        accelerator=args.accelerator,
        devices=1 if alone else int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
        num_nodes=1 if alone else int(os.environ.get("GROUP_WORLD_SIZE", 1)),
        strategy=strategy,
        precision=args.precision,
        max_steps=args.pretrain_steps if args.method == PRETRAIN else args.steps,
        gradient_clip_val=1.0,
        callbacks=[SimulatedDevice(slow[int(os.environ["RANK"])])] if slow else [],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=args.progress,
    )
    begin = time.monotonic()
    trainer.fit(model, data)
    seconds = time.monotonic() - begin
    [metrics] = trainer.test(model, data, verbose=False)
    if trainer.is_global_zero and args.method == PRETRAIN:
        start.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.gpt.state_dict(), start)
    keep(args, model, workers, metrics["perplexity"], seconds, getattr(strategy, "summary", None))


@rank_zero_only
def keep(
    args: argparse.Namespace, model: L.LightningModule, workers: int, perplexity: float, seconds: float, summary: Any
) -> None:
    """Add the run to the results."""
    places = ("text", "output", "cache", "progress")
    settings = {name: value for name, value in vars(args).items() if name not in places}
    settings["corpus"] = "C4" if args.text is None else args.text.name
    line = {
        "run": settings,
        "workers": workers,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "perplexity": perplexity,
        "seconds": round(seconds, 1),
        "summary": asdict(summary) if summary is not None else None,
    }
    args.output.mkdir(parents=True, exist_ok=True)
    with (args.output / "paper_full.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(
        f"{args.model}, {args.method}, {workers} workers: perplexity {perplexity:.2f} after {seconds:.1f} s", flush=True
    )


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="paper.py --full", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=SIZES, default="20M")
    parser.add_argument("--method", choices=[PRETRAIN, SINGLE, *METHODS], default="dn")
    parser.add_argument("--outer-lr", type=float, help="default: the method's")
    parser.add_argument("--pace", choices=["fixed", "dylu"], help="default: the method's")
    parser.add_argument("--momentum-activation", type=float, default=0.0, help="c of dn, at most 1/workers")
    parser.add_argument("--local-steps", type=int, default=50, help="H (50)")
    parser.add_argument("--grace-period", type=float, help="seconds; default: two of the slowest steps asked for, or 1")
    parser.add_argument("--heterogeneity", choices=LEVELS, help="make the devices unequal; default: as they are")
    parser.add_argument("--fastest-step", type=float, default=0.58, help="seconds per step of the fastest then (0.58)")
    parser.add_argument("--steps", type=int, default=64_000, help="local steps per worker (64,000)")
    parser.add_argument("--pretrain-steps", type=int, default=24_000, help="(24,000)")
    parser.add_argument("--batch-size", type=int, default=512, help="sequences per worker and step (512)")
    parser.add_argument("--learning-rate", type=float, default=4e-4, help="of the inner AdamW (4e-4)")
    parser.add_argument("--warmup-steps", type=int, default=1000, help="(1,000)")
    parser.add_argument("--precision", default="32-true", help="of the Trainer (32-true)")
    parser.add_argument("--accelerator", default="auto", help="of the Trainer (auto)")
    parser.add_argument("--text", type=Path, help="a text file or folder in place of C4")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--progress", action="store_true", help="show Lightning's progress bar")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder for the results")
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path(tempfile.gettempdir()) / "async-localsgd-benchmarks" / "full",
        help="folder for text and pretrained parameters, the same for all processes",
    )
    args = parser.parse_args(arguments)
    if args.momentum_activation and args.method != "dn":
        parser.error("--momentum-activation is for --method dn.")
    return args


def main(arguments: list[str]) -> None:
    warnings.filterwarnings("ignore", ".*does not have many workers.*|.*Using `DistributedSampler`.*|.*treespec.*")
    run(parse_arguments(arguments))
