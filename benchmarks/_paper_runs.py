"""One run of the paper's tables: its settings, its simulation, and the file of its result."""

import json
import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset

import _toy
from _devices import TOY_SECONDS_PER_STEP
from _language import LanguageModel, Task, held_out_loss, load_pretrained, load_tokens
from lightning_async_localsgd import METHODS, make_method
from lightning_async_localsgd.simulation import simulate

LANGUAGE = "170k"
TOY = "toy"
SIZES = {LANGUAGE: Task(), "420k": Task(width=112), "1.1M": Task(width=192)}
"""Language models, named after their parameters; all of two layers and four heads."""

LEVELS = {"none": 0.0, "slight": 1 / 3, "moderate": 2 / 3, "very": 1.0}
"""Heterogeneity: the power of the paper's ratios of step times. All levels have the same fastest device."""
NONE, VERY = "none", "very"
WORKERS = len(TOY_SECONDS_PER_STEP)

PRETRAINED = "pretrained"
SINGLE = "single"
SYNC = "sync"
DN = "dn"
ASYNC_DILOCO = "async-nesterov"
ASYNC_BUFFER = "async-buffer"
LESSER = ("async-sgd", "async-momentum", "poly", "polythres", "delay-compensation")

TUNING_SEED = 0
"""The outer learning rates of the baselines are tuned on it, and nothing else is: it is in no table."""
TUNED = {
    ASYNC_DILOCO: (0.025, 0.05, 0.1, 0.2),
    ASYNC_BUFFER: (0.175, 0.35, 0.7),
    "async-sgd": (0.25, 0.5, 1.0),
    "async-momentum": (0.025, 0.05, 0.1),
    "poly": (0.05, 0.1, 0.2),
    "polythres": (0.05, 0.1, 0.2),
    "delay-compensation": (0.025, 0.05, 0.1),
}
"""Candidates for each baseline's outer learning rate. Synchronous DiLoCo and delayed Nesterov use the paper's 0.7,
untuned."""

CURVE_POINTS = 20
_CURVE_WINDOWS = 256  # of the held-out text: a curve has many points, and only its last is a result

Result = dict[str, Any]  # one line of the results


@dataclass(frozen=True)
class Run:
    """All that the result of one run depends on, but the code."""

    task: str
    method: str
    heterogeneity: str
    workers: int
    pace: str
    outer_lr: float
    momentum_activation: float
    """c of delayed Nesterov."""
    grace_period: float
    """Virtual seconds."""
    seed: int
    steps: int
    """Local steps per worker, on average."""
    local_steps: int
    """H, local steps per round of the fastest worker."""
    pretrain_steps: int
    outer_momentum: float | None = None
    """None: the method's."""
    overlap: bool = False

    @property
    def seconds_per_step(self) -> list[float]:
        return seconds_per_step(self.heterogeneity, self.workers)

    @property
    def expected_seconds(self) -> float:
        """About what it takes to compute, on one quiet core."""
        if self.method == PRETRAINED:
            return 1.0
        if self.task == TOY:
            return 0.0017 * self.steps * self.workers
        per_step = 0.002 + 20e-9 * parameters(self.task)
        return 5 + per_step * self.steps * max(self.workers, 2 if self.method == SINGLE else 1)


