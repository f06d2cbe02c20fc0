"""How far four unequal workers get with the same number of local steps, and how soon: a language model, eight methods.

    python benchmarks/time_to_loss.py            # all that is missing, then the report
    python benchmarks/time_to_loss.py --pretrain-steps 0 --steps 600 --methods default sync-tuned   # from scratch
    python benchmarks/time_to_loss.py --report   # the report of what is there

Four workers, slowed to the device speeds of the paper's toy experiment, train a small GPT from a common start, be it
pretrained or random. Every method makes the same total of local steps with the same inner optimizer, batches and data;
only the methods differ. Each result is stored at once as one line of ``time_to_loss.jsonl``, so that an interrupted run
can be continued.

Worker 0 keeps copies of the global parameters while it trains. They are evaluated on held-out text after the run.
"""

import argparse
import json
import math
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.strategies import DDPStrategy
from matplotlib.figure import Figure
from torch.utils.data import DataLoader, DistributedSampler

from _devices import TOY_SECONDS_PER_STEP, SimulatedDevice, scaled
from _language import LanguageModel, Task, held_out_loss, load_pretrained, load_tokens
from _workers import run_workers
from lightning_async_localsgd import AsyncLocalSGDStrategy, RunSummary
from lightning_async_localsgd.outer import DelayedNesterov

WORKERS = len(TOY_SECONDS_PER_STEP)
RESULTS = Path(__file__).parent / "results"
CACHE = Path(tempfile.gettempdir()) / "async-localsgd-benchmarks"

DEFAULT = "default"
SYNC = "sync"
SYNC_TUNED = "sync-tuned"
DN = "dn"
DN_OVERLAP = "dn-overlap"
ASYNC_DILOCO = "async-diloco"
DDP = "ddp"
TORCHFT = "torchft"
LABELS = {
    SYNC: "synchronous DiLoCo",
    SYNC_TUNED: "synchronous DiLoCo, tuned",
    DEFAULT: "this library, default",
    DN_OVERLAP: "DN + DyLU, overlap",
    DN: "DN + DyLU, no overlap",
    ASYNC_DILOCO: "async DiLoCo",
    DDP: "Lightning DDP",
    TORCHFT: "torchft DiLoCo",
}
COLORS = {
    SYNC: "#4477aa",
    SYNC_TUNED: "#225588",
    DEFAULT: "#ee6677",
    DN_OVERLAP: "#ee99aa",
    DN: "#aa3377",
    ASYNC_DILOCO: "#ccbb44",
    DDP: "#999999",
    TORCHFT: "#66ccee",
}
PEERS = (DDP, TORCHFT)
OUTER_LEARNING_RATES = (0.025, 0.05, 0.1)
"""Candidates for the tuning of async DiLoCo, on one seed; the paper found 0.05 to 0.1 best."""
TUNING_SEED = 0
SYNC_OUTER = {"warm": (1.0, 0.9), "scratch": (0.7, 0.7)}
"""Outer learning rate and momentum that ``cold_start.py`` found best for synchronous DiLoCo, on its tuning seed."""
CURVE_POINTS = 50

Result = dict[str, Any]  # one line of the results


@dataclass(frozen=True)
class Settings:
    """Common settings of all methods."""

    task: Task
    steps: int
    local_steps: int
    scale: float

    @property
    def start(self) -> str:
        return "warm" if self.task.pretrain_steps else "scratch"

    @property
    def step_seconds(self) -> list[float]:
        return scaled(self.scale)


@dataclass(frozen=True)
class Run:
    """One run of one method."""

    method: str
    seed: int
    settings: Settings
    cache: Path
    outer_lr: float | None = None  # of async DiLoCo; the others' is a matter of the method

    @property
    def expected_seconds(self) -> float:
        """About how long it takes, with all that goes before and after the training."""
        steps, seconds = self.settings.steps, self.settings.step_seconds
        if self.method in (DEFAULT, DN, DN_OVERLAP, ASYNC_DILOCO):
            return 60 + 1.2 * WORKERS * steps / sum(1 / s for s in seconds)
        return 40 + 1.1 * steps * seconds[-1]


@dataclass(frozen=True)
class WorkerRun:
    """The report of a worker; times on the clock shared by all processes."""

    begin: float
    end: float
    steps: int
    late_steps: int
    losses: list[tuple[float, float]]
    """Time and training loss of each local step."""
    snapshots: list[tuple[float, dict[str, np.ndarray]]]
    """Time and global parameters, on worker 0."""
    summary: RunSummary | None


# ---- worker processes -----------------------------------------------------------------------------------------------


