"""What codecs cost in learning: held-out perplexity with each codec over that with fp32, the same run otherwise.

    python benchmarks/codec_quality.py            # all runs that are missing, then the report
    python benchmarks/codec_quality.py --report   # the report of what is there

Simulated with the real codecs, error feedback included, from scratch with the default method, at the toy's speeds. The
network takes no time: what differs is what is lost in rounding. Even bf16 leads such a short run along another path, so
its row shows how much of a difference is no more than that. Every run is kept as one line of ``codec_quality.jsonl``,
so that the command can be ended at any time and goes on.
"""

import argparse
import json
import math
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean

import torch
from torch.utils.data import DataLoader

from _devices import TOY_SECONDS_PER_STEP
from _language import LanguageModel, Task, held_out_loss, load_pretrained, load_tokens
from lightning_async_localsgd import make_method
from lightning_async_localsgd.simulation import simulate
from paper import CACHE, REPOSITORY

FP32 = "fp32"
CODECS = (FP32, "bf16", "int8", "int4", "e3m0", "topk")
WORKERS = (4, 8)
METHOD = "dn-growing"
LOCAL_STEPS = 50


@dataclass(frozen=True)
class Run:
    """All that the result of one run depends on, but the code."""

    codec: str
    workers: int
    steps: int
    seed: int
    method: str = METHOD


def execute(cache: Path, run: Run) -> tuple[Run, float]:
    """Simulate a run; returns the held-out loss as well."""
    task = Task(pretrain_steps=0)
    training, held_out = load_tokens(cache, task)
    module = LanguageModel(task, run.steps)
    module.gpt.load_state_dict(load_pretrained(cache, task, run.seed))
    simulate(
        module,
        DataLoader(training, batch_size=task.batch_size, shuffle=True, drop_last=True),
        [1 / seconds for seconds in sorted(TOY_SECONDS_PER_STEP * (run.workers // len(TOY_SECONDS_PER_STEP)))],
        run.steps,
        seed=run.seed,
        trainer_options={"gradient_clip_val": 1.0, "accelerator": "cpu"},
        local_steps=LOCAL_STEPS,
        codec=run.codec,
        **make_method(run.method, run.workers),
    )
    parameters = {name: value.clone() for name, value in module.gpt.state_dict().items()}
    return run, held_out_loss(module.gpt, parameters, held_out)


class Results:
    """The known losses, and their file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.losses = {Run(**line["run"]): line["loss"] for line in map(json.loads, lines)}

    def add(self, run: Run, loss: float) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps({"run": asdict(run), "loss": loss}) + "\n")
        self.losses[run] = loss


def table(results: Results, workers: Sequence[int], steps: Sequence[int], seeds: Sequence[int]) -> Iterator[str]:
    yield "| workers | steps per worker | codec | perplexity | over fp32, by seed | mean |"
    yield "|---|---|---|---|---|---|"
    for k, length, codec in product(workers, steps, CODECS):
        runs = [Run(codec, k, length, seed) for seed in seeds]
        pairs = [(results.losses.get(run), results.losses.get(Run(FP32, k, length, run.seed))) for run in runs]
        known = [(loss, reference) for loss, reference in pairs if loss is not None and reference is not None]
        if known:
            ratios = [math.exp(loss - reference) for loss, reference in known]
            perplexity = fmean(math.exp(loss) for loss, _ in known)
            by_seed = ", ".join(f"{ratio:.3f}" for ratio in ratios)
            yield f"| {k} | {length} | {codec} | {perplexity:.2f} | {by_seed} | {fmean(ratios):.4f} |"


def execute_missing(runs: Sequence[Run], results: Results, cache: Path, jobs: int) -> None:
    load_tokens(cache, Task())
    for seed in {run.seed for run in runs}:
        load_pretrained(cache, Task(pretrain_steps=0), seed)
    with multiprocessing.get_context("spawn").Pool(jobs, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for i, (run, loss) in enumerate(pool.imap_unordered(partial(execute, cache), runs), 1):
            results.add(run, loss)
            print(f"{i}/{len(runs)} {run}: perplexity {math.exp(loss):.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--workers", nargs="+", type=int, choices=WORKERS, default=list(WORKERS))
    parser.add_argument("--steps", nargs="+", type=int, default=[600], help="local steps per worker")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--codecs", nargs="+", choices=CODECS, default=list(CODECS))
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--report", action="store_true", help="run nothing, report what is there")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "benchmarks/results", help="results")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder for tokens and initial parameters")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = Results(args.output / "codec_quality.jsonl")
    grid = [Run(c, k, s, seed) for s, k, seed, c in product(args.steps, args.workers, args.seeds, args.codecs)]
    if not args.report:
        execute_missing([run for run in grid if run not in results.losses], results, args.cache, args.jobs)
    print("\n".join(table(results, args.workers, args.steps, args.seeds)))


if __name__ == "__main__":
    main()