def seconds_per_step(heterogeneity: str, workers: int) -> list[float]:
    """Seconds per local step of each worker; of more than four, as many have each speed."""
    fastest = min(TOY_SECONDS_PER_STEP)
    speeds = [fastest * (seconds / fastest) ** LEVELS[heterogeneity] for seconds in TOY_SECONDS_PER_STEP]
    return [speeds[worker * len(speeds) // workers] for worker in range(workers)]


@cache
def parameters(task: str) -> int:
    """Number of parameters of a language model."""
    return sum(parameter.numel() for parameter in SIZES[task].make_gpt().parameters())


@dataclass(frozen=True)
class Grid:
    """Makes runs that differ in what a table is about and have all else in common."""

    seeds: tuple[int, ...]
    steps: int
    toy_steps: int
    local_steps: int
    pretrain_steps: int

    def runs(
        self,
        method: str,
        *,
        outer_lr: float | None = None,
        task: str = LANGUAGE,
        heterogeneity: str = VERY,
        workers: int = WORKERS,
        pace: str | None = None,
        momentum_activation: float = 0.0,
        grace_period: float | None = None,
        seeds: Iterable[int] | None = None,
    ) -> list[Run]:
        """One run per seed.

        ``outer_lr`` and ``pace`` are the method's unless given, and ``grace_period`` is two steps of the slowest
        worker: what the library's documentation recommends to workers that wait for their exchange.
        """
        if method == SINGLE:
            heterogeneity, workers, outer_lr, pace = NONE, 1, 1.0, "fixed"
        elif method == PRETRAINED:
            heterogeneity, outer_lr, pace = NONE, 0.0, "fixed"
        if outer_lr is None:
            outer_lr = METHODS[method].outer_lr
        if method == ASYNC_DILOCO:
            outer_lr *= WORKERS / workers  # as many steps with momentum as there are workers take the place of one
        if grace_period is None:
            grace_period = 2 * max(seconds_per_step(heterogeneity, workers))
        steps = self.toy_steps if task == TOY else self.steps
        run = Run(
            task=task,
            method=method,
            heterogeneity=heterogeneity,
            workers=workers,
            pace=pace or METHODS[method].pace,
            outer_lr=outer_lr,
            momentum_activation=min(momentum_activation, 1 / workers),  # no more is allowed
            grace_period=round(grace_period, 6),
            seed=0,
            steps=steps // 2 if workers > 8 else steps,
            local_steps=_toy.LOCAL_STEPS if task == TOY else self.local_steps,
            pretrain_steps=0 if task == TOY else self.pretrain_steps,
        )
        return [replace(run, seed=seed) for seed in (self.seeds if seeds is None else seeds)]


# ---- execution ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Problem:
    module: L.LightningModule
    data: Dataset[Any]
    batch_size: int
    watch: Callable[[Any], Mapping[str, float]]
    """Metrics while it trains, quick."""
    judge: Callable[[Any], Mapping[str, float]]
    """Metrics in the end."""


def prepare(task: str, pretrain_steps: int, seed: int, folder: Path) -> None:
    """Make what runs read, so that no two of them make it at the same time."""
    load_pretrained(folder, replace(SIZES[task], pretrain_steps=pretrain_steps), seed)


def execute(run: Run, folder: Path) -> Result:
    """Simulate a run; returns the line to keep."""
    for known in (".*does not have many workers.*", ".*treespec.*"):
        warnings.filterwarnings("ignore", known)
    begin = time.perf_counter()
    problem = _toy_problem(run) if run.task == TOY else _language_problem(run, folder)
    if run.method == PRETRAINED:
        return {"run": asdict(run), **problem.judge(problem.module)}
    result = simulate(
        problem.module,
        DataLoader(problem.data, batch_size=problem.batch_size, shuffle=True, drop_last=True),
        [1 / seconds for seconds in run.seconds_per_step],
        run.steps,
        evaluate=problem.watch,
        evaluate_every=max(1, run.steps // CURVE_POINTS),
        seed=run.seed,
        trainer_options={"gradient_clip_val": None if run.task == TOY else 1.0, "accelerator": "cpu"},
        **_settings(run),
    )
    return {
        "run": asdict(run),
        **problem.judge(problem.module),
        "virtual_seconds": round(result.seconds, 3),
        "updates": result.version,
        "steps": list(result.local_steps),
        "utilization": round(result.utilization, 4),
        "mean_staleness": round(result.mean_staleness, 3),
        "max_staleness": result.max_staleness,
        "digest": result.digest,
        # Virtual seconds, outer updates, local steps of all workers, held-out loss on a part of the text.
        "curve": [
            [round(e.time, 3), e.version, e.local_steps, round(e.metrics["loss"], 5)] for e in result.evaluations
        ],
        "wall_seconds": round(time.perf_counter() - begin, 1),
    }


def _settings(run: Run) -> dict[str, Any]:
    """The library's settings: as the paper's workers do, ours wait for their exchange, which takes no time here."""
    common = {"local_steps": run.local_steps, "overlap": run.overlap, "grace_period": run.grace_period}
    if run.method == SINGLE:  # rounds that change nothing: the global parameters become those of the only worker
        return common | {"outer_optimizer": partial(torch.optim.SGD, lr=run.outer_lr), "pace": run.pace}
    options = {}
    if run.method == DN:
        options["momentum_activation"] = run.momentum_activation
    elif run.method == "delay-compensation":  # what the library's documentation recommends
        options["strength"] = 1 / (_learning_rate(run) * run.local_steps)
    method = make_method(run.method, run.workers, run.outer_lr, run.outer_momentum, run.pace, **options)
    return method | common


def _learning_rate(run: Run) -> float:
    return _toy.LEARNING_RATE if run.task == TOY else SIZES[run.task].learning_rate


def _language_problem(run: Run, folder: Path) -> _Problem:
    task = replace(SIZES[run.task], pretrain_steps=run.pretrain_steps)
    training, held_out = load_tokens(folder, task)
    module = LanguageModel(task, run.steps)
    module.gpt.load_state_dict(load_pretrained(folder, task, run.seed))
    every = max(1, len(held_out) // _CURVE_WINDOWS)
    part = [held_out[index] for index in range(0, len(held_out), every)]

    def loss_on(windows: Any, module: LanguageModel) -> dict[str, float]:
        copy = {name: value.clone() for name, value in module.gpt.state_dict().items()}
        return {"loss": held_out_loss(module.gpt, copy, windows)}

    batch_size = task.batch_size * (WORKERS if run.method == SINGLE else 1)
    return _Problem(module, training, batch_size, partial(loss_on, part), partial(loss_on, held_out))


def _toy_problem(run: Run) -> _Problem:
    torch.manual_seed(run.seed)
    module = _toy.ToyClassifier(run.steps)
    return _Problem(module, _toy.load_points()[0], _toy.BATCH_SIZE, _toy.evaluate, _toy.evaluate)


# ---- results --------------------------------------------------------------------------------------------------------


def tuning_level(method: str, heterogeneity: str) -> str:
    """Where a baseline is tuned: async DiLoCo at the same heterogeneity, the others with very unequal devices."""
    return heterogeneity if method == ASYNC_DILOCO else VERY


class Results:
    """What is known of runs: a file of lines, each written when its run is over."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self._results = {Run(**result["run"]): result for result in map(json.loads, lines)}

    def __contains__(self, run: Run) -> bool:
        return run in self._results

    def add(self, run: Run, result: Result) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(result) + "\n")
        self._results[run] = result

    def of(self, runs: Iterable[Run]) -> dict[int, Result]:
        """The results that are there, by seed."""
        return {run.seed: self._results[run] for run in runs if run in self._results}

    def tuning(self, grid: Grid, method: str, level: str = VERY) -> dict[float, float]:
        """Held-out loss of a baseline by outer learning rate, as far as it has been tried."""
        runs = {lr: grid.runs(method, outer_lr=lr, heterogeneity=level, seeds=[TUNING_SEED]) for lr in TUNED[method]}
        tried = {lr: self.of(of_lr) for lr, of_lr in runs.items()}
        return {lr: found[TUNING_SEED]["loss"] for lr, found in tried.items() if found}

    def common_outer_lr(self, grid: Grid, method: str) -> float | None:
        """The outer learning rate that is best on average over all levels; None before all have been tried."""
        tried = [self.tuning(grid, method, level) for level in LEVELS]
        if any(len(losses) < len(TUNED[method]) for losses in tried):
            return None
        return min(TUNED[method], key=lambda lr: sum(losses[lr] for losses in tried))

    def tuned_outer_lr(self, grid: Grid, method: str, heterogeneity: str = VERY) -> float | None:
        """The outer learning rate to run a method with; None for a baseline that is not tuned yet."""
        if method not in TUNED:
            return METHODS[method].outer_lr if method in METHODS else 0.0
        losses = self.tuning(grid, method, tuning_level(method, heterogeneity))
        if len(losses) < len(TUNED[method]):
            return None
        return min(losses, key=lambda lr: losses[lr] if math.isfinite(losses[lr]) else math.inf)
