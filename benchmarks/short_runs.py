"""Short first runs of six small projects with everything left at its default, against DDP with the same samples.

    python benchmarks/short_runs.py            # all that is missing, then the report
    python benchmarks/short_runs.py --report   # the report of what is there

Unequal workers are simulated at the speeds of the paper's toy experiment: two of them, or four. DDP makes as many steps
with as many workers; here one process takes the workers' batches of a step one after the other and adds up their
gradients, which is the same sum. Each project keeps the learning rate that it has. What is missing is taken apart by
three more rows: outer updates that are plain means (what the outer optimizer brings), all workers equal and waiting for
each other with the default's outer optimizer (what staleness costs), and rounds twice as long.
"""

import argparse
import json
import math
import multiprocessing
import os
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from statistics import fmean
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from _devices import TOY_SECONDS_PER_STEP
from _language import Task, load_pretrained, load_tokens
from _short_modules import CACHE, Project, make_projects
from lightning_async_localsgd.outer import DelayedNesterov
from lightning_async_localsgd.simulation import simulate

RESULTS = Path(__file__).parent / "results"
STEPS = (100, 300, 1000)
WORKERS = (2, 4)
DDP, DEFAULT = "ddp", "default"
VARIANTS: dict[str, dict[str, Any]] = {
    DEFAULT: {},
    "plain mean": {"outer_optimizer": partial(DelayedNesterov, lr=1.0, momentum=0.0)},
    "no staleness": {"overlap": False, "pace": "fixed", "quorum": 0},  # of all workers, which are equal
    "rounds twice as long": {"local_steps": 2},  # times those of the default
}


@dataclass(frozen=True)
class Run:
    project: str
    steps: int
    workers: int
    method: str
    seed: int


@cache
def projects() -> dict[str, Project]:
    return make_projects()


def speeds(workers: int) -> list[float]:
    seconds = TOY_SECONDS_PER_STEP if workers == 4 else (TOY_SECONDS_PER_STEP[0], TOY_SECONDS_PER_STEP[-1])
    return [1 / s for s in seconds]


def execute(run: Run) -> tuple[Run, float]:
    for known in (".*does not have many workers.*", ".*treespec.*", ".*log_every_n_steps.*"):
        warnings.filterwarnings("ignore", known)
    project = projects()[run.project]
    torch.manual_seed(run.seed)
    module, data = project.make(run.seed, run.steps)
    generator = torch.Generator().manual_seed(run.seed)
    loader = DataLoader(data, project.batch_size, shuffle=True, drop_last=True, generator=generator)
    if run.method == DDP:
        _train_as_ddp(module, loader, run, project.gradient_clip_val)
    else:
        settings, of = dict(VARIANTS[run.method]), speeds(run.workers)
        if "quorum" in settings:
            settings |= {"quorum": run.workers}
            of = [1.0] * run.workers
        if "local_steps" in settings:
            settings["local_steps"] *= max(1, run.steps // 40)
        trainer_options = {"accelerator": "cpu", "gradient_clip_val": project.gradient_clip_val}
        simulate(module, loader, of, run.steps, seed=run.seed, trainer_options=trainer_options, **settings)
    module.eval()
    return run, project.judge(module)


def _train_as_ddp(module: L.LightningModule, loader: DataLoader[Any], run: Run, clip: float | None) -> None:
    trainer = L.Trainer(
        gradient_clip_val=clip,
        accelerator="cpu",
        max_steps=run.steps,
        accumulate_grad_batches=run.workers,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)


# ---- all of them ----------------------------------------------------------------------------------------------------


class Results:
    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self._values = {Run(**line["run"]): float(line["value"]) for line in map(json.loads, lines)}

    def __contains__(self, run: Run) -> bool:
        return run in self._values

    def add(self, run: Run, value: float) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps({"run": asdict(run), "value": value}) + "\n")
        self._values[run] = value

    def ratios(self, project: str, steps: int, workers: int, method: str, seeds: list[int]) -> list[float]:
        """How good, over DDP, by seed: the metric's ratio, upside down where less is better."""
        found = []
        for seed in seeds:
            ours, ddp = (self._values.get(Run(project, steps, workers, m, seed)) for m in (method, DDP))
            if ours is not None and ddp is not None:
                ratio = ours / ddp if math.isfinite(ours) else math.inf
                found.append(ratio if projects()[project].higher_is_better else 1 / ratio)
        return found

    def value(self, run: Run) -> float:
        return self._values[run]


def all_runs(args: argparse.Namespace) -> Iterator[Run]:
    for method in (DDP, *args.methods):
        for seed in args.seeds:
            for steps in args.steps:
                for workers in args.workers:
                    for project in args.projects:
                        yield Run(project, steps, workers, method, seed)


def execute_missing(args: argparse.Namespace, results: Results) -> None:
    load_tokens(CACHE, Task())
    for seed in args.seeds:
        load_pretrained(CACHE, Task(), seed)
    missing = sorted((run for run in all_runs(args) if run not in results), key=lambda run: -run.steps * run.workers)
    with multiprocessing.get_context("spawn").Pool(args.jobs, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for i, (run, value) in enumerate(pool.imap_unordered(execute, missing)):
            results.add(run, value)
            print(f"{i + 1}/{len(missing)} {run}: {value:.4f}", flush=True)


def report(args: argparse.Namespace, results: Results) -> str:
    """Tables: each project by length and workers, the mean of the seeds and the worst."""
    lines = []
    for method in args.methods:
        lines += [f"**{method}**, over DDP (mean of {len(args.seeds)} seeds, the worst in brackets)\n"]
        columns = [(steps, workers) for workers in args.workers for steps in args.steps]
        lines += ["| project | metric | " + " | ".join(f"{w} workers, {s} steps" for s, w in columns) + " |"]
        lines += ["|---|---|" + "---|" * len(columns)]
        means = []
        for project in args.projects:
            cells = []
            for steps, workers in columns:
                ratios = results.ratios(project, steps, workers, method, args.seeds)
                cells.append(f"{fmean(ratios):.3f} ({min(ratios):.3f})" if ratios else "")
                means += [fmean(ratios)] if ratios else []
            lines.append(f"| {project} | {projects()[project].metric} | " + " | ".join(cells) + " |")
        if means:
            lines += [f"\nMean of all {fmean(means):.3f}, the worst mean {min(means):.3f}.\n"]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--projects", nargs="+", default=["tabular", "forecaster", "graphs", "images", "language", "adapters"]
    )
    parser.add_argument("--steps", nargs="+", type=int, default=list(STEPS), help="per worker")
    parser.add_argument("--workers", nargs="+", type=int, choices=WORKERS, default=list(WORKERS))
    parser.add_argument("--methods", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--report", action="store_true", help="run nothing, report what is there")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    results = Results(args.output / "short_runs.jsonl")
    if not args.report:
        execute_missing(args, results)
    text = report(args, results)
    print(text)
    (args.output / "short_runs.md").write_text(text + "\n")


if __name__ == "__main__":
    main()
