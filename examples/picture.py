"""One picture of a run: the loss over time, and beneath it every worker's rounds."""

import time
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import lightning as L
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from lightning_async_localsgd import OuterUpdate

COLORS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")


class Round(NamedTuple):
    """A round of local steps, as the outer update that ended it reported it; times in seconds since the run started."""

    worker: int
    local_steps: int
    staleness: int
    start: float
    end: float


class RunRecorder(L.Callback):
    """Keeps this worker's training loss, and the rounds of all workers."""

    def __init__(self) -> None:
        self.rounds: list[Round] = []
        self.duration = 0.0
        self._start = 0.0
        self._losses: list[tuple[float, Tensor]] = []

    @property
    def losses(self) -> list[tuple[float, float]]:
        """Seconds since the start of the run, and the loss of the batch that ended then."""
        return [(seconds, loss.item()) for seconds, loss in self._losses]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start = time.monotonic()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
        # Still a tensor: reading its value here would make every step wait for the GPU.
        self._losses.append((time.monotonic() - self._start, outputs["loss"].detach()))

    def on_outer_update(self, trainer: L.Trainer, pl_module: L.LightningModule, update: OuterUpdate) -> None:
        """Called by the strategy on every worker, for every outer update of any worker."""
        end = time.monotonic() - self._start
        self.rounds.append(Round(update.worker, update.local_steps, update.staleness, end - update.seconds, end))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.duration = time.monotonic() - self._start


def draw_run(recorder: RunRecorder, loss_before: float, loss_after: float, path: Path) -> None:
    """Writes the picture of a run as a PNG.

    Args:
        recorder: What was recorded on the worker that draws.
        loss_before: Held-out loss before training.
        loss_after: Held-out loss of the global parameters after training.
        path: The file to write.
    """
    workers = 1 + max((round_.worker for round_ in recorder.rounds), default=0)
    figure = Figure(figsize=(10, 4.2 + 0.45 * workers), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3.2, 0.6 + 0.45 * workers))
    _draw_losses(upper, recorder, loss_before, loss_after)
    _draw_rounds(lower, recorder, workers)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _draw_losses(axes: Axes, recorder: RunRecorder, loss_before: float, loss_after: float) -> None:
    losses = recorder.losses
    times = [seconds for seconds, _ in losses]
    axes.plot(times, [loss for _, loss in losses], color=COLORS[0], alpha=0.3, linewidth=0.8)
    axes.plot(times, _smoothed([loss for _, loss in losses]), color=COLORS[0], label="training, worker 0")
    axes.plot(
        (0, recorder.duration), (loss_before, loss_after), "D", color="black", label="held-out, global parameters"
    )
    for x, loss, alignment in ((0, loss_before, "left"), (recorder.duration, loss_after, "right")):
        axes.annotate(f"{loss:.2f}", (x, loss), xytext=(0, 8), textcoords="offset points", ha=alignment)
    axes.set_ylabel("loss (nats per token)")
    axes.legend(frameon=False)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _smoothed(values: list[float]) -> list[float]:
    """The mean of each value and its neighbours; unlike a running average it does not lag behind."""
    reach = len(values) // 50
    windows = (values[max(0, index - reach) : index + reach + 1] for index in range(len(values)))
    return [fmean(window) for window in windows]


def _draw_rounds(axes: Axes, recorder: RunRecorder, workers: int) -> None:
    by_worker: dict[int, list[Round]] = defaultdict(list)
    for round_ in recorder.rounds:
        by_worker[round_.worker].append(round_)
    for worker, rounds in by_worker.items():
        _draw_lane(axes, worker, rounds, recorder.duration)
    axes.set_yticks(range(workers), [f"worker {worker}" for worker in range(workers)])
    axes.set_ylim(workers - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.set_title("rounds, with their local steps", loc="left", fontsize="medium")
    axes.set_xlabel("seconds")
    axes.spines[["top", "right", "left"]].set_visible(False)


def _draw_lane(axes: Axes, worker: int, rounds: list[Round], duration: float) -> None:
    color = COLORS[worker % len(COLORS)]
    previous_end = 0.0
    for index, round_ in enumerate(rounds):
        # Updates are seen between two steps, a little after they came: a round can seem to start before the last ended.
        start = max(round_.start, previous_end)
        width = max(round_.end - start, 0.0)
        previous_end = round_.end
        axes.barh(worker, width, left=start, height=0.7, color=color, alpha=(0.8, 0.55)[index % 2], edgecolor="white")
        if width > 0.025 * duration:
            axes.text(start + width / 2, worker, str(round_.local_steps), ha="center", va="center", fontsize="small")
