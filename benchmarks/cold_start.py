"""From scratch and after a pretraining: the default against synchronous DiLoCo, tuned and with the papers' settings.

    python benchmarks/cold_start.py            # all runs that are missing, then the report
    python benchmarks/cold_start.py --report   # the report of what is there

Simulated, as the tables of ``paper.py``, with the same model and text. Outer learning rate and momentum of synchronous
DiLoCo are tuned for each start and length, on a seed that is in no table; on the same seed, with shorter rounds, the
growth of the default's momentum was chosen.
Every run is kept as one line of ``cold_start.jsonl``, so that the command can be ended at any time and goes on.
"""

import argparse
import math
import multiprocessing
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from multiprocessing.pool import Pool
from pathlib import Path
from statistics import fmean

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from _language import Task, load_tokens
from _paper_runs import LANGUAGE, LEVELS, SYNC, TUNING_SEED, VERY, Result, Results, Run, execute, prepare
from lightning_async_localsgd import METHODS
from paper import CACHE, REPOSITORY

DEFAULT, ALGORITHM_3 = "dn-growing", "dn"
LOCAL_STEPS = 50
WORKERS = (4, 8, 16)
PAPERS = (0.7, 0.9)
"""Outer learning rate and momentum that the papers use."""
CANDIDATES = ((0.7, 0.5), (0.7, 0.7), (0.7, 0.8), PAPERS, (1.0, 0.3), (1.0, 0.5), (1.0, 0.7), (1.0, 0.9))
"""Candidates for the tuning of synchronous DiLoCo with four workers."""
FEWER = 3
"""Of more workers, the best of these candidates with four are tried."""


@dataclass(frozen=True)
class Start:
    """The start and the length of training."""

    pretrain_steps: int
    steps: int

    @property
    def name(self) -> str:
        return f"{'warm' if self.pretrain_steps else 'scratch'}-{self.steps}"

    @property
    def title(self) -> str:
        start = (
            f"after {self.pretrain_steps:,} steps of a common pretraining" if self.pretrain_steps else "from scratch"
        )
        return f"{start}, {self.steps:,} steps per worker"


STARTS = (Start(0, 600), Start(0, 2000), Start(1000, 1000))


def make_run(start: Start, workers: int, method: str, level: str, seed: int, outer: tuple[float, float] | None) -> Run:
    lr, momentum = outer or (METHODS[method].outer_lr, None)
    return Run(
        task=LANGUAGE,
        method=method,
        heterogeneity=level,
        workers=workers,
        pace="fixed" if method == SYNC else "dylu",
        outer_lr=lr,
        momentum_activation=0.0,
        grace_period=0.05,
        seed=seed,
        steps=start.steps,
        local_steps=LOCAL_STEPS,
        pretrain_steps=start.pretrain_steps,
        outer_momentum=momentum,
        overlap=method != SYNC,
    )