class Recorder(L.Callback):
    """Keeps a worker's losses and, on worker 0, copies of the global parameters as they change.

    Args:
        every: Local steps after which the module holds new global parameters; None: the strategy tells.
        leader: Whether to keep the parameters.
    """

    def __init__(self, every: int | None, leader: bool) -> None:
        self.every = every
        self.leader = leader
        self.losses: list[tuple[float, float]] = []
        self.snapshots: list[tuple[float, dict[str, np.ndarray]]] = []
        self.end = 0.0
        self._changed = False

    def on_outer_update(self, *_: Any) -> None:
        self._changed = True

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.monotonic()
        self.losses.append((now, outputs["loss"].item()))
        if self.every is not None:
            self._changed = (batch_idx + 1) % self.every == 0
        if self._changed and self.leader:
            self.snapshots.append((now, _global_parameters(trainer, pl_module)))
        self._changed = False

    def on_train_end(self, *_: Any) -> None:
        self.end = time.monotonic()


def _global_parameters(trainer: L.Trainer, module: L.LightningModule) -> dict[str, np.ndarray]:
    strategy = trainer.strategy
    if isinstance(strategy, AsyncLocalSGDStrategy):
        assert strategy.worker is not None
        tensors = strategy.worker.global_tensors()
    else:
        tensors = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    return {name.removeprefix("gpt."): tensor.numpy() for name, tensor in tensors.items()}


def make_strategy(run: Run) -> Any:
    nesterov = partial(torch.optim.SGD, momentum=0.9, nesterov=True)
    algorithm_3 = partial(DelayedNesterov, lr=0.7, momentum=0.9)
    ours = partial(AsyncLocalSGDStrategy, local_steps=run.settings.local_steps)
    # Without overlap a worker also waits for others, at most two steps of the slowest worker.
    waiting = partial(ours, overlap=False, grace_period=2 * run.settings.scale * max(TOY_SECONDS_PER_STEP))
    if run.method in (SYNC, SYNC_TUNED):
        outer = partial(nesterov, lr=0.7)
        if run.method == SYNC_TUNED:
            lr, momentum = SYNC_OUTER[run.settings.start]
            outer = partial(nesterov, lr=lr, momentum=momentum)
        return waiting(outer_optimizer=outer, quorum=WORKERS, pace="fixed", budget="per_worker")
    if run.method == ASYNC_DILOCO:
        return waiting(outer_optimizer=partial(nesterov, lr=run.outer_lr), pace="fixed")
    if run.method == DN:
        return waiting(outer_optimizer=algorithm_3)
    if run.method == DN_OVERLAP:
        return ours(outer_optimizer=algorithm_3)
    if run.method == DEFAULT:
        return ours()
    if run.method == DDP:
        return DDPStrategy(process_group_backend="gloo")
    return "auto"  # a single device, under torchft's callback


