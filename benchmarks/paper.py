"""The tables of Liu et al. 2024 (arXiv 2401.09135) again, at a size that this machine can train, simulated.

    python benchmarks/paper.py            # all runs that are missing, then the report
    python benchmarks/paper.py --report   # the report of what is there
    python benchmarks/paper.py --full --help   # the paper's own scale, on real devices

Every run is a simulation in virtual time. Its result is kept as one line of ``paper.jsonl`` when it is there, so that
the command can be ended at any time and goes on from there. The report rewrites the tables of ``docs/reproduction.md``.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.pool import Pool
from pathlib import Path

import torch

from _language import Task, load_tokens
from _paper_report import report
from _paper_runs import (
    ASYNC_BUFFER,
    ASYNC_DILOCO,
    DN,
    LANGUAGE,
    LESSER,
    LEVELS,
    NONE,
    PRETRAINED,
    SINGLE,
    SIZES,
    SYNC,
    TOY,
    TUNED,
    TUNING_SEED,
    VERY,
    Grid,
    Result,
    Results,
    Run,
    execute,
    prepare,
    tuning_level,
)

REPOSITORY = Path(__file__).parents[1]
CACHE = Path(tempfile.gettempdir()) / "async-localsgd-benchmarks"


# ---- the tables -----------------------------------------------------------------------------------------------------

Cell = tuple[str, dict[str, object]]  # a method, and how its runs differ from the grid's usual


def heterogeneity_cells() -> Iterator[Cell]:
    for level in LEVELS:
        for method in (SYNC, ASYNC_DILOCO, ASYNC_BUFFER, DN):
            yield method, {"heterogeneity": level}
        yield DN, {"heterogeneity": level, "momentum_activation": 0.1}
        yield DN, {"heterogeneity": level, "pace": "fixed"}
    yield DN, {"grace_period": 0.5}
    yield SINGLE, {}
    yield PRETRAINED, {}


def baseline_cells() -> Iterator[Cell]:
    for method in LESSER:
        yield method, {}
    for method in (ASYNC_DILOCO, ASYNC_BUFFER, *LESSER):
        yield method, {"pace": "dylu"}


def worker_cells() -> Iterator[Cell]:
    for workers in (8, 16):
        yield from _against_sync({"workers": workers})


def size_cells() -> Iterator[Cell]:
    for size in SIZES:
        if size != LANGUAGE:  # which is in the first table
            yield from _against_sync({"task": size})


def _against_sync(differences: dict[str, object]) -> Iterator[Cell]:
    for method in (SYNC, ASYNC_DILOCO, DN):
        yield method, differences
    yield DN, {**differences, "momentum_activation": 0.1}


def toy_cells() -> Iterator[Cell]:
    for level in (NONE, VERY):
        toy = {"task": TOY, "heterogeneity": level}
        for method in (SYNC, DN):
            yield method, toy
        # The authors' toy scales deltas by sqrt(k)/k, which is 0.5.
        yield ASYNC_DILOCO, {**toy, "outer_lr": 0.35}
        yield ASYNC_DILOCO, {**toy, "outer_lr": 0.05}
        yield "async-sgd", {**toy, "outer_lr": 0.5}
        yield ASYNC_BUFFER, {**toy, "outer_lr": 0.7}


TABLES: dict[str, Callable[[], Iterator[Cell]]] = {
    "heterogeneity": heterogeneity_cells,
    "workers": worker_cells,
    "sizes": size_cells,
    "toy": toy_cells,
    "baselines": baseline_cells,
}


def tuning_runs(tables: list[str], grid: Grid) -> list[Run]:
    """The runs by which the baselines in these tables are tuned."""
    cells = [cell for table in tables for cell in TABLES[table]()]
    tuned = {
        (method, tuning_level(method, str(differences.get("heterogeneity", VERY))))
        for method, differences in cells
        if method in TUNED and "outer_lr" not in differences
    }
    runs = (
        run
        for method, level in sorted(tuned)
        for lr in TUNED[method]
        for run in grid.runs(method, outer_lr=lr, heterogeneity=level, seeds=[TUNING_SEED])
    )
    return by_length(runs)


def table_runs(table: str, grid: Grid, results: Results) -> list[Run]:
    """The runs of a table, whose baselines have been tuned."""
    runs: list[Run] = []
    if table == "heterogeneity" and (common := results.common_outer_lr(grid, ASYNC_DILOCO)) is not None:
        runs += [r for level in LEVELS for r in grid.runs(ASYNC_DILOCO, outer_lr=common, heterogeneity=level)]
    for method, differences in TABLES[table]():
        outer_lr = results.tuned_outer_lr(grid, method, str(differences.get("heterogeneity", VERY)))
        runs += grid.runs(method, **{"outer_lr": outer_lr, **differences})  # type: ignore[arg-type]
    return by_length(runs)


def by_length(runs: Iterator[Run] | list[Run]) -> list[Run]:
    return sorted(runs, key=lambda run: -run.expected_seconds)


# ---- running --------------------------------------------------------------------------------------------------------


def execute_missing(tables: list[str], grid: Grid, results: Results, cache: Path, jobs: int) -> None:
    """Make all runs of these tables whose result is not there yet, in ``jobs`` processes."""
    load_tokens(cache, Task())
    with multiprocessing.get_context("spawn").Pool(jobs, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for table in tables:
            print(f"{table}:", flush=True)
            execute_all(tuning_runs([table], grid), results, cache, pool)
            execute_all(table_runs(table, grid, results), results, cache, pool)


def execute_all(runs: list[Run], results: Results, cache: Path, pool: Pool) -> None:
    missing = [run for run in dict.fromkeys(runs) if run not in results]
    starts = {(run.task, run.pretrain_steps, run.seed, cache) for run in missing if run.task != TOY}
    pool.starmap(prepare, sorted(starts), chunksize=1)
    begin = time.monotonic()
    for i, (run, result) in enumerate(pool.imap_unordered(partial(execute_one, cache), missing)):
        results.add(run, result)
        minutes = (time.monotonic() - begin) / 60
        print(f"{i + 1}/{len(missing)} {describe(run)}: loss {result['loss']:.4f}, {minutes:.1f} minutes", flush=True)


def execute_one(cache: Path, run: Run) -> tuple[Run, Result]:
    return run, execute(run, cache)


def describe(run: Run) -> str:
    settings = f"{run.pace}, lr {run.outer_lr:g}, c {run.momentum_activation:g}, grace {run.grace_period:g} s"
    return f"{run.task}, {run.workers} workers, {run.heterogeneity}, {run.method} ({settings}), seed {run.seed}"


def print_plan(tables: list[str], grid: Grid, results: Results) -> None:
    """What is missing, as far as it is known before the tuning, and about how long it takes."""
    runs = tuning_runs(tables, grid)
    for table in tables:
        for method, differences in TABLES[table]():
            level = str(differences.get("heterogeneity", VERY))
            guess = results.tuned_outer_lr(grid, method, level) or TUNED.get(method, (0.0,))[0]
            runs += grid.runs(method, **{"outer_lr": guess, **differences})  # type: ignore[arg-type]
    missing = [run for run in dict.fromkeys(runs) if run not in results]
    minutes = sum(run.expected_seconds for run in missing) / 60
    print(
        f"{len(missing)} of {len(dict.fromkeys(runs))} runs are missing: about {minutes:.0f} minutes of a quiet core."
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--tables", nargs="+", choices=TABLES, default=list(TABLES), metavar="TABLE", help=str([*TABLES])
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], metavar="SEED", help=f"not {TUNING_SEED}")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--plan", action="store_true", help="run nothing, tell what is missing")
    parser.add_argument("--report", action="store_true", help="run nothing, report what is there")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "benchmarks/results", help="results and pictures")
    parser.add_argument("--document", type=Path, default=REPOSITORY / "docs/reproduction.md", help="takes the tables")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder for tokens and pretrained parameters")
    parser.add_argument("--steps", type=int, default=1000, help="local steps per worker; half as many for 16 workers")
    parser.add_argument("--toy-steps", type=int, default=1000, help="the same for the toy task: together one pass")
    parser.add_argument("--local-steps", type=int, default=50, help="H of the language models")
    parser.add_argument("--pretrain-steps", type=int, default=Task().pretrain_steps)
    parser.add_argument("--full", action="store_true", help="the paper's own scale; has options of its own")
    args = parser.parse_args()
    if TUNING_SEED in args.seeds:
        parser.error(f"Seed {TUNING_SEED} is the one that outer learning rates are tuned on: choose others.")
    return args


def main() -> None:
    if "--full" in sys.argv[1:]:
        import paper_full

        paper_full.main([argument for argument in sys.argv[1:] if argument != "--full"])
        return
    args = parse_arguments()
    torch.set_num_threads(1)  # several, on a busy machine, evaluate ten times slower
    grid = Grid(tuple(args.seeds), args.steps, args.toy_steps, args.local_steps, args.pretrain_steps)
    results = Results(args.output / "paper.jsonl")
    if args.plan:
        print_plan(args.tables, grid, results)
        return
    if not args.report:
        execute_missing(args.tables, grid, results, args.cache, args.jobs)
    report(grid, results, args.output, args.document)


if __name__ == "__main__":
    main()