class Grid:
    """The runs known so far: later runs depend on the results of the tuning."""

    def __init__(self, results: Results, args: argparse.Namespace) -> None:
        self.results = results
        self.seeds: list[int] = args.seeds
        self.workers: list[int] = args.workers
        self.levels: list[str] = args.levels
        starts = [start for start in STARTS if start.name in args.starts]
        self.starts = [start if args.steps is None else replace(start, steps=args.steps) for start in starts]

    def tuning(self, start: Start, workers: int) -> list[Run]:
        """The runs that synchronous DiLoCo is tuned by; of more than four workers none, until four are tuned."""
        candidates = list(CANDIDATES)
        if workers > 4:
            tried = self.losses(self.tuning(start, 4))
            if len(tried) < len(CANDIDATES):
                return []
            candidates = sorted(candidates, key=lambda outer: tried[outer])[:FEWER]
        # All wait for each other: heterogeneity changes how long it takes, and nothing else.
        return [make_run(start, workers, SYNC, VERY, TUNING_SEED, outer) for outer in candidates]

    def losses(self, runs: list[Run]) -> dict[tuple[float, float], float]:
        found = {(r.outer_lr, r.outer_momentum or 0.0): self.results.of([r]) for r in runs}
        return {outer: _loss(result[TUNING_SEED]) for outer, result in found.items() if result}

    def tuned(self, start: Start, workers: int) -> tuple[float, float] | None:
        runs = self.tuning(start, workers)
        losses = self.losses(runs)
        return min(losses, key=lambda outer: losses[outer]) if runs and len(losses) == len(runs) else None

    def rows(self, start: Start, workers: int, seeds: list[int]) -> dict[str, list[Run]]:
        """The runs of a table, row by row, over seeds."""
        rows = {}
        tuned = self.tuned(start, workers)
        if tuned is not None:
            rows["synchronous, tuned"] = [make_run(start, workers, SYNC, VERY, seed, tuned) for seed in seeds]
        rows["synchronous, the papers'"] = [make_run(start, workers, SYNC, VERY, seed, PAPERS) for seed in seeds]
        for level in self.levels:
            rows[f"default, {level}"] = [make_run(start, workers, DEFAULT, level, seed, None) for seed in seeds]
        if workers == 4:
            rows["Algorithm 3, very"] = [make_run(start, workers, ALGORITHM_3, VERY, seed, None) for seed in seeds]
        return rows

    def missing(self) -> list[Run]:
        runs = [run for start in self.starts for workers in self.workers for run in self.tuning(start, workers)]
        for start in self.starts:
            for workers in self.workers:
                for of_row in self.rows(start, workers, self.seeds).values():
                    runs += of_row
        missing = [run for run in dict.fromkeys(runs) if run not in self.results]
        return sorted(missing, key=lambda run: (run.workers, run.seed, -run.steps))


# ---- running --------------------------------------------------------------------------------------------------------