def make_callbacks(rank: int, run: Run) -> tuple[SimulatedDevice, Recorder, list[L.Callback]]:
    settings = run.settings
    every = {DDP: max(1, settings.steps // CURVE_POINTS), TORCHFT: settings.local_steps}.get(run.method)
    device = SimulatedDevice(settings.step_seconds[rank])
    recorder = Recorder(every, leader=rank == 0)
    callbacks: list[L.Callback] = [device, recorder]
    if run.method == TORCHFT:
        from _torchft import TorchftDiLoCo  # no other method needs torchft

        callbacks.append(TorchftDiLoCo(rank, WORKERS, settings.local_steps))
    return device, recorder, callbacks


def make_loader(rank: int, run: Run) -> DataLoader[Any]:
    """Shuffled training windows; Lightning or the strategy gives each worker its part, except to torchft's."""
    windows, _ = load_tokens(run.cache, run.settings.task)
    load = partial(DataLoader, windows, batch_size=run.settings.task.batch_size, drop_last=True)
    if run.method == TORCHFT:
        return load(sampler=DistributedSampler(windows, WORKERS, rank, seed=run.seed))
    return load(shuffle=True)


def train(rank: int, run: Run) -> WorkerRun:
    """Train with one method, as worker ``rank``."""
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    L.seed_everything(run.seed, verbose=False)
    module = LanguageModel(run.settings.task, run.settings.steps)
    module.gpt.load_state_dict(load_pretrained(run.cache, run.settings.task, run.seed))
    device, recorder, callbacks = make_callbacks(rank, run)
    strategy = make_strategy(run)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1 if strategy == "auto" else WORKERS,
        strategy=strategy,
        max_steps=run.settings.steps,
        gradient_clip_val=1.0,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, make_loader(rank, run))
    summary = getattr(strategy, "summary", None)  # ours alone has one
    if recorder.leader:
        final = {name: parameter.detach().numpy() for name, parameter in module.gpt.named_parameters()}
        recorder.snapshots.append((recorder.end, final))
    return WorkerRun(
        device.begin, recorder.end, device.steps, device.late_steps, recorder.losses, recorder.snapshots, summary
    )


# ---- running --------------------------------------------------------------------------------------------------------


def execute(run: Run) -> Result:
    """Train and evaluate; returns the line to keep."""
    task = run.settings.task
    _, held_out = load_tokens(run.cache, task)
    pretrained = load_pretrained(run.cache, task, run.seed)
    workers = run_workers(train, run, WORKERS, timeout=3 * run.expected_seconds)

    begin = min(worker.begin for worker in workers)
    seconds = max(worker.end for worker in workers) - begin
    gpt = task.make_gpt()
    curve = [(0.0, held_out_loss(gpt, pretrained, held_out))]
    for moment, parameters in thinned(workers[0].snapshots, seconds / CURVE_POINTS):
        tensors = {name: torch.from_numpy(array) for name, array in parameters.items()}
        curve.append((moment - begin, held_out_loss(gpt, tensors, held_out)))
    losses = [(moment - begin, loss) for worker in workers for moment, loss in worker.losses]
    return {
        "method": run.method,
        "seed": run.seed,
        "outer_lr": run.outer_lr,
        "settings": asdict(run.settings),
        "final_loss": curve[-1][1],
        "final_perplexity": math.exp(curve[-1][1]),
        "seconds": seconds,
        "held_out_loss": rounded(curve),
        "train_loss": rounded(binned(losses, seconds)),
        "steps": [worker.steps for worker in workers],
        # A late step of DDP is one that waited for the others, since they average their gradients within it.
        "late_steps": sum(worker.late_steps for worker in workers) if run.method != DDP else None,
        "summary": asdict(workers[0].summary) if workers[0].summary else None,
    }


def thinned(snapshots: list[tuple[float, Any]], spacing: float) -> list[tuple[float, Any]]:
    """The snapshots that are at least ``spacing`` seconds apart, and the last."""
    kept = [snapshots[0]]
    for snapshot in snapshots[1:-1]:
        if snapshot[0] - kept[-1][0] >= spacing:
            kept.append(snapshot)
    return [*kept, snapshots[-1]]


def binned(points: list[tuple[float, float]], seconds: float) -> list[tuple[float, float]]:
    """Mean of the values in each of ``CURVE_POINTS`` equal spans of time, at the middle of the span."""
    spans: list[list[float]] = [[] for _ in range(CURVE_POINTS)]
    for moment, value in points:
        spans[min(CURVE_POINTS - 1, int(moment / seconds * CURVE_POINTS))].append(value)
    width = seconds / CURVE_POINTS
    return [((index + 0.5) * width, fmean(values)) for index, values in enumerate(spans) if values]


def rounded(curve: list[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(round(moment, 3), round(loss, 5)) for moment, loss in curve]


class Results:
    """The lines of results with these settings; others in the file are left alone."""

    def __init__(self, path: Path, settings: Settings) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.lines: list[Result] = [
            result for line in lines if (result := json.loads(line))["settings"] == asdict(settings)
        ]

    def add(self, result: Result) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(result) + "\n")
        self.lines.append(result)

    def has(self, run: Run) -> bool:
        wanted = (run.method, run.seed, run.outer_lr)
        return any((line["method"], line["seed"], line["outer_lr"]) == wanted for line in self.lines)

    def tuning(self) -> dict[float, float]:
        """Final perplexity of async DiLoCo by outer learning rate, on the seed that it is tuned on."""
        tuned = [line for line in self._of(ASYNC_DILOCO) if line["seed"] == TUNING_SEED]
        return {line["outer_lr"]: line["final_perplexity"] for line in sorted(tuned, key=lambda line: line["outer_lr"])}

    def best_outer_lr(self) -> float | None:
        """The outer learning rate that is best for async DiLoCo; None before all of them have been tried."""
        tuning = self.tuning()
        return min(tuning, key=lambda lr: tuning[lr]) if tuning.keys() >= set(OUTER_LEARNING_RATES) else None

    def by_method(self) -> dict[str, list[Result]]:
        """The results of each method by seed; of async DiLoCo those with the best outer learning rate."""
        best_lr = self.best_outer_lr()
        by_method = {method: self._of(method) for method in LABELS}
        by_method[ASYNC_DILOCO] = [line for line in by_method[ASYNC_DILOCO] if line["outer_lr"] == best_lr]
        return {method: lines for method, lines in by_method.items() if lines}

    def _of(self, method: str) -> list[Result]:
        return sorted((line for line in self.lines if line["method"] == method), key=lambda line: line["seed"])


def plan(args: argparse.Namespace, settings: Settings, results: Results) -> Iterator[Run]:
    """The runs to make, one after the other: the outer learning rate found in some is known to the next."""
    for seed in args.seeds:
        for method in [*args.methods, *(PEERS if args.peers and seed == args.seeds[0] else ())]:
            run = partial(Run, method, seed, settings, args.cache)
            if method != ASYNC_DILOCO:
                yield run()
            elif seed == TUNING_SEED:
                yield from (run(outer_lr=lr) for lr in OUTER_LEARNING_RATES)
            elif (best_lr := results.best_outer_lr()) is not None:
                yield run(outer_lr=best_lr)
            else:
                raise SystemExit(f"{LABELS[method]} is tuned on seed {TUNING_SEED}: run that one first.")


def execute_missing(args: argparse.Namespace, settings: Settings, results: Results) -> None:
    """Make all runs whose result is not there yet, as far as ``args.minutes`` allows."""
    deadline = time.monotonic() + 60 * args.minutes
    for run in plan(args, settings, results):
        if results.has(run):
            continue
        if time.monotonic() + run.expected_seconds > deadline:
            print("Out of time: the same command goes on from here.")
            return
        outer_lr = f", outer learning rate {run.outer_lr:g}" if run.outer_lr else ""
        print(f"seed {run.seed}, {LABELS[run.method]}{outer_lr} ...", end=" ", flush=True)
        result = execute(run)
        results.add(result)
        print(f"perplexity {result['final_perplexity']:.2f} after {result['seconds']:.1f} s", flush=True)


# ---- reporting ------------------------------------------------------------------------------------------------------


def seconds_to_reach(result: Result, loss: float) -> float | None:
    """Time at which the global parameters first had at most this held-out loss; None: never."""
    return next((moment for moment, value in result["held_out_loss"] if value <= loss), None)


def compare(by_method: dict[str, list[Result]]) -> dict[str, dict[str, Any]]:
    """The figures of each method, with those that relate it to the synchronous run of the same seed."""
    reference = SYNC if SYNC in by_method else SYNC_TUNED
    sync = {result["seed"]: result for result in by_method.get(reference, [])}
    figures = {}
    for method, results in by_method.items():
        paired = [(result, sync[result["seed"]]) for result in results if result["seed"] in sync]
        reached = [(seconds_to_reach(result, s["held_out_loss"][-1][1]), s["seconds"]) for result, s in paired]
        figures[method] = {
            "label": LABELS[method],
            "outer_lr": results[0]["outer_lr"],
            "seeds": [result["seed"] for result in results],
            "perplexity": [result["final_perplexity"] for result in results],
            "mean_perplexity": fmean(result["final_perplexity"] for result in results),
            "perplexity_over_sync": mean([r["final_perplexity"] / s["final_perplexity"] for r, s in paired]),
            "mean_seconds": fmean(result["seconds"] for result in results),
            "time_to_sync_loss_over_sync_time": [None if t is None else t / seconds for t, seconds in reached],
        }
    return figures


def mean(values: list[float]) -> float | None:
    return fmean(values) if values else None


def as_markdown(figures: dict[str, dict[str, Any]], settings: Settings, tuning: dict[float, float]) -> str:
    lines = [
        "| method | perplexity, mean | by seed | over sync | seconds | time to sync's final loss, over sync's time |",
        "|---|---|---|---|---|---|",
    ]
    for row in figures.values():
        by_seed = ", ".join(f"{perplexity:.2f}" for perplexity in row["perplexity"])
        ratio = "" if row["perplexity_over_sync"] is None else f"{row['perplexity_over_sync']:.3f}"
        reached = ", ".join("never" if r is None else f"{r:.3f}" for r in row["time_to_sync_loss_over_sync_time"])
        lines.append(
            f"| {row['label']} | {row['mean_perplexity']:.2f} | {by_seed} | {ratio} | {row['mean_seconds']:.1f} "
            f"| {reached} |"
        )
    tried = ", ".join(f"{lr:g}: {perplexity:.2f}" for lr, perplexity in tuning.items())
    seconds = ", ".join(f"{s * 1e3:.0f}" for s in settings.step_seconds)
    lines += [
        "",
        f"{WORKERS} workers of {seconds} ms per step, {WORKERS * settings.steps} local steps in every run, "
        f"H = {settings.local_steps}, {settings.task.pretrain_steps} steps of common pretraining.",
        f"Outer learning rates tried for async DiLoCo on seed {TUNING_SEED}, with their perplexity: {tried or 'none'}.",
    ]
    return "\n".join(lines) + "\n"


def draw(by_method: dict[str, list[Result]], figures: dict[str, dict[str, Any]], path: Path) -> None:
    """Write the picture: held-out loss over time, mean of the seeds, and beside it the final perplexities."""
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    curves, finals = figure.subplots(1, 2, width_ratios=(2.2, 1))
    _draw_curves(curves, by_method)
    _draw_finals(finals, figures)
    for axes in (curves, finals):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def _draw_curves(axes: Any, by_method: dict[str, list[Result]]) -> None:
    for method, results in by_method.items():
        moments, losses = mean_curve(results)
        axes.plot(moments, losses, color=COLORS[method], label=LABELS[method])
        axes.plot(moments[-1], losses[-1], "o", color=COLORS[method], markersize=5)
    if SYNC in by_method:
        target = mean_curve(by_method[SYNC])[1][-1]
        axes.axhline(target, color=COLORS[SYNC], linewidth=0.8, linestyle="--", zorder=0)
    axes.set_title("Global parameters while training, mean of the seeds", loc="left")
    axes.set_xlabel("seconds")
    axes.set_ylabel("held-out loss (nats per token)")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)