def execute_missing(grid: Grid, cache: Path, jobs: int, until: float) -> None:
    load_tokens(cache, Task())
    with multiprocessing.get_context("spawn").Pool(jobs, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        starts = {(LANGUAGE, s.pretrain_steps, seed, cache) for s in grid.starts for seed in (TUNING_SEED, *grid.seeds)}
        pool.starmap(prepare, sorted(starts), chunksize=1)
        while (missing := grid.missing()) and time.monotonic() < until:  # tuning makes more runs known
            execute_all(missing, grid.results, cache, pool, until)
        pool.terminate()


def execute_all(runs: list[Run], results: Results, cache: Path, pool: Pool, until: float) -> None:
    under_way = pool.imap_unordered(partial(execute_one, cache), runs)
    for i in range(len(runs)):
        try:
            run, result = under_way.next(timeout=max(0.0, until - time.monotonic()))
        except multiprocessing.TimeoutError:
            return
        results.add(run, result)
        print(f"{i + 1}/{len(runs)} {describe(run)}: perplexity {math.exp(_loss(result)):.2f}", flush=True)


def execute_one(cache: Path, run: Run) -> tuple[Run, Result]:
    return run, execute(run, cache)


def describe(run: Run) -> str:
    momentum = "" if run.outer_momentum is None else f", momentum {run.outer_momentum:g}"
    start = f"{run.pretrain_steps} + {run.steps} steps"
    return (
        f"{start}, {run.workers} workers, {run.heterogeneity}, {run.method} (lr {run.outer_lr:g}{momentum}), {run.seed}"
    )


def _loss(result: Result) -> float:
    return result["loss"] if math.isfinite(result["loss"]) else math.inf


# ---- report ---------------------------------------------------------------------------------------------------------


def tables(grid: Grid) -> Iterator[str]:
    for start in grid.starts:
        yield f"**{start.title[0].upper()}{start.title[1:]}.**\n"
        yield "| workers | row | perplexity | over tuned synchronous, by seed | mean | largest rise |"
        yield "|---|---|---|---|---|---|"
        for workers in grid.workers:
            yield from _table_rows(grid, start, workers)
        yield ""


def _table_rows(grid: Grid, start: Start, workers: int) -> Iterator[str]:
    tuned = grid.tuned(start, workers)
    rows = grid.rows(start, workers, grid.seeds)
    reference = grid.results.of(rows.get("synchronous, tuned", []))
    for name, runs in rows.items():
        found = grid.results.of(runs)
        if not found:
            continue
        if name == "synchronous, tuned" and tuned is not None:
            name = f"synchronous, tuned (lr {tuned[0]:g}, momentum {tuned[1]:g})"
        perplexity = fmean(math.exp(_loss(result)) for result in found.values())
        ratios = [
            math.exp(_loss(result) - _loss(reference[seed])) for seed, result in found.items() if seed in reference
        ]
        by_seed = ", ".join(f"{ratio:.3f}" for ratio in ratios)
        mean = f"{fmean(ratios):.3f}" if ratios else ""
        rise = max(largest_rise(result) for result in found.values())
        yield f"| {workers} | {name} | {perplexity:.2f} | {by_seed} | {mean} | {rise - 1:+.1%} |"


def largest_rise(result: Result) -> float:
    """Largest ratio of held-out perplexity at one evaluation to the previous one; 1: it never grew."""
    losses = [point[3] for point in result["curve"]]
    return max([1.0, *(math.exp(after - before) for before, after in pairwise(losses))])


def draw(grid: Grid, path: Path) -> None:
    figure = Figure(figsize=(13, 4), layout="constrained")
    colors = {"synchronous, tuned": "#4477aa", "synchronous, the papers'": "#66ccee", "Algorithm 3, very": "#ccbb44"}
    for axes, start in zip(figure.subplots(1, len(grid.starts)), grid.starts, strict=True):
        for name, runs in grid.rows(start, 4, grid.seeds).items():
            found = grid.results.of(runs)
            if not found or (name.startswith("default") and not name.endswith(VERY)):
                continue
            curves = [result["curve"] for result in found.values()]
            points = list(zip(*curves, strict=False))
            steps = [point[0][2] / 4 for point in points]
            perplexity = [fmean(math.exp(min(p[3], 20.0)) for p in point) for point in points]
            axes.plot(steps, perplexity, label=name, color=colors.get(name, "#ee6677"), lw=1.8)
        title = f"{start.steps:,} steps per worker " + (
            "after a pretraining" if start.pretrain_steps else "from scratch"
        )
        axes.set(title=title, xlabel="local steps per worker", ylabel="held-out perplexity")
        if not start.pretrain_steps:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def write(grid: Grid, document: Path) -> None:
    """Replace the tables in the document, between two marks."""
    text = "\n".join(tables(grid))
    print(text)
    old = document.read_text()
    new = re.sub(r"(<!-- tables -->\n).*?(<!-- end -->)", lambda m: f"{m[1]}\n{text}\n{m[2]}", old, flags=re.DOTALL)
    document.write_text(new)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help=f"not {TUNING_SEED}")
    parser.add_argument("--workers", nargs="+", type=int, choices=WORKERS, default=list(WORKERS))
    names = [start.name for start in STARTS]
    parser.add_argument("--starts", nargs="+", choices=names, default=names, metavar="START", help=str(names))
    parser.add_argument("--levels", nargs="+", choices=LEVELS, default=list(LEVELS), help="of heterogeneity")
    parser.add_argument("--steps", type=int, help="of every run: a smoke run")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--minutes", type=float, default=10_000.0, help="after which no result is waited for")
    parser.add_argument("--report", action="store_true", help="run nothing, report what is there")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "benchmarks/results", help="results")
    parser.add_argument("--document", type=Path, default=REPOSITORY / "docs/cold-start.md", help="takes the tables")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder for tokens and pretrained parameters")
    args = parser.parse_args()
    if TUNING_SEED in args.seeds:
        parser.error(f"Seed {TUNING_SEED} is the one that synchronous DiLoCo is tuned on: choose others.")
    torch.set_num_threads(1)
    grid = Grid(Results(args.output / "cold_start.jsonl"), args)
    if not args.report:
        execute_missing(grid, args.cache, args.jobs, time.monotonic() + 60 * args.minutes)
    write(grid, args.document)
    draw(grid, args.document.parent / "images/cold_start.png")


if __name__ == "__main__":
    main()