def _draw_finals(axes: Any, figures: dict[str, dict[str, Any]]) -> None:
    for position, (method, row) in enumerate(figures.items()):
        axes.barh(position, row["mean_perplexity"], 0.62, color=COLORS[method])
        axes.plot(row["perplexity"], [position] * len(row["perplexity"]), "|", color="black", markersize=9)
        axes.text(max(row["perplexity"]), position, f"  {row['mean_perplexity']:.1f}", va="center")
    axes.set_yticks(range(len(figures)), [row["label"] for row in figures.values()])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(right=1.15 * max(max(row["perplexity"]) for row in figures.values()))
    axes.set_title("After training", loc="left")
    axes.set_xlabel("held-out perplexity, and seeds")


def mean_curve(results: list[Result]) -> tuple[np.ndarray, np.ndarray]:
    """Mean held-out loss of several runs over time, up to the mean of their ends."""
    seconds = fmean(result["seconds"] for result in results)
    grid = np.linspace(0.0, 1.0, 2 * CURVE_POINTS + 1)
    curves = []
    for result in results:
        moments, losses = zip(*result["held_out_loss"], strict=True)
        curves.append(np.interp(grid, np.array(moments) / moments[-1], losses))
    return grid * seconds, np.mean(curves, axis=0)


def report(settings: Settings, results: Results, folder: Path) -> None:
    """Write the results so far as JSON, Markdown and PNG."""
    by_method = results.by_method()
    if not by_method:
        raise SystemExit("There is no result with these settings yet.")
    figures = compare(by_method)
    table = as_markdown(figures, settings, results.tuning())
    print(f"\n{table}")
    summary = {"settings": asdict(settings), "methods": figures, "async_diloco_tuning": results.tuning()}
    name = "time_to_loss" if settings.start == "warm" else "time_to_loss_scratch"
    (folder / f"{name}.json").write_text(json.dumps(summary, indent=2) + "\n")
    (folder / f"{name}.md").write_text(table)
    draw(by_method, figures, folder / f"{name}.png")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    ours = [method for method in LABELS if method not in PEERS]
    parser.add_argument("--methods", nargs="+", choices=LABELS, default=ours, metavar="METHOD", help=", ".join(LABELS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED")
    parser.add_argument("--peers", action="store_true", help="also DDP and torchft's DiLoCo, on the first seed")
    parser.add_argument("--report", action="store_true", help="run nothing, report what is there")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start nothing that would take longer")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for results and report")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder for tokens and pretrained parameters")
    parser.add_argument("--scale", type=float, default=0.1, help="of the toy's seconds per step")
    parser.add_argument("--steps", type=int, default=1000, help="local steps per worker, on average")
    parser.add_argument("--local-steps", type=int, default=50, help="H, local steps per round of the fastest worker")
    task = parser.add_argument_group("task")
    for field in fields(Task):
        task.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(1)  # several, on a busy machine, evaluate ten times slower
    task = Task(**{field.name: getattr(args, field.name) for field in fields(Task)})
    settings = Settings(task, args.steps, args.local_steps, args.scale)
    results = Results(args.output / "time_to_loss.jsonl", settings)
    if not args.report:
        execute_missing(args, settings, results)
    report(settings, results, args.output)


if __name__ == "__main__":
    main()
